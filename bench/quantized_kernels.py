"""Time linear layers with int4 and int8 weights on a CUDA device, over configurations of their kernel.

    python -m dispec.bench.quantized_kernels --minutes 4 --output sweep.jsonl

Prints for each shape the fastest configurations, beside torch's GEMM of the bf16 weight and what the tables choose, the
most important shapes first. Timed inside a CUDA graph, over enough weights that none is still in the L2 cache.
Processes compile the configurations beforehand, which would take most of the time.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from dispec.bench.kernels import COLD_BYTES, seconds_per_call
from dispec.ops.norm import Norm
from dispec.ops.quantization import Kind
from dispec.ops.triton import quantized_linear as kernel
from dispec.ops.triton.gemm_tuning import QuantizedGemmConfig, choose_quantized_linear
from dispec.ops.triton.quantized_layout import CODES, block_words
from dispec.ops.triton.quantized_linear import quantized_linear
from dispec.ops.triton.tuning import describe

# Output features, columns, whether half of the features gate the others.
Shape = tuple[int, int, bool]
MODELS: dict[str, dict[str, Shape]] = {
    "qwen2.5-7b": {
        "gate_up": (37888, 3584, True),
        "down": (3584, 18944, False),
        "qkv": (4608, 3584, False),
        "output": (3584, 3584, False),
        "head": (152064, 3584, False),
    },
    "qwen2.5-1.5b": {
        "gate_up": (17920, 1536, True),
        "down": (1536, 8960, False),
        "qkv": (2048, 1536, False),
        "output": (1536, 1536, False),
        "head": (151936, 1536, False),
    },
}


class Case(NamedTuple):
    model: str
    name: str
    kind: Kind
    group: int
    tokens: int

    @property
    def shape(self) -> Shape:
        return MODELS[self.model][self.name]


def cases() -> Iterator[Case]:
    """Yield what to time, the most important first."""
    big, small = MODELS
    layer = ("gate_up", "down", "qkv", "output")
    for tokens in (1, 32, 16, 64, 8):
        yield from (Case(big, name, "int4", 128, tokens) for name in layer)
    yield from (Case(big, "head", "int8", 128, tokens) for tokens in (1, 32))
    for tokens in (1, 32, 8):
        yield from (Case(small, name, "int4", 128, tokens) for name in layer)
    for tokens in (1, 32):
        yield from (Case(big, name, "int8", 128, tokens) for name in layer)
        yield from (Case(big, name, "int4", 32, tokens) for name in layer)
    for tokens in (1, 32, 8, 2048, 256, 16, 64, 4, 2):
        for kind, group in (("int4", 128), ("int8", 128), ("int4", 32)):
            for model in MODELS:
                yield from (Case(model, name, kind, group, tokens) for name in MODELS[model])  # type: ignore[arg-type]


def candidates(case: Case, multiprocessors: int) -> list[QuantizedGemmConfig]:
    """Return the configurations to try."""
    features, columns, _ = case.shape
    words = block_words(case.kind, case.group, columns)
    blocks = -(-columns // (words * CODES[case.kind]))
    if case.tokens > 64:
        wide = [(64, 4, 64, 4), (128, 4, 64, 3), (128, 8, 128, 3), (128, 8, 128, 4), (256, 8, 64, 3), (256, 8, 128, 3)]
        return [QuantizedGemmConfig(n, 1, warps, stages, m, 16) for n, warps, m, stages in wide]
    if case.tokens > 32:
        per_device: tuple[int, ...] = (1, 2, 3, 4)
        tiles = [(64, 4, 64, 3), (64, 4, 64, 4), (64, 4, 64, 6), (128, 4, 64, 3), (128, 4, 64, 4), (128, 8, 64, 4)]
    elif case.tokens > 16:
        tiles = [(32, 2, 32, 4), (64, 2, 32, 4), (64, 4, 32, 3), (64, 4, 32, 5), (128, 4, 32, 3), (128, 4, 32, 4)]
        tiles += [(128, 8, 32, 4)]
        per_device = (1, 2, 3, 4, 6)
    else:
        tiles = [(16, 1, 16, 4), (32, 2, 16, 3), (32, 2, 16, 5), (32, 1, 16, 5), (64, 2, 16, 3), (64, 2, 16, 5)]
        tiles += [(64, 4, 16, 3), (64, 4, 16, 5), (128, 4, 16, 4)]
        per_device = (2, 4, 6, 8, 12)
    found: dict[QuantizedGemmConfig, None] = {}
    for n, warps, m, stages in tiles:
        rows = -(-features // n)
        for programs in per_device:
            splits = min(max(round(programs * multiprocessors / rows), 1), 12, max(blocks // 2, 1))
            splits = -(-blocks // -(-blocks // splits))
            if splits == 1 or rows <= 4096:
                found[QuantizedGemmConfig(n, splits, warps, stages, m, 8)] = None
    return list(found)


def make_weights(case: Case, copies: int) -> list[tuple[Tensor, Tensor]]:
    """Return words and scales of weights with random codes."""
    features, columns, _ = case.shape
    words = block_words(case.kind, case.group, columns)
    rows, blocks = -(-features // 16), -(-columns // (words * CODES[case.kind]))
    made = []
    for _ in range(copies):
        codes = torch.randint(-(2**15), 2**15, (rows, blocks, 16, words), dtype=torch.int16, device="cuda")
        scales = torch.rand(-(-columns // case.group), rows * 16, device="cuda").half() / 100
        made.append((codes, scales))
    return made


def call(
    case: Case, config: QuantizedGemmConfig | None, x: Tensor, words: Tensor, scales: Tensor, norm: Norm | None = None
) -> Tensor:
    features, _, is_gated = case.shape
    return quantized_linear(x, words, scales, None, features, case.kind, case.group, None, norm, None, is_gated, config)


def compile_share(index: int, count: int) -> None:
    """Compile every `count`-th configuration, which the other processes then find on the disk."""
    multiprocessors = describe(torch.device("cuda", torch.cuda.current_device())).multiprocessors
    seen = set()
    position = 0
    for case in cases():
        _, columns, is_gated = case.shape
        for config in candidates(case, multiprocessors):
            key = (case.kind, case.group, is_gated, max(min(case.tokens, config.block_m), 8), config)
            if key in seen:
                continue
            seen.add(key)
            position += 1
            if position % count != index:
                continue
            x = torch.empty(case.tokens, columns, dtype=torch.bfloat16, device="cuda")
            try:
                call(case, config, x, *make_weights(case, 1)[0])
            except Exception as error:
                print(f"{case} {config}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)


def time_case(case: Case, deadline: float) -> dict[str, object]:
    """Return microseconds of the configurations, of torch's GEMM and of what the table chooses."""
    features, columns, _ = case.shape
    device = describe(torch.device("cuda", torch.cuda.current_device()))
    size = features * columns // (2 if case.kind == "int4" else 1)
    weights = make_weights(case, max(2, min(48, COLD_BYTES // size)))
    x = torch.randn(case.tokens, columns, dtype=torch.bfloat16, device="cuda")

    def microseconds(config: QuantizedGemmConfig | None) -> float:
        calls = [partial(call, case, config, x, *weight) for weight in weights]
        repeats = 1 if case.tokens > 64 else 24 // len(calls) + 1
        return seconds_per_call(calls * repeats, 3) * 1e6

    timed = []
    for config in candidates(case, device.multiprocessors):
        if time.monotonic() > deadline:
            break
        try:
            timed.append((microseconds(config), config))
        except Exception as error:
            print(f"{case} {config}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
    timed.sort()
    dequantized = {}
    for mebibytes in (64, 192, 512) if case.tokens > 32 else ():
        kernel.DEQUANTIZED_BYTES = mebibytes * 2**20
        dequantized[mebibytes] = round(microseconds(QuantizedGemmConfig(0, 1, 4, 1)), 2)
    chosen = choose_quantized_linear(device, case.tokens, features, columns, case.kind)
    table = microseconds(None)
    normed = None
    if case.tokens == 1 and columns == MODELS[case.model]["qkv"][1]:
        norm = Norm(torch.ones(columns, dtype=torch.bfloat16, device="cuda"), 1e-6)
        calls = [partial(call, case, None, x, *weight, norm) for weight in weights]
        normed = round(seconds_per_call(calls * (24 // len(calls) + 1), 3) * 1e6, 2)
    del weights
    plain = [torch.randn(features, columns, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    by_torch = seconds_per_call([partial(torch.nn.functional.linear, x, weight) for weight in plain] * 4, 3) * 1e6
    best = timed[0][0] if timed else table
    return {
        **case._asdict(),
        "us": round(best, 2),
        "GB/s": round(size / best / 1e3),
        "torch_bf16_us": round(by_torch, 2),
        "dequantized_us": dequantized,
        "table_us": round(table, 2),
        "table_with_norm_us": normed,
        "table": list(chosen),
        "best": [[round(duration, 2), list(config)] for duration, config in timed[:6]],
    }


def main(
    minutes: Annotated[float, typer.Option(help="Stop after so many minutes.")] = 4.0,
    output: Annotated[Path | None, typer.Option(help="File for JSON lines.")] = None,
    processes: Annotated[int, typer.Option(help="Processes that compile.")] = max((os.cpu_count() or 2) - 2, 1),
    only: Annotated[str, typer.Option(help="Time cases with these words alone, such as 'int4 down'.")] = "",
    share: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Sweep the configurations of quantised linear layers."""
    if share >= 0:
        compile_share(share, processes)
        return
    deadline = time.monotonic() + 60 * minutes
    command = [sys.executable, "-m", "dispec.bench.quantized_kernels", "--processes", str(processes), "--share"]
    compiling = [subprocess.Popen([*command, str(index)]) for index in range(processes)]
    for process in compiling:
        try:
            process.wait(max(deadline - 60 * minutes * 0.6 - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()  # they would disturb the timing; what is missing is compiled as it is timed
    seen = set()
    for case in cases():
        words = f" {' '.join(map(str, case))} "
        if case in seen or any(f" {word} " not in words for word in only.split()):
            continue
        if time.monotonic() > deadline:
            break
        seen.add(case)
        line = time_case(case, deadline)
        print(json.dumps(line), flush=True)
        if output is not None:
            with output.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    typer.run(main)
