"""Time the kernels on a CUDA device, and sweep the launch configurations of those in Triton.

    python -m dispec.bench.kernels            # the configurations in the tables of ops.triton.tuning; ops.cuda beside
    python -m dispec.bench.kernels --sweep    # candidate configurations; prints lines to copy into the tables
    python -m dispec.bench.kernels --caches   # decode over caches in bfloat16, int8 and e4m3 beside each other

--sweep takes --cache-dtype int8 or e4m3.

Calls are timed inside a CUDA graph, as the engine runs them, decode over enough copies of the KV cache that none is
still in the L2 cache. GB/s counts the keys and values of the contexts (for writes the tokens' keys and values, read and
written) and is compared with a device-to-device copy, counted both ways.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import Tensor

from dispec import ops
from dispec.ops.kv_cache import LARGEST_CODE, scale_rows

CACHE_DTYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
COLD_BYTES = 256 * 2**20  # of KV cache or weights to read before the same again: several L2 caches


class Geometry(NamedTuple):
    name: str
    heads: int
    kv_heads: int
    head_dim: int


GEOMETRIES = [
    Geometry("qwen2.5-0.5b", 14, 2, 64),
    Geometry("qwen2.5-1.5b", 12, 2, 128),
    Geometry("llama-3.1-8b", 32, 8, 128),
]
SWEPT = {64: GEOMETRIES[0], 128: GEOMETRIES[1], 256: Geometry("gemma-2-9b", 16, 8, 256)}

# Name, context of each sequence, queries of each sequence.
CACHE_GEOMETRIES = [GEOMETRIES[1], Geometry("qwen2.5-7b", 28, 4, 128)]
CACHE_STEPS = [("1 x 32k", [32768]), ("8 x 8k", [8192] * 8), ("64 x 1k", [1024] * 64)]
DECODE_STEPS = [
    ("1 x 1k", [1024], 1),
    ("1 x 32k", [32768], 1),
    ("32 x 1k", [1024] * 32, 1),
    ("256 x 1k", [1024] * 256, 1),
    ("31 x 1k, 1 x 32k", [32768] + [1024] * 31, 1),
    ("1 x 8k, verify 5", [8192], 5),
    ("32 x 1k, verify 5", [1024] * 32, 5),
]
PREFILL_STEPS = [
    ("2k", [2048], [2048]),
    ("8k", [8192], [8192]),
    ("16 x 128", [128] * 16, [128] * 16),
    ("512 after 16k", [16384 + 512], [512]),
    ("2k after 30k", [32768], [2048]),
    ("2k and 64 decodes", [2048] + [1024] * 64, [2048] + [1] * 64),
]


class Step(NamedTuple):
    """The arguments of a call of `ops.paged_attention`, with several copies of the KV cache."""

    query: Tensor
    caches: list[tuple[Tensor, Tensor]]
    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor
    cache_bytes: int
    operations: int


def make_step(
    geometry: Geometry,
    contexts: list[int],
    lengths: list[int],
    block_size: int,
    dtype: torch.dtype,
    cold: bool,
    cache_dtype: torch.dtype | None = None,
) -> Step:
    """Make the arguments of a step, with random keys and values, or random codes that stand for numbers of their size.

    cold: with so many copies of the cache that none is in the L2 cache.
    """
    _, heads, kv_heads, head_dim = geometry
    needed = [math.ceil(context / block_size) for context in contexts]
    num_blocks = sum(needed) + 1
    shuffled = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(0)) + 1).split(needed)
    tables = torch.nn.utils.rnn.pad_sequence(list(shuffled), batch_first=True).to(torch.int32).cuda()
    cache_dtype = cache_dtype or dtype
    rows_of_page = head_dim + scale_rows(cache_dtype)
    cache_bytes = sum(contexts) * kv_heads * rows_of_page * 2 * cache_dtype.itemsize
    copies = min(max(COLD_BYTES // cache_bytes, 2), 64) if cold else 1
    caches = []
    for _ in range(copies):
        if cache_dtype in LARGEST_CODE:
            pages = torch.randint(0x70, (2, num_blocks, kv_heads, rows_of_page, block_size), device="cuda")
            pages = pages.to(torch.uint8)
            pages.flatten(3)[..., head_dim * block_size :].copy_(torch.tensor([0, 0, 0, 60]).repeat(block_size))
            keys, values = pages.view(cache_dtype)
        else:
            keys, values = torch.randn(2, num_blocks, kv_heads, head_dim, block_size, dtype=dtype, device="cuda")
        caches.append((keys, values.view(num_blocks, kv_heads, block_size, rows_of_page)))
    rows = torch.randn(sum(lengths), heads + 2 * kv_heads, head_dim, dtype=dtype, device="cuda")
    visible = sum(
        length * (context - length) + length * (length + 1) // 2
        for context, length in zip(contexts, lengths, strict=True)
    )
    return Step(
        query=rows[:, :heads],
        caches=caches,
        block_tables=tables,
        query_start=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda"),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        cache_bytes=cache_bytes,
        operations=4 * heads * head_dim * visible,
    )


def seconds_per_call(calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
    """Return seconds of one call: the median over replays of a CUDA graph of all calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / len(calls))
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """Return bytes per second of a large device-to-device copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_per_call([lambda: target.copy_(source)] * 4)


def time_decode(step: Step, query_len: int, config: object = None) -> float:
    from dispec.ops.triton.decode_attention import decode
    from dispec.ops.triton.tuning import DecodeConfig

    assert config is None or isinstance(config, DecodeConfig)
    scale = step.query.shape[2] ** -0.5

    def call(keys: Tensor, values: Tensor) -> Tensor:
        return decode(step.query, keys, values, step.block_tables, step.context_lens, query_len, scale, config=config)

    return seconds_per_call([partial(call, *pair) for pair in step.caches] * (40 // len(step.caches) + 1))


def time_caches(block_sizes: list[int], dtype: torch.dtype) -> None:
    """Time decode over each dtype of the cache; print also how much faster than with that of the model it is."""
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s (read and written)")
    for geometry, block_size, (name, contexts) in itertools.product(CACHE_GEOMETRIES, block_sizes, CACHE_STEPS):
        plain = 0.0
        for cache_dtype in (dtype, *CACHE_DTYPES.values()):
            step = make_step(geometry, contexts, [1] * len(contexts), block_size, dtype, True, cache_dtype)
            seconds = time_decode(step, 1)
            plain = plain or seconds
            title = f"{geometry.name} BS={block_size} {name} {str(cache_dtype).removeprefix('torch.')}"
            report(f"{title} ({plain / seconds:.2f} x)", seconds, step.cache_bytes, step.operations, copy)


def time_prefill(step: Step, config: object = None) -> float:
    from dispec.ops.triton.prefill_attention import prefill
    from dispec.ops.triton.tuning import PrefillConfig

    assert config is None or isinstance(config, PrefillConfig)
    (keys, values), scale = step.caches[0], step.query.shape[2] ** -0.5
    return seconds_per_call(
        [
            lambda: prefill(
                step.query, keys, values, step.block_tables, step.query_start, step.context_lens, scale, config
            )
        ]
        * 8
    )


def time_hopper_prefill(step: Step) -> float | None:
    """Return what `time_prefill` does for the kernel of `ops.cuda`, None where it does not run."""
    from dispec.ops.cuda.prefill_attention import has_kernel, prefill

    (keys, values), scale = step.caches[0], step.query.shape[2] ** -0.5
    if not has_kernel(step.query, keys, values):
        return None
    arguments = (step.query, keys, values, step.block_tables, step.query_start, step.context_lens, scale)
    return seconds_per_call([partial(prefill, *arguments)] * 8)


def report(name: str, seconds: float, moved: float, operations: float, copy: float) -> None:
    print(
        f"{name:<56} {seconds * 1e6:9.1f} us {moved / seconds / 1e9:8.0f} GB/s {moved / seconds / copy:6.1%} of copy"
        f" {operations / seconds / 1e12:7.1f} TFLOP/s",
        flush=True,
    )


def time_tables(block_sizes: list[int], dtype: torch.dtype) -> None:
    from dispec.ops.triton.kv_cache import write_kv

    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s (read and written)")
    for geometry, block_size in itertools.product(GEOMETRIES, block_sizes):
        title = f"{geometry.name} BS={block_size}"
        for name, contexts, query_len in DECODE_STEPS:
            step = make_step(geometry, contexts, [query_len] * len(contexts), block_size, dtype, cold=True)
            seconds = time_decode(step, query_len)
            report(f"{title} decode {name}", seconds, step.cache_bytes, step.operations, copy)
        for name, contexts, lengths in PREFILL_STEPS:
            step = make_step(geometry, contexts, lengths, block_size, dtype, cold=False)
            times = {"": time_prefill(step), ", CUDA C++": time_hopper_prefill(step)}
            for kernel, taken in times.items():
                if taken is not None:
                    report(f"{title} prefill {name}{kernel}", taken, step.cache_bytes, step.operations, copy)
        for tokens in (1, 32, 256, 8192):
            rows = torch.randn(tokens, 3, geometry.kv_heads, geometry.head_dim, device="cuda").to(dtype)
            (keys, values), slots = step.caches[0], torch.arange(tokens, device="cuda") % (step.caches[0][0].shape[0])
            slots = slots * block_size if tokens <= 256 else torch.arange(tokens, device="cuda")
            slots %= keys.shape[0] * block_size

            def write(keys: Tensor = keys, values: Tensor = values, rows: Tensor = rows, at: Tensor = slots) -> None:
                write_kv(keys, values, rows[:, 1], rows[:, 2], at)

            moved = 4 * rows[:, 1:].nbytes // 2
            report(f"{title} write {tokens}", seconds_per_call([write] * 20), moved, 0, copy)
    step = make_step(GEOMETRIES[0], [32], [1], 16, dtype, cold=False)
    paths: list[tuple[str, int | None]] = [("decode", 1), ("ragged", None)]
    for name, uniform in paths:
        arguments = (step.query, *step.caches[0], step.block_tables, step.query_start, step.context_lens, uniform, 0.1)
        ops.paged_attention(*arguments)  # compiles
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(200):
            ops.paged_attention(*arguments)
        end.record()
        end.synchronize()
        print(f"launched eagerly, a tiny {name} step takes {begin.elapsed_time(end) / 200 * 1e3:.1f} us")


def candidates(path: str, head_dim: int) -> list[tuple[int, ...]]:
    """Return configurations to try, without `programs_per_multiprocessor`, which needs no compilation."""
    if path == "decode":
        tiles = {64: (64, 128, 256), 128: (32, 64, 128), 256: (16, 32, 64)}[head_dim]
        return list(itertools.product(tiles, (4, 8), (3, 5, 7)))
    blocks = {64: (64, 128), 128: (32, 64, 128), 256: (32, 64)}[head_dim]
    wide: list[tuple[int, ...]] = list(itertools.product((128,), blocks, (4, 8), (3, 5)))
    narrow = itertools.product((64,), blocks, (4,), (3, 5))
    return [*wide, *narrow, (32, 64, 4, 5), (16, 64, 4, 5)]


def sweep_steps(
    path: str, head_dim: int, block_size: int, dtype: torch.dtype, cache_dtype: torch.dtype | None, tiny: bool
) -> list[tuple[str, Step]]:
    geometry = SWEPT[head_dim]
    if path == "decode":
        shapes = [(name, contexts, [1] * len(contexts)) for name, contexts, _ in DECODE_STEPS[1:4]]
        if tiny:
            # A block table of the first step's length, so that the same kernels are compiled.
            shapes = [("", [32768], [1])]
    else:
        shapes = [*PREFILL_STEPS[:2], PREFILL_STEPS[3], ("16 x 20", [20] * 16, [20] * 16)]
        if tiny:
            shapes = [("", [64], [64])]
    return [
        (name, make_step(geometry, contexts, lengths, block_size, dtype, path == "decode" and not tiny, cache_dtype))
        for name, contexts, lengths in shapes
    ]


def run_candidate(path: str, step: Step, candidate: tuple[int, ...]) -> float | None:
    """Return seconds of one call, or None where the candidate does not fit the device."""
    from triton.runtime.errors import OutOfResources

    from dispec.ops.triton.tuning import DecodeConfig, PrefillConfig

    try:
        if path == "decode":
            return time_decode(step, 1, DecodeConfig(*candidate))
        return time_prefill(step, PrefillConfig(*candidate))
    except OutOfResources:
        return None


def compile_candidate(
    path: str,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    candidate: tuple[int, ...],
) -> None:
    """Compile a candidate into Triton's cache on disk, in a process of its own."""
    ((_, step),) = sweep_steps(path, head_dim, block_size, dtype, cache_dtype, tiny=True)
    run_candidate(path, step, candidate)


def sweep(
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    head_dims: list[int],
    paths: list[str],
    processes: int,
) -> None:
    searches = list(itertools.product(paths, head_dims))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        compiling = [
            pool.submit(
                compile_candidate,
                path,
                head_dim,
                block_size,
                dtype,
                cache_dtype,
                (*candidate, 2) if path == "decode" else candidate,
            )
            for path, head_dim in searches
            for candidate in candidates(path, head_dim)
        ]
        for future in as_completed(compiling):
            if error := future.exception():
                print(f"a candidate did not compile: {error!r:.200}")
    for path, head_dim in searches:
        steps = sweep_steps(path, head_dim, block_size, dtype, cache_dtype, tiny=False)
        shapes = candidates(path, head_dim)
        if path == "decode":
            shapes = [(*shape, programs) for shape in shapes for programs in (1, 2, 3, 4)]
        times: dict[tuple[int, ...], list[float]] = {}
        for candidate in shapes:
            measured = [run_candidate(path, step, candidate) for _, step in steps]
            if None not in measured:
                times[candidate] = [seconds for seconds in measured if seconds is not None]
        print(f"\n{path}, padded head dim {head_dim}, {dtype}, cache {cache_dtype or dtype}, BS={block_size}")
        for column, (name, step) in enumerate(steps):
            best = min(times, key=lambda candidate: times[candidate][column])
            seconds = times[best][column]
            print(
                f"  best at {name:<18} {best!s:<20} {seconds * 1e6:8.1f} us"
                f" {step.cache_bytes / seconds / 1e9:6.0f} GB/s {step.operations / seconds / 1e12:6.1f} TFLOP/s"
            )
        overall = sorted(times, key=lambda candidate: math.prod(times[candidate]))
        for candidate in overall[:5]:
            listed = " ".join(f"{seconds * 1e6:8.1f}" for seconds in times[candidate])
            print(f"  best overall {candidate!s:<20} us: {listed}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try candidate configurations")
    parser.add_argument("--caches", action="store_true", help="compare dtypes of the cache")
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="of a sweep; the dtype of the model if not given")
    parser.add_argument("--paths", nargs="+", choices=["decode", "prefill"], default=["decode", "prefill"])
    parser.add_argument("--block-size", type=int, nargs="+", default=[16, 64], help="BS; a sweep takes the first")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--head-dim", type=int, nargs="+", choices=[64, 128, 256], default=[64, 128])
    parser.add_argument("--processes", type=int, default=8, help="processes that compile candidates")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.kernels times CUDA kernels, and there is no CUDA device here.", file=sys.stderr)
        return 1
    dtype = getattr(torch, arguments.dtype)
    if arguments.sweep:
        cache_dtype = CACHE_DTYPES.get(arguments.cache_dtype)
        sweep(arguments.block_size[0], dtype, cache_dtype, arguments.head_dim, arguments.paths, arguments.processes)
    elif arguments.caches:
        time_caches(arguments.block_size, dtype)
    else:
        time_tables(arguments.block_size, dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
