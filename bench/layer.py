"""Time a decode step's layers on a CUDA device: as one op each, with kernels that start early, and as their parts.

    python -m bench.layer                   # what the table chooses, beside the compiled parts; where the time goes
    python -m bench.layer --sweep           # other configurations of each product; the best to copy into the table
    TRITON_INTERPRET=1 python -m bench.layer --device cpu --rows 2,8 --sweep    # that this script works; no figures

All layers are in one CUDA graph and each has its own weights, so that none is still in the L2 cache.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from bench import kernels
from bench.layer_candidates import candidates
from bench.machine import choose_device, read_bandwidth
from engine.compiled_model import compiled_functions, eager_functions, mark_dynamic
from layers import model
from layers.config import ModelConfig
from layers.rope import rope_frequencies, rope_rotation
from layers.types import AttentionWeights, Batch, BlockWeights, LayerKV, MlpWeights
from ops.norm import Norm

if TYPE_CHECKING:
    from ops.triton.tuning import LayerConfig

QWEN = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=151_936,
    hidden_size=1536,
    intermediate_size=8960,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    max_position_embeddings=32_768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    qkv_bias=True,
)
TINY = dataclasses.replace(
    QWEN, hidden_size=128, intermediate_size=192, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64
)
BLOCK_SIZE = 16


class Stack(NamedTuple):
    """Layers with weights and pages of their own."""

    config: ModelConfig
    weights: list[BlockWeights]
    pages: list[LayerKV]

    def weight_bytes(self) -> int:
        """Of the matrices of one layer."""
        attention, mlp = self.weights[0].attention, self.weights[0].mlp
        matrices = (attention.qkv, attention.output, mlp.gate_up, mlp.down)
        return sum(matrix.nbytes for matrix in matrices if isinstance(matrix, Tensor))


class Step(NamedTuple):
    """Hidden states of a decode step and where they stand."""

    x: Tensor
    batch: Batch
    rotation: tuple[Tensor, Tensor]


def make_stack(config: ModelConfig, num_blocks: int, device: torch.device, dtype: torch.dtype) -> Stack:
    def matrix(features: int, columns: int) -> Tensor:
        return torch.randn(features, columns, device=device, dtype=dtype) * columns**-0.5

    def ones(size: int) -> Tensor:
        return torch.ones(size, device=device, dtype=dtype)

    hidden, head_dim, intermediate = config.hidden_size, config.head_dim, config.intermediate_size
    qkv = (config.num_heads + 2 * config.num_kv_heads) * head_dim
    weights, pages = [], []
    for _ in range(config.num_layers):
        attention = AttentionWeights(matrix(qkv, hidden), matrix(hidden, config.num_heads * head_dim), ones(qkv))
        mlp = MlpWeights(matrix(2 * intermediate, hidden), matrix(hidden, intermediate))
        weights.append(BlockWeights(ones(hidden), attention, ones(hidden), mlp))
        keys = torch.randn(num_blocks, config.num_kv_heads, head_dim, BLOCK_SIZE, device=device, dtype=dtype)
        pages.append(LayerKV(keys, torch.randn_like(keys).view(num_blocks, -1, BLOCK_SIZE, head_dim)))
    return Stack(config, weights, pages)


def make_step(stack: Stack, rows: int, context: int, columns: int) -> Step:
    keys, config = stack.pages[0].keys, stack.config
    device = keys.device

    def integers(values: Tensor) -> Tensor:
        return values.to(device, torch.int32)

    each = -(-context // BLOCK_SIZE)
    tables = torch.zeros(rows, columns, dtype=torch.int32)
    tables[:, :each] = 1 + torch.arange(rows * each).view(rows, each)
    positions = integers(torch.full((rows,), context - 1))
    slots = tables[:, each - 1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
    zeros = torch.zeros(rows, dtype=torch.int32, device=device)
    lengths = integers(torch.full((rows,), context))
    starts = integers(torch.arange(rows + 1))
    batch = Batch(zeros, positions, integers(slots), integers(tables), starts, lengths, zeros, 1)
    x = torch.randn(rows, config.hidden_size, device=device, dtype=keys.dtype)
    return Step(x, batch, rope_rotation(positions, rope_frequencies(config).to(device), 1.0))


def as_ops(stack: Stack, step: Step, config: "LayerConfig | None" = None) -> Tensor:
    """The layers as one op each, by a LayerConfig or by what the table chooses."""
    from ops.triton.decoder_layer import decoder_layer

    x, batch, settings = step.x, step.batch, stack.config
    for w, kv in zip(stack.weights, stack.pages, strict=True):
        a, mlp = w.attention, w.mlp
        matrices = (a.qkv, a.output, mlp.gate_up, mlp.down)
        qkv, output, gate_up, down = (matrix for matrix in matrices if isinstance(matrix, Tensor))
        x = decoder_layer(
            x,
            w.attention_norm,
            qkv,
            a.qkv_bias,
            a.query_norm,
            a.key_norm,
            output,
            a.output_bias,
            w.mlp_norm,
            gate_up,
            down,
            settings.rms_norm_eps,
            *step.rotation,
            *kv,
            batch.slot_mapping,
            batch.block_tables,
            batch.query_start,
            batch.context_lens,
            settings.num_heads,
            settings.intermediate_size,
            settings.attention_scale,
            config,
        )
    return x


def as_parts(stack: Stack, step: Step, block: Callable[..., Tensor]) -> Tensor:
    """The layers as the engine ran them without the op."""
    x = step.x
    for w, kv in zip(stack.weights, stack.pages, strict=True):
        x = block(x, w, step.batch, step.rotation, kv)
    return x


def parts_of(config: ModelConfig, is_cuda: bool) -> Callable[..., Tensor]:
    """A layer without the op; compiled on CUDA."""
    model.ops.has_layer_kernel = lambda *_: False
    eager = eager_functions(config)
    return compiled_functions(eager).block if is_cuda else eager.block


def chosen_for(config: ModelConfig, rows: int, device: torch.device) -> "LayerConfig":
    """What the table says; on a CPU, what it says of an H100."""
    from ops.triton.tuning import Device, choose_layer, describe

    described = describe(device) if device.type == "cuda" else Device("sm_90", 132)
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return choose_layer(described, rows, config.hidden_size, qkv, config.intermediate_size)


def seconds_of_graph(calls: Sequence[Callable[[], object]], is_cuda: bool) -> float:
    """Of one call, all of them in one CUDA graph."""
    if is_cuda:
        return kernels.seconds_per_call(calls, repeats=15)
    begin = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - begin) / len(calls)


def profile(run: Callable[[], object], layers: int) -> list[tuple[str, float]]:
    """(kernel, microseconds) of one layer in order, medians over the layers of a replay; sums by name where layers
    differ."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as recorded:
        graph.replay()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    each, rest = divmod(len(events), layers)
    if rest or not each:
        names = sorted({event.name for event in events})
        return [
            (name, sum(event.self_device_time_total for event in events if event.name == name) / layers)
            for name in names
        ]
    found = []
    for index in range(each):
        times = sorted(event.self_device_time_total for event in events[index::each])
        found.append((events[index].name, times[len(times) // 2]))
    return found


def products_of(stack: Stack, step: Step, name: str, config: object) -> list[Callable[[], Tensor]]:
    """One of the four products of each layer, as calls; torch's without a config, and then nothing around it."""
    from ops.triton.add_product import add_product
    from ops.triton.gate_product import gate_product
    from ops.triton.rotate_product import Slots, rotate_product
    from ops.triton.tuning import FewRowsConfig

    settings, x = stack.config, step.x
    wide = torch.randn(len(x), settings.intermediate_size, device=x.device, dtype=x.dtype)
    attended = torch.randn(len(x), settings.num_heads * settings.head_dim, device=x.device, dtype=x.dtype)
    arrivals = torch.zeros(4096, dtype=torch.int32, device=x.device)
    calls: list[Callable[[], Tensor]] = []
    for w, kv in zip(stack.weights, stack.pages, strict=True):
        a, mlp = w.attention, w.mlp
        weight = {"qkv": a.qkv, "output": a.output, "gate_up": mlp.gate_up, "down": mlp.down}[name]
        source = {"output": attended, "down": wide}.get(name, x)
        norm = Norm(w.mlp_norm, settings.rms_norm_eps) if len(x) <= 16 else None
        assert isinstance(weight, Tensor)
        if config is None:
            calls.append(partial(torch.nn.functional.linear, source, weight))
            continue
        assert isinstance(config, FewRowsConfig)
        if name == "qkv":
            slots = Slots(*kv, step.batch.slot_mapping, *step.rotation)
            calls.append(partial(rotate_product, x, weight, a.qkv_bias, norm, slots, settings.num_heads, config))
        elif name == "gate_up":
            calls.append(partial(gate_product, x, weight, norm, config))
        else:
            calls.append(partial(add_product, source, weight, None, x, None, config, False, arrivals))
    return calls


def sweep(stack: Stack, step: Step, deadline: float) -> None:
    """Try the candidates of each product; print the best."""
    from ops.triton.tuning import FewRowsConfig

    settings, rows, is_cuda = stack.config, len(step.x), step.x.is_cuda
    attention, mlp = stack.weights[0].attention, stack.weights[0].mlp
    weights = {"qkv": attention.qkv, "output": attention.output, "gate_up": mlp.gate_up, "down": mlp.down}
    shapes = {name: weight.shape for name, weight in weights.items() if isinstance(weight, Tensor)}
    chosen = chosen_for(settings, rows, step.x.device)
    for name, (features, columns) in shapes.items():
        size = 2 * features * columns
        tried: dict[tuple[int, ...] | None, float] = {}
        ours = getattr(chosen, name)
        known = [None, *([tuple(ours)] if ours else [])]
        for candidate in dict.fromkeys([*known, *candidates(name, rows)]):
            if candidate not in known and time.monotonic() > deadline:
                print("    no time left for the other candidates")
                break
            config = None if candidate is None else FewRowsConfig(*candidate)
            try:
                tried[candidate] = seconds_of_graph(products_of(stack, step, name, config), is_cuda)
            except Exception as error:  # what does not fit the device, in whatever way the compiler says so
                if is_cuda:
                    torch.cuda.synchronize()
                print(f"    {name} {candidate}: {type(error).__name__}: {error!s:.80}")
        for candidate, seconds in sorted(tried.items(), key=lambda item: item[1])[:4]:
            mark = " <- chosen now" if candidate == (tuple(ours) if ours else None) else ""
            called = "torch alone" if candidate is None else f"FewRowsConfig{candidate}"
            print(f"  {rows:>3} rows {name:<8} {seconds * 1e6:7.2f} us {size / seconds / 1e9:5.0f} GB/s {called}{mark}")
        print(end="", flush=True)


def main(
    rows: Annotated[str, typer.Option(help="Comma-separated numbers of rows.")] = "1,2,4,6,8,16,32,64,128",
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 256,
    device: Annotated[str | None, typer.Option(help="cuda, or cpu to try this script in Triton's interpreter.")] = None,
    parts: Annotated[bool, typer.Option(help="Time the layers without the op as well.")] = True,
    profiled: Annotated[str, typer.Option(help="Numbers of rows to list the kernels of.")] = "2,8,32",
    sweep_rows: Annotated[str, typer.Option(help="Numbers of rows to sweep for.")] = "2,8,32",
    sweeps: Annotated[bool, typer.Option("--sweep", help="Try other configurations of the products.")] = False,
    minutes: Annotated[float, typer.Option(help="Try no other candidates after this long, and no other rows.")] = 3.8,
) -> None:
    """Print microseconds of a layer, and what share of the memory's bandwidth that is."""
    deadline = time.monotonic() + 60 * minutes
    where = choose_device(device)
    is_cuda = where.type == "cuda"
    # The interpreter's dot cannot multiply bfloat16.
    config, dtype = (QWEN, torch.bfloat16) if is_cuda else (TINY, torch.float16)
    counts, swept = (
        [int(count) for count in given.split(",") if count] for given in (rows, sweep_rows if sweeps else "")
    )
    context, columns = (context, 64) if is_cuda else (20, 4)
    stack = make_stack(config, 1 + max(*counts, *swept, 1) * -(-context // BLOCK_SIZE), where, dtype)
    read, copy = (read_bandwidth(where), kernels.copy_bandwidth()) if is_cuda else (1e9, 1e9)
    print(f"reads {read / 1e9:.0f} GB/s, copies {copy / 1e9:.0f} GB/s (read and written)")
    block = parts_of(config, is_cuda)
    with torch.inference_mode():
        for count in counts:
            if time.monotonic() > deadline:
                print(f"{count} rows and what follows: no time left")
                break
            step = make_step(stack, count, context, columns)
            moved = stack.weight_bytes() + 4 * count * context * config.num_kv_heads * config.head_dim
            chosen = chosen_for(config, count, where)
            runs: dict[str, Callable[[], Tensor]] = {"as one op": partial(as_ops, stack, step, chosen)}
            if is_cuda and torch.cuda.get_device_capability() >= (9, 0) and count <= 64:
                runs["early"] = partial(as_ops, stack, step, chosen._replace(early=True))
            if parts:
                mark_dynamic(step.x, *step.batch, *step.rotation)
                runs["as parts"] = partial(as_parts, stack, step, block)
            expected = None
            for name, run in runs.items():
                found = run()
                expected = found if expected is None else expected
                difference = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
                seconds = seconds_of_graph([run], is_cuda) / config.num_layers
                rate = moved / seconds
                print(
                    f"{count:>3} rows {name:<9} {seconds * 1e6:8.2f} us a layer {rate / 1e9:6.0f} GB/s"
                    f" {rate / read:6.1%} of reading {rate / copy:6.1%} of copying, differs by {difference:.1e}",
                    flush=True,
                )
            if is_cuda and str(count) in profiled.split(","):
                for name in runs:
                    listed = profile(runs[name], config.num_layers)
                    print(f"    {name}: {sum(time for _, time in listed):.1f} us in {len(listed)} kernels a layer")
                    print("\n".join(f"      {microseconds:7.2f} us {kernel[:90]}" for kernel, microseconds in listed))
        for count in swept:
            sweep(stack, make_step(stack, count, context, columns), deadline)


if __name__ == "__main__":
    typer.run(main)
