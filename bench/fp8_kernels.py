"""Time linear layers in e4m3 on a CUDA device: candidates for `ops.triton.tuning`, beside torch in e4m3 and bfloat16.

    python -m dispec.bench.fp8_kernels --minutes 3 > fp8.jsonl

Timed inside a CUDA graph, over enough weights that none is still in the L2 cache. A line of JSON for each timing:
`us` is microseconds of one call, `gbps` the weight's bytes over them. `op` is the whole layer with its norm, rounding,
gate and residual, as the table launches it; the others are GEMMs alone.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer
from torch import Tensor

from dispec.bench.kernels import COLD_BYTES, seconds_per_call
from dispec.ops.norm import Norm


class Layer(NamedTuple):
    """A linear layer: N and K of its weight, and what is around it."""

    out_features: int
    in_features: int
    has_norm: bool = False
    has_bias: bool = False
    is_gated: bool = False


# Qwen2.5-7B
LAYERS = {
    "qkv": Layer(4608, 3584, has_norm=True, has_bias=True),
    "output": Layer(3584, 3584),
    "gate_up": Layer(37888, 3584, has_norm=True, is_gated=True),
    "down": Layer(3584, 18944),
    "head": Layer(152064, 3584, has_norm=True),
}
MAX_SWEPT_TOKENS = 256


def candidates(layer: Layer) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield configurations: block_n, block_k, splits, num_warps, num_stages."""
    if layer.out_features > 16384:
        yield from ((64, 128, 1, 4, stages) for stages in (4, 6))
        yield from ((64, 256, 1, 4, stages) for stages in (3, 4))
        yield from ((128, 128, 1, 4, stages) for stages in (3, 4, 5, 6))
        yield from ((128, 256, 1, 4, stages) for stages in (2, 3))
        yield from ((128, 128, 1, 8, 4), (128, 256, 1, 8, 3), (256, 128, 1, 8, 3))
        return
    for splits in (1, 2, 3, 4, 5, 6, 8):
        yield from ((64, 128, splits, 4, stages) for stages in (4, 6))
        yield from ((64, 256, splits, 4, stages) for stages in (3, 4))
        if splits % 2 == 0:
            yield from ((128, 128, splits, 4, 4), (128, 128, splits, 8, 4), (128, 256, splits, 8, 3))


def block_m(tokens: int) -> int:
    """Return the tokens of a program: steps with the same are compiled once."""
    return min(max(1 << (tokens - 1).bit_length(), 16), 64)


def random_codes(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)


def gemm(codes: Tensor, weight: Tensor, is_gated: bool, config: tuple[Any, ...], scales: tuple[Tensor, Tensor]) -> Any:
    from dispec.ops.triton.fp8_linear import fp8_gemm
    from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig

    return fp8_gemm(codes, scales[0], weight, scales[1], None, None, is_gated, SkinnyGemmConfig(*config))


def compile_candidate(layer: Layer, tokens: int, config: tuple[int, ...]) -> str | None:
    """Compile a candidate into Triton's cache on disk, in a process of its own. Returns what fails, if it does."""
    rows = 2 * config[0] if layer.out_features % config[0] == 0 else layer.out_features
    scales = torch.ones(tokens, device="cuda"), torch.ones(rows, 1, device="cuda")
    weight = torch.zeros(rows, layer.in_features, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    codes = weight[:1].expand(tokens, -1).contiguous()
    try:
        gemm(codes, weight, layer.is_gated, config, scales)
    except Exception as error:  # shared memory that the device lacks
        return f"{error!r:.200}"
    return None


def compile_operations(layer: Layer, tokens: int) -> str | None:
    """Do as `compile_candidate` for what `operations` yields."""
    weight = torch.zeros(layer.out_features, layer.in_features, device="cuda", dtype=torch.float8_e4m3fn)
    try:
        for _, call in operations(layer, tokens):
            call(weight=weight)
    except Exception as error:
        return f"{error!r:.200}"
    return None


def compile_all(layers: dict[str, Layer], tokens: list[int], sweep: bool, processes: int) -> set[Any]:
    """Compile what is timed, with `sweep` the candidates too.

    Returns the candidates that fail, as the name of their layer, block_m and configuration.
    """
    failed: set[Any] = set()
    blocks = sorted({block_m(count) for count in tokens if count <= MAX_SWEPT_TOKENS})
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        compiling: dict[Any, Any] = {
            pool.submit(compile_operations, layer, count): (name, count)
            for (name, layer), count in itertools.product(layers.items(), tokens)
        }
        compiling |= {
            pool.submit(compile_candidate, layer, block, config): (name, block, config)
            for name, layer in (layers.items() if sweep else ())
            for block, config in itertools.product(blocks, candidates(layer))
        }
        for future in as_completed(compiling):
            if error := future.result():
                failed.add(compiling[future])
                print(json.dumps({"failed": compiling[future], "error": error}), file=sys.stderr, flush=True)
    return failed


def over_weights(call: Callable[..., object], weights: list[Tensor]) -> float:
    """Return seconds of one call, over all the weights in turn."""
    calls = [partial(call, weight=weight) for weight in weights]
    return seconds_per_call(calls * (24 // len(calls) + 1))


def operations(layer: Layer, tokens: int) -> Iterator[tuple[str, Callable[..., object]]]:
    """Yield what is timed beside the candidates, as functions of the weight: torch's GEMM, and the op in variants."""
    from dispec.ops.triton import fp8_linear as kernels

    out_features, in_features = layer.out_features, layer.in_features
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    scales = torch.ones(out_features, 1, device="cuda")
    norm = Norm(torch.ones_like(x[0]), 1e-6) if layer.has_norm else None
    around: dict[str, Any] = {
        "bias": torch.randn(out_features, device="cuda", dtype=torch.bfloat16) if layer.has_bias else None,
        "norm": norm,
        "residual": x.new_zeros(tokens, out_features) if norm is None else None,
        "is_gated": layer.is_gated,
    }

    def variant(name: str, value: int, call: Callable[..., object], weight: Tensor) -> object:
        with mock.patch.object(kernels, name, value):
            return call(weight=weight)

    codes, row_scales = kernels.round_rows(x, norm)
    op = partial(kernels.fp8_linear, x, scales=scales, **around)
    yield "op", op
    if tokens <= 64:
        for size in (0, 256, 512, 1024):
            yield f"op prefetched={size}", partial(variant, "PREFETCHED_BYTES", size, op)
    for elements in (256, 512, 1024, 2048):
        rounding = partial(variant, "ELEMENTS_PER_WARP", elements, lambda weight: kernels.round_rows(x, norm))
        yield f"round_rows {elements}", rounding
    for is_fast in (False, True):
        multiply = partial(kernels.scaled_mm, codes, row_scales, scales=scales, use_fast_accum=is_fast)
        yield f"scaled_mm fast={is_fast}", multiply


def main(
    tokens: Annotated[str, typer.Option(help="Comma-separated numbers of tokens.")] = "1,32,8,64,2048,256",
    layers: Annotated[str, typer.Option(help="Comma-separated, of " + ", ".join(LAYERS))] = ",".join(LAYERS),
    minutes: Annotated[float, typer.Option(help="Time limit; what is left then is not timed.")] = 5.0,
    sweep: Annotated[bool, typer.Option(help="Try candidates.")] = True,
    processes: Annotated[int, typer.Option(help="Processes that compile candidates.")] = 8,
) -> None:
    """Print a line of JSON for each timing, and the best candidates at the end of each layer and number of tokens."""
    end = time.monotonic() + 60 * minutes
    chosen = {name: LAYERS[name] for name in layers.split(",")}
    counts = [int(count) for count in tokens.split(",")]
    failed = compile_all(chosen, counts, sweep, processes)
    for count, (name, layer) in itertools.product(counts, chosen.items()):
        size = layer.out_features * layer.in_features
        weights = [random_codes(layer.out_features, layer.in_features) for _ in range(max(2, COLD_BYTES // size))]
        scales = torch.ones(count, device="cuda"), torch.ones(layer.out_features, 1, device="cuda")
        codes = random_codes(count, layer.in_features)

        def report(what: Any, seconds: float, count: int = count, name: str = name, size: int = size) -> None:
            line = {"tokens": count, "layer": name, "what": what}
            line |= {"us": round(seconds * 1e6, 2), "gbps": round(size / seconds / 1e9)}
            print(json.dumps(line), flush=True)

        for what, call in operations(layer, count):
            try:
                report(what, over_weights(call, weights))
            except RuntimeError as error:  # e.g. a torch without the GEMM
                print(json.dumps({"tokens": count, "layer": name, "what": what, "error": f"{error!r:.200}"}))
        wide = [torch.randn(*weights[0].shape, device="cuda", dtype=torch.bfloat16) for _ in weights[:3]]
        x = torch.randn(count, layer.in_features, device="cuda", dtype=torch.bfloat16)
        report("bfloat16", over_weights(partial(torch.nn.functional.linear, x), wide))
        times = []
        for config in candidates(layer) if sweep and count <= MAX_SWEPT_TOKENS else ():
            if time.monotonic() > end:
                break
            if (name, block_m(count), config) not in failed:
                call = partial(gemm, codes, is_gated=layer.is_gated, config=config, scales=scales)
                times.append((over_weights(call, weights), config))
        for seconds, config in sorted(times)[:6]:
            report(config, seconds)
        if time.monotonic() > end:
            break


if __name__ == "__main__":
    typer.run(main)
