"""GEMMs with packed bf16 weights on a CPU against float64, with the kernels of each instruction set."""

import ctypes
import mmap
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dispec import ops
from tests.instruction_sets import instruction_set  # noqa: F401

pytestmark = pytest.mark.usefixtures("instruction_set")


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm: ops.Norm | None
    residual: Tensor | None
    is_gated: bool

    def run(self, rows: slice = slice(None), packed: Tensor | None = None) -> Tensor:
        residual = None if self.residual is None else self.residual[rows]
        packed = ops.pack(self.weight) if packed is None else packed
        return ops.linear(self.x[rows], packed, self.bias, norm=self.norm, residual=residual, is_gated=self.is_gated)

    def expected(self) -> tuple[Tensor, Tensor]:
        """The result in float64, with the roundings to bfloat16 between operations, and a bound of its error."""
        x = self.x.double()
        if self.norm is not None:
            normed = torch.nn.functional.rms_norm(x, (x.shape[1],), None, self.norm.eps).bfloat16()
            x = (normed * self.norm.weight).double()
        y = x @ self.weight.double().T
        size = x.abs() @ self.weight.double().abs().T
        if self.bias is not None:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        error = size * 1e-5 + y.abs() * 2**-8
        if self.norm is not None:  # a tie of the norm's roundings may fall to the other side
            error = error + size.amax(1, keepdim=True) * 2**-11
        if self.is_gated:
            (gate, up), (gate_error, up_error) = y.chunk(2, -1), error.chunk(2, -1)
            y = torch.nn.functional.silu(gate) * up
            error = up.abs() * (1.2 * gate_error + gate.abs() * 2**-8) + (gate.abs() + gate_error) * up_error
            error = error + y.abs() * 2**-8
        if self.residual is not None:
            y = y + self.residual.double()
            error = error + y.abs() * 2**-8
        return y, error


def make_case(seed: int, rows: int, features: int, columns: int) -> Case:
    """Random options. x is a view into NaN."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    wide = torch.full((rows, columns + 9), torch.nan).bfloat16()
    start = rng.choice([0, 1, 8])
    x = wide[:, start : start + columns]
    x.copy_(torch.randn(rows, columns))
    is_gated = rng.random() < 0.4 and features % 2 == 0
    outputs = features // 2 if is_gated else features
    return Case(
        x,
        (torch.randn(features, columns) / columns**0.5).bfloat16(),
        torch.randn(features).bfloat16() if rng.random() < 0.5 else None,
        ops.Norm(torch.rand(columns).bfloat16(), 1e-5) if rng.random() < 0.5 else None,
        torch.randn(rows, outputs).bfloat16() if rng.random() < 0.5 else None,
        is_gated,
    )


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    features = rng.choice([64, 128, 192, rng.randint(1, 130)])
    return make_case(seed, rng.randint(1, 70), features, rng.choice([32, 64, 96, rng.randint(1, 150)]))


# More rows than are multiplied by all tiles at once, more columns than a block of them, groups of rows that overlap.
LARGE = [(1, 200, 1100), (33, 320, 1056), (47, 70, 1030), (530, 64, 64), (1, 128, 1536)]


def expect(case: Case) -> None:
    found, (expected, error) = case.run().double(), case.expected()
    assert found.isfinite().all()
    excess = (found - expected).abs() / (error + 1e-6)
    assert excess.max() <= 1


@pytest.mark.parametrize("seed", range(60))
def test_products(seed: int) -> None:
    expect(random_case(seed))


@pytest.mark.parametrize(("rows", "features", "columns"), LARGE)
@pytest.mark.parametrize("seed", [1, 2])
def test_large_products(seed: int, rows: int, features: int, columns: int) -> None:
    expect(make_case(seed, rows, features, columns))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("features", "columns"), [(83, 97), (128, 64), (130, 1100)])
@pytest.mark.usefixtures("threads")
def test_a_row_does_not_depend_on_the_others(features: int, columns: int) -> None:
    for seed in range(3):
        case = make_case(seed, 70, features, columns)
        packed = ops.pack(case.weight)
        alone = torch.cat([case.run(slice(row, row + 1), packed) for row in range(70)])
        for rows in (2, 6, 7, 11, 12, 13, 16, 17, 25, 32, 33, 49, 65, 70):
            assert torch.equal(case.run(slice(rows), packed), alone[:rows])
            assert torch.equal(case.run(slice(70 - rows, None), packed), alone[-rows:])


@pytest.mark.parametrize("columns", [1, 15, 33, 46, 64])
def test_a_tile_does_not_read_the_next_one(columns: int) -> None:
    """The tile of 32 outputs before one that is NaN."""
    torch.manual_seed(columns)
    x, weight = torch.randn(20, columns).bfloat16(), torch.randn(64, columns).bfloat16()
    weight[32:] = torch.nan
    found = ops.linear(x, ops.pack(weight))
    torch.testing.assert_close(found[:, :32].double(), x.double() @ weight[:32].double().T, atol=0.02, rtol=2**-7)
    assert found[:, 32:].isnan().all()


@pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs pages that may not be read")
@pytest.mark.parametrize("columns", [32, 33, 63, 96])
def test_what_follows_x_is_not_read(columns: int) -> None:
    """x ends where memory ends: reading further is a segmentation fault."""
    size = 2**16
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    numbers = torch.frombuffer(memory, dtype=torch.bfloat16, count=size // 2)
    weight = torch.randn(70, columns).bfloat16()
    quantized = ops.quantize(weight.float(), ops.Quantization("int8"))
    weights = [(ops.pack(weight), weight.double()), (ops.pack(quantized), quantized.dequantize(torch.float64))]
    for rows in (1, 2, 15, 16, 17, 31, 33, 47, 65, 70):
        x = numbers[-rows * columns :].view(rows, columns).normal_()
        for packed, exact in weights:
            torch.testing.assert_close(ops.linear(x, packed).double(), x.double() @ exact.T, atol=1e-3, rtol=2**-8)


def test_an_odd_row_does_not_depend_on_the_call_before() -> None:
    """Which left NaN in the thread's memory, behind the columns of this call."""
    torch.manual_seed(0)
    weights = [torch.randn(32, columns).bfloat16() for columns in (64, 33)]  # a tile: computed by the calling thread
    ops.linear(torch.full((2, 64), torch.nan).bfloat16(), ops.pack(weights[0]))
    x = torch.randn(2, 33).bfloat16()
    found = ops.linear(x, ops.pack(weights[1]))
    torch.testing.assert_close(found.double(), x.double() @ weights[1].double().T, atol=0.02, rtol=2**-7)
