"""The C++ thread pool: the same bits with any number of threads, from concurrent callers, and after a fork."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dispec import ops
from dispec.ops.cpu.library import has_packed_linear

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
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _LINEAR, argument],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


def test_any_number_of_threads_and_a_forked_process_give_the_same_bits():
    alone = _digest("1")
    assert [_digest(argument) for argument in ("2", "7", "fork")] == [alone] * 3


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
