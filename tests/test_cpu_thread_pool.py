"""The C++ thread pool: the same bits with any number of threads, from concurrent callers, and after a fork.

Also how it divides work, and that its threads sleep when there is none.
"""

import ctypes
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dispec import ops
from dispec.layers.config import ModelConfig
from dispec.layers.decoding import build_decoder
from dispec.layers.steps import Vocabulary
from dispec.layers.types import KVCache
from dispec.layers.weights import dummy_weights
from dispec.ops.cpu.library import has_packed_linear, kernel

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not has_packed_linear(), reason="this CPU has neither AVX512-BF16 nor AVX2")

# Prints a digest of a linear layer of many tiles, computed by the given number of threads or in a forked process.
_LINEAR = """
import hashlib, os, sys, torch
from dispec import ops
torch.manual_seed(0)
x, weight = torch.randn(5, 200).bfloat16(), ops.pack(torch.randn(3000, 200).bfloat16())
def digest():
    return hashlib.sha256(ops.linear(x, weight).float().numpy().tobytes()).hexdigest()
if sys.argv[1] == "fork":
    digest()
    if (child := os.fork()) == 0:
        print(digest(), flush=True)
        os._exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
torch.set_num_threads(int(sys.argv[1]))
for _ in range(50):
    first = digest()
print(first)
"""


def _digest(argument: str) -> str:
    return _output(_LINEAR, argument)


def _output(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


def test_any_number_of_threads_and_a_forked_process_give_the_same_bits():
    alone = _digest("1")
    assert [_digest(argument) for argument in ("2", "7", "16", "fork")] == [alone] * 4


def test_concurrent_callers_get_the_same_bits():
    torch.manual_seed(1)
    weights = [torch.randn(features, 64).bfloat16() for features in (100, 640, 2000)]
    inputs = [torch.randn(rows, 64).bfloat16() for rows in (1, 3, 40)]
    packed = [ops.pack(weight) for weight in weights]
    cases = [(x, weight) for x in inputs for weight in packed]
    expected = [ops.linear(x, weight) for x, weight in cases]
    for (x, _), weight, result in zip(cases, weights * 3, expected, strict=True):
        torch.testing.assert_close(result.float(), x.float() @ weight.float().T, atol=0.2, rtol=0.02)

    def all_are_right(_: int) -> bool:
        return all(torch.equal(ops.linear(*case), result) for case, result in zip(cases, expected, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(all_are_right, range(40)))


# A step has more phases than the pool runs at once.
_CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=160,
    intermediate_size=96,
    num_layers=60,
    num_heads=6,
    num_kv_heads=3,
    head_dim=32,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
_SEQUENCES, _BLOCK_SIZE = 5, 16


@pytest.fixture
def any_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("any_threads")
def test_a_step_of_many_phases_has_the_same_bits_with_more_threads_than_cores():
    torch.manual_seed(2)
    weights = dummy_weights(_CONFIG, torch.bfloat16, torch.device("cpu"))
    shape = (_CONFIG.num_layers, _SEQUENCES + 1, _CONFIG.num_kv_heads)
    keys = torch.randn(*shape, _CONFIG.head_dim, _BLOCK_SIZE).bfloat16()
    values = torch.randn(*shape, _BLOCK_SIZE, _CONFIG.head_dim).bfloat16()
    decoder = build_decoder(weights, _CONFIG, Vocabulary(_CONFIG.vocab_size), KVCache(keys, values))
    assert decoder is not None
    x, angles = torch.randn(_SEQUENCES, _CONFIG.hidden_size).bfloat16(), torch.randn(_SEQUENCES, 16)
    blocks = torch.arange(1, _SEQUENCES + 1, dtype=torch.int32)
    slots, lengths = blocks * _BLOCK_SIZE + 11, torch.full((_SEQUENCES,), 12, dtype=torch.int32)
    starts = torch.arange(_SEQUENCES + 1, dtype=torch.int32)

    def step(threads: int) -> tuple[torch.Tensor, ...]:
        torch.set_num_threads(threads)
        rotation = (angles.cos(), angles.sin())
        out = ops.decoder_layers(decoder, x, rotation, slots, blocks[:, None], starts, lengths)
        return out, keys.clone(), values.clone()

    alone = step(1)
    assert alone[0].isfinite().all()
    # Phases are numbered from a little below 2^32 on: the numbers wrap around within these steps.
    for threads in (16, 2, 16, 8, 3):
        for _ in range(4):
            for one, other in zip(step(threads), alone, strict=True):
                assert torch.equal(one.view(torch.int16), other.view(torch.int16)), threads


def _ranges(count: int, most_threads: int) -> list[int]:
    """The first element of each thread's range, and `count`."""
    out = (ctypes.c_int64 * 300)()
    kernel("divide")(count, most_threads, out)
    return list(out[1 : out[0] + 2])


@pytest.mark.parametrize("count", [1, 2, 3, 15, 18, 30, 48, 97, 1536, 65535, 65536, 1_000_000])
@pytest.mark.parametrize("most_threads", [*range(1, 17), 64, 1000])
def test_ranges_cover_all_and_are_as_short_as_can_be(count: int, most_threads: int):
    begins = _ranges(count, most_threads)
    sizes = [end - begin for begin, end in itertools.pairwise(begins)]
    assert begins[0] == 0
    assert begins[-1] == count
    assert min(sizes) > 0
    # Elements come in units, of which a phase has at most 65,535.
    unit, threads = math.ceil(count / 65535), min(most_threads, 256)
    shortest = math.ceil(math.ceil(count / unit) / threads)
    assert max(sizes) <= shortest * unit
    assert len(sizes) <= threads
    assert len(sizes) == 1 or math.ceil(math.ceil(count / unit) / (len(sizes) - 1)) > shortest  # no thread too many


# Products of a layer, as tiles and bytes of a tile by 64: qkv, output, gate and up, down. Then the least share of the
# threads' time that is work, with 1 to 16 threads, if all bytes take as long.
_LAYERS = {
    "SmolLM2-135M": ([(30, 576), (18, 576), (48, 1152), (18, 1536)], 0.73),
    "Qwen2.5-0.5B": ([(36, 896), (28, 896), (152, 1792), (28, 4864)], 0.86),
    "Qwen2.5-1.5B": ([(64, 1536), (48, 1536), (280, 3072), (48, 8960)], 0.90),
    "Qwen2.5-7B": ([(144, 3584), (112, 3584), (592, 7168), (112, 18944)], 0.96),
}


@pytest.mark.parametrize("name", _LAYERS)
@pytest.mark.parametrize("most_threads", range(1, 17))
def test_the_longest_range_bounds_the_imbalance_of_a_layer(name: str, most_threads: int):
    products, least = _LAYERS[name]
    taken = ideal = 0.0
    for tiles, size in products:
        begins = _ranges(tiles, most_threads)
        taken += max(end - begin for begin, end in itertools.pairwise(begins)) * size
        ideal += tiles * size / most_threads
    assert least <= ideal / taken <= 1


# Prints the number of threads once all but the main one sleep; ends with an error if that takes 30 s.
_IDLE = """
import os, time, torch
from dispec import ops
from dispec.ops.cpu.library import kernel
torch.set_num_threads(8)
x, weight = torch.randn(5, 200).bfloat16(), ops.pack(torch.randn(3000, 200).bfloat16())
for _ in range(20):
    ops.linear(x, weight)
def states():
    own = str(os.getpid())
    tasks = [task for task in os.listdir("/proc/self/task") if task != own]
    return [open(f"/proc/self/task/{task}/stat").read().rpartition(")")[2].split()[0] for task in tasks]
deadline = time.monotonic() + 30
while set(found := states()) != {"S"}:
    assert time.monotonic() < deadline, found
print(len(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_sleep_when_there_is_no_work():
    assert int(_output(_IDLE)) >= 7
