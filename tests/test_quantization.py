"""Rounding of plain matrices, against numbers that are computed group by group."""

import gguf
import numpy as np
import pytest
import torch

from dispec.ops.quantization import Quantization, quantize

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(("rows", "columns", "size"), [(3, 96, 32), (1100, 40, 32), (2, 100, 64), (4, 20, 128)])
@pytest.mark.parametrize("shift", [0.0, 3.0, -500.0])
def test_int4_spans_the_range_of_each_group(rows, columns, size, shift):
    torch.manual_seed(rows)
    weight = torch.randn(rows, columns) + shift
    found = quantize(weight, Quantization("int4", size))
    assert found.scales.shape == (rows, -(-columns // size))
    assert found.offsets is not None
    assert torch.equal(found.scales, found.scales.half().float())
    assert torch.equal(found.offsets, found.offsets.half().float())
    assert found.codes.dtype == torch.int8
    assert (found.codes.min().item(), found.codes.max().item()) == (-8, 7)
    error = (found.dequantize() - weight).abs()
    for first in range(0, columns, size):
        group = weight[:, first : first + size].double()
        step = (group.amax(1) - group.amin(1)) / 15
        # Half a step, and what float16 rounds of the offset and of 8 steps.
        limit = 0.5 * step + 2**-11 * (8 * step + (group.amin(1) + 8 * step).abs()) + 1e-6
        assert (error[:, first : first + size].amax(1) <= limit).all()


def test_int4_recovers_what_was_rounded_so_before():
    weight = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    rounded = torch.from_numpy(
        gguf.dequantize(gguf.quantize(weight, gguf.GGMLQuantizationType.Q4_1), gguf.GGMLQuantizationType.Q4_1).copy()
    )
    found = quantize(rounded, Quantization("int4", 32)).dequantize()
    torch.testing.assert_close(found, rounded, rtol=0, atol=2**-11)


def test_int4_of_equal_numbers():
    for number in (0.0, 0.375):
        weight = torch.full((2, 40), number)
        assert torch.equal(quantize(weight, Quantization("int4", 32)).dequantize(), weight)


@pytest.mark.parametrize("size", [None, 32])
def test_int8_is_symmetric_and_nearest(size):
    torch.manual_seed(0)
    weight = torch.randn(5, 72) * torch.tensor([1e-3, 1.0, 30.0, 0.0, 1.0])[:, None]
    found = quantize(weight, Quantization("int8", size))
    assert found.offsets is None
    for first in range(0, 72, size or 72):
        group = slice(first, first + (size or 72))
        scale = (weight[:, group].abs().amax(1) / 127).half().float()
        assert torch.equal(found.scales[:, first // (size or 72)], scale)
        error = (found.dequantize()[:, group] - weight[:, group]).abs().amax(1)
        assert (error <= scale * 0.5625).all()  # the largest code may be clamped at 127
