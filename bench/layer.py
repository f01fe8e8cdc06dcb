"""Time the layers of a decode step on a CUDA device, and sweep the configurations of their GEMMs.

    python -m dispec.bench.layer                   # `decoder_layer`, and its time by kernel
    python -m dispec.bench.layer --sweep           # other configurations of each GEMM
    TRITON_INTERPRET=1 python -m dispec.bench.layer --device cpu --tokens 2,8 --sweep    # checks the script

All layers are compiled together, as in a step of the engine, and run in one CUDA graph. Each has its own weights, so
that none is still in the L2 cache.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from dispec import ops
from dispec.bench import kernels
from dispec.bench.layer_candidates import candidates
from dispec.bench.machine import choose_device, read_bandwidth
from dispec.layers.config import ModelConfig
from dispec.layers.model import decoder_layer
from dispec.layers.rope import rope_frequencies
from dispec.layers.types import Batch, KVCache, LayerWeights, unstack_layers
from dispec.layers.weight_stacks import Packing
from dispec.layers.weights import dummy_weights

if TYPE_CHECKING:
    from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig

QWEN = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=1,  # the head is no part of a layer
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
    """The weights and the KV cache of all layers, stacked."""

    config: ModelConfig
    blocks: LayerWeights
    kv_cache: KVCache

    def matrices(self, layer: int) -> dict[str, Tensor]:
        weights = unstack_layers(self.blocks)[layer]
        attention, mlp = weights.attention, weights.mlp
        found = {"qkv": attention.qkv, "output": attention.output, "gate_up": mlp.gate_up, "down": mlp.down}
        return {name: matrix for name, matrix in found.items() if isinstance(matrix, Tensor)}


class Step(NamedTuple):
    """The inputs of the layers in a decode step."""

    x: Tensor
    batch: Batch
    rotation: tuple[Tensor, Tensor]


def make_stack(config: ModelConfig, num_blocks: int, device: torch.device, dtype: torch.dtype) -> Stack:
    weights = dummy_weights(config, dtype, device, packing=Packing(keeps_plain=True))
    shape = (config.num_layers, num_blocks, config.num_kv_heads)
    keys = torch.randn(*shape, config.head_dim, BLOCK_SIZE, device=device, dtype=dtype)
    values = torch.randn(*shape, BLOCK_SIZE, config.head_dim, device=device, dtype=dtype)
    return Stack(config, weights.layers, KVCache(keys, values))


def make_step(stack: Stack, num_sequences: int, context: int, max_blocks_per_seq: int) -> Step:
    keys, config = stack.kv_cache.keys, stack.config
    device = keys.device

    def integers(values: Tensor) -> Tensor:
        return values.to(device, torch.int32)

    each = -(-context // BLOCK_SIZE)
    tables = torch.zeros(num_sequences, max_blocks_per_seq, dtype=torch.int32)
    tables[:, :each] = 1 + torch.arange(num_sequences * each).view(num_sequences, each)
    positions = integers(torch.full((num_sequences,), context - 1))
    slots = tables[:, each - 1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
    zeros = torch.zeros(num_sequences, dtype=torch.int32, device=device)
    lengths = integers(torch.full((num_sequences,), context))
    starts = integers(torch.arange(num_sequences + 1))
    batch = Batch(zeros, positions, integers(slots), integers(tables), starts, lengths, None, 1)
    x = torch.randn(num_sequences, config.hidden_size, device=device, dtype=keys.dtype)
    return Step(x, batch, ops.rope_cos_sin(positions, rope_frequencies(config).to(device), 1.0))


def run_layers(stack: Stack, step: Step) -> Tensor:
    x = step.x
    for w, kv in zip(unstack_layers(stack.blocks), stack.kv_cache.layers(), strict=True):
        x = decoder_layer(x, w, stack.config, step.batch, step.rotation, kv)
    return x


def seconds_of_graph(calls: Sequence[Callable[[], object]], is_cuda: bool) -> float:
    """Return seconds of one call, with all calls in one CUDA graph."""
    if is_cuda:
        return kernels.seconds_per_call(calls, repeats=15)
    begin = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - begin) / len(calls)


def profile(run: Callable[[], object], num_layers: int) -> list[tuple[str, float]]:
    """Return (kernel, microseconds) of one layer in order, medians over the layers of a replay.

    Where layers differ, the kernels of all layers are summed by name and divided by the number of layers.
    """
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
    each, rest = divmod(len(events), num_layers)
    if rest or not each:
        names = sorted({event.name for event in events})
        return [
            (name, sum(event.self_device_time_total for event in events if event.name == name) / num_layers)
            for name in names
        ]
    found = []
    for index in range(each):
        times = sorted(event.self_device_time_total for event in events[index::each])
        found.append((events[index].name, times[len(times) // 2]))
    return found


def linear_calls(stack: Stack, step: Step, name: str, config: "SkinnyGemmConfig | None") -> list[Callable[[], Tensor]]:
    """Return a call of one of the four GEMMs for each layer; without a config of torch's GEMM alone."""
    from dispec.ops.triton.gated_linear import gated_linear
    from dispec.ops.triton.linear_residual import norm_linear_residual
    from dispec.ops.triton.qkv_rope_write import fused_qkv_rope_write
    from dispec.ops.triton.rope_write import KVSlots

    x, eps = step.x, stack.config.rms_norm_eps
    calls: list[Callable[[], Tensor]] = []
    for layer, (w, kv) in enumerate(zip(unstack_layers(stack.blocks), stack.kv_cache.layers(), strict=True)):
        weight = stack.matrices(layer)[name]
        source = torch.randn(len(x), weight.shape[1], device=x.device, dtype=x.dtype)
        norm = ops.Norm(w.mlp_norm, eps) if config is not None and config.fuses_norm else None
        if config is None:
            calls.append(partial(torch.nn.functional.linear, source, weight))
        elif name == "qkv" and config.splits <= 1:
            slots = KVSlots(kv.keys[kv.layer], kv.values[kv.layer], step.batch.slot_mapping, *step.rotation)
            calls.append(partial(fused_qkv_rope_write, source, weight, w.attention.qkv_bias, norm, slots, config))
        elif name == "gate_up":
            calls.append(partial(gated_linear, source, weight, norm, config))
        else:
            residual = None if name == "qkv" else x
            calls.append(partial(norm_linear_residual, source, weight, None, residual, None, config))
    return calls


def sweep(stack: Stack, step: Step, deadline: float) -> None:
    """Try the candidates of each GEMM until `deadline`; print the best."""
    from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig, choose_fused_linear
    from dispec.ops.triton.tuning import Device, describe

    num_tokens, is_cuda = len(step.x), step.x.is_cuda
    device = describe(step.x.device) if is_cuda else Device("sm_90", 132)
    for name, weight in stack.matrices(0).items():
        is_normed = name in ("qkv", "gate_up")
        ours = choose_fused_linear(device, num_tokens, *weight.shape, has_norm=is_normed, is_gated=name == "gate_up")
        tried: dict[tuple[Any, ...] | None, float] = {}
        known: list[tuple[Any, ...] | None] = [None, *([tuple(ours)] if ours else [])]
        for candidate in dict.fromkeys([*known, *candidates(name, num_tokens)]):
            if candidate not in known and time.monotonic() > deadline:
                print("    no time left for the other candidates")
                break
            config = None if candidate is None else SkinnyGemmConfig(*candidate)
            try:
                tried[candidate] = seconds_of_graph(linear_calls(stack, step, name, config), is_cuda)
            except Exception as error:  # a candidate that does not fit the device fails in many ways
                if is_cuda:
                    torch.cuda.synchronize()
                print(f"    {name} {candidate}: {type(error).__name__}: {error!s:.80}")
        for candidate, seconds in sorted(tried.items(), key=lambda item: item[1])[:4]:
            mark = " <- chosen now" if candidate == (tuple(ours) if ours else None) else ""
            called = "torch alone" if candidate is None else f"SkinnyGemmConfig{candidate}"
            rate = weight.nbytes / seconds / 1e9
            print(f"  {num_tokens:>3} tokens {name:<8} {seconds * 1e6:7.2f} us {rate:5.0f} GB/s {called}{mark}")
        print(end="", flush=True)


def main(
    tokens: Annotated[str, typer.Option(help="Comma-separated numbers of sequences.")] = "1,2,4,6,8,16,32,64,128",
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 256,
    device: Annotated[str | None, typer.Option(help="cuda, or cpu to try this script in Triton's interpreter.")] = None,
    profiled: Annotated[str, typer.Option(help="Numbers of tokens to list the kernels of.")] = "2,8,32,128",
    sweep_tokens: Annotated[str, typer.Option(help="Numbers of tokens to sweep for.")] = "2,8,32",
    sweeps: Annotated[bool, typer.Option("--sweep", help="Try other configurations of the GEMMs.")] = False,
    minutes: Annotated[float, typer.Option(help="Try no other candidates after this long.")] = 3.8,
) -> None:
    """Print microseconds of a layer and its share of the memory bandwidth."""
    deadline = time.monotonic() + 60 * minutes
    where = choose_device(device)
    is_cuda = where.type == "cuda"
    # The interpreter's dot cannot multiply bfloat16.
    config, dtype = (QWEN, torch.bfloat16) if is_cuda else (TINY, torch.float16)
    counts, swept = (
        [int(count) for count in given.split(",") if count] for given in (tokens, sweep_tokens if sweeps else "")
    )
    context, max_blocks = (context, 64) if is_cuda else (20, 4)
    ops.allocate_workspaces(where)
    stack = make_stack(config, 1 + max(*counts, *swept, 1) * -(-context // BLOCK_SIZE), where, dtype)
    read, copy = (read_bandwidth(where), kernels.copy_bandwidth()) if is_cuda else (1e9, 1e9)
    function = torch.compile(run_layers, fullgraph=True) if is_cuda else run_layers
    print(f"reads {read / 1e9:.0f} GB/s, copies {copy / 1e9:.0f} GB/s (read and written)")
    with torch.inference_mode():
        for count in counts:
            if time.monotonic() > deadline:
                print(f"{count} tokens and more: no time left")
                break
            step = make_step(stack, count, context, max_blocks)
            weights = sum(matrix.nbytes for matrix in stack.matrices(0).values())
            moved = weights + 4 * count * context * config.num_kv_heads * config.head_dim
            for tensor in (step.x, *step.batch[:6], *step.rotation):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            run = partial(function, stack, step)
            run()  # compile
            seconds = seconds_of_graph([run], is_cuda) / config.num_layers
            rate = moved / seconds
            print(
                f"{count:>3} tokens {seconds * 1e6:8.2f} us a layer {rate / 1e9:6.0f} GB/s"
                f" {rate / read:6.1%} of reading {rate / copy:6.1%} of copying",
                flush=True,
            )
            if is_cuda and str(count) in profiled.split(","):
                listed = profile(run, config.num_layers)
                print(f"    {sum(time for _, time in listed):.1f} us in {len(listed)} kernels a layer")
                print("\n".join(f"      {microseconds:7.2f} us {kernel[:90]}" for kernel, microseconds in listed))
        for count in swept:
            sweep(stack, make_step(stack, count, context, max_blocks), deadline)


if __name__ == "__main__":
    typer.run(main)
