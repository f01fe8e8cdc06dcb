"""int4 and int8 weights on a CPU against dequantisation and multiplication in float64."""

import random
from typing import NamedTuple

import pytest
import torch

from dispec import ops
from dispec.ops.quantization import MIN_GROUP
from tests.instruction_sets import instruction_set  # noqa: F401

CASES = range(40)
pytestmark = pytest.mark.usefixtures("instruction_set")


class Case(NamedTuple):
    x: torch.Tensor
    weight: ops.QuantizedTensor
    bias: torch.Tensor | None


def make_case(seed: int) -> Case:
    """A random layer: any number of rows and columns, groups of each size, codes of the whole range."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    rows, features, columns = rng.randint(1, 70), rng.randint(1, 130), rng.randint(1, 300)
    kind: ops.Kind = rng.choice(["int4", "int8"])
    lowest, highest = (-8, 7) if kind == "int4" else (-128, 127)
    group_size = rng.choice([MIN_GROUP, 32, 48, 64, 128, columns])
    groups = -(-columns // group_size)
    weight = ops.QuantizedTensor(
        kind,
        torch.randint(lowest, highest + 1, (features, columns), dtype=torch.int8),
        (torch.randn(features, groups) / highest).half().float(),
        torch.randn(features, groups).half().float() if rng.random() < 0.5 else None,
        group_size,
    )
    bias = torch.randn(features).bfloat16() if rng.random() < 0.5 else None
    return Case(torch.randn(rows, columns).bfloat16(), weight, bias)


def product(case: Case, x: torch.Tensor) -> torch.Tensor:
    """The layer in float64."""
    y = x.double() @ case.weight.dequantize(torch.float64).T
    return y if case.bias is None else y + case.bias.double()


@pytest.mark.parametrize("seed", CASES)
def test_products_are_rounded_once(seed: int) -> None:
    case = make_case(seed)
    found = ops.linear(case.x, ops.pack(case.weight), case.bias)
    # float32 sums of magnitudes up to about 20, and half a unit of bfloat16.
    torch.testing.assert_close(found.double(), product(case, case.x), atol=1e-4, rtol=2**-8)


@pytest.mark.parametrize("seed", CASES)
def test_a_row_does_not_depend_on_the_others(seed: int) -> None:
    case = make_case(seed)
    packed, columns = ops.pack(case.weight), case.weight.shape[1]
    norm = ops.Norm(torch.rand(columns).bfloat16(), 1e-5)
    x = torch.randn(70, columns).bfloat16()
    alone = torch.cat([ops.linear(row, packed, case.bias, norm=norm) for row in x.split(1)])
    for rows in (2, 5, 7, 12, 13, 25, 70):
        assert torch.equal(ops.linear(x[:rows], packed, case.bias, norm=norm), alone[:rows])


@pytest.mark.parametrize("seed", CASES)
def test_norm_gate_and_residual(seed: int) -> None:
    """Each gives the result of a separate operation on the rounded result of the one before."""
    case = make_case(seed)
    packed, (features, columns) = ops.pack(case.weight), case.weight.shape
    norm = ops.Norm(torch.rand(columns).bfloat16(), 1e-5)
    residual = torch.randn(len(case.x), features).bfloat16()
    plain = ops.linear(case.x, packed, case.bias, norm=norm)
    normed = torch.nn.functional.rms_norm(case.x.double(), (columns,), norm.weight.double(), norm.eps)
    torch.testing.assert_close(plain.double(), product(case, normed), atol=0.25, rtol=2**-6)
    assert torch.equal(ops.linear(case.x, packed, case.bias, norm=norm, residual=residual), plain + residual)
    if features % 2 == 0:
        gate, up = plain.chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
        found = ops.linear(case.x, packed, case.bias, norm=norm, is_gated=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=2**-6)
        half = residual[:, : features // 2]
        assert torch.equal(ops.linear(case.x, packed, case.bias, norm=norm, residual=half, is_gated=True), found + half)


@pytest.mark.parametrize("rows", [1, 14])
@pytest.mark.parametrize("quantization", [ops.Quantization("int4", 32), ops.Quantization("int8")])
def test_a_fused_gate(rows: int, quantization: ops.Quantization) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96).bfloat16(), ops.quantize(torch.randn(192, 96) / 10, quantization)
    gate, up = (x.double() @ weight.dequantize(torch.float64).T).chunk(2, dim=-1)
    found = ops.linear(x, ops.pack(weight), is_gated=True)
    torch.testing.assert_close(found.double(), torch.nn.functional.silu(gate) * up, atol=0.01, rtol=2**-6)


@pytest.mark.parametrize("seed", CASES)
def test_rows_are_read_as_dequantised(seed: int) -> None:
    case = make_case(seed)
    features, columns = case.weight.shape
    ids = torch.randint(features, (9,))
    found = ops.embedding(ops.pack(case.weight), ids, columns)
    torch.testing.assert_close(found.double(), case.weight.dequantize(torch.float64)[ids], atol=1e-6, rtol=2**-8)


def test_strided_codes_and_rows() -> None:
    torch.manual_seed(0)
    whole = ops.quantize(torch.randn(70, 128), ops.Quantization("int4", 32))
    part = whole.narrow(1, 32, 64)
    x = torch.randn(6, 200).bfloat16()[:, 7:71]
    expected = x.double() @ whole.dequantize(torch.float64)[:, 32:96].T
    torch.testing.assert_close(ops.linear(x, ops.pack(part)).double(), expected, atol=1e-4, rtol=2**-8)


def test_reordered_columns() -> None:
    torch.manual_seed(0)
    case = make_case(3)
    order = torch.randperm(case.weight.shape[1])
    weight = ops.QuantizedTensor(
        case.weight.kind, case.weight.codes, case.weight.scales, case.weight.offsets, case.weight.group_size, order
    )
    found = ops.linear(case.x, ops.pack(weight), case.bias)
    expected = product(case, case.x.index_select(1, order))
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=2**-8)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_packed_weight_is_small(kind: ops.Kind) -> None:
    """Codes of 4 or 8 bits and, for each group, a scale of 16, with int4 an offset of 16 as well."""
    packed = ops.pack(torch.randn(64, 256).bfloat16(), ops.Quantization(kind, 64))
    assert isinstance(packed, ops.QuantizedWeight)
    assert packed.data.nbytes == 64 * 256 * {"int4": 4, "int8": 8}[kind] // 8 + 64 * 4 * {"int4": 4, "int8": 2}[kind]
    assert packed.scales is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_opcheck(seed: int) -> None:
    case = make_case(seed)
    data, scales, offsets, _, *layout = ops.pack(case.weight)
    given = (case.x, data, scales, offsets, *layout, case.bias)
    residual = torch.randn(len(case.x), case.weight.shape[0]).bfloat16()
    norm = torch.rand(case.weight.shape[1]).bfloat16()
    torch.library.opcheck(torch.ops.dispec.quantized_linear.default, (*given, norm, 1e-5, residual, False))
    torch.library.opcheck(torch.ops.dispec.quantized_linear.default, (*given, None, 0.0, None, False))
    read = (data, scales, offsets, torch.tensor([0]), case.weight.shape[1], *layout[1:])
    torch.library.opcheck(torch.ops.dispec.read_quantized_rows.default, read)
