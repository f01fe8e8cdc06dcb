"""Linear layers in e4m3 where there is no CUDA device."""

import pytest
import torch

from dispec import ops
from dispec.ops.quantization import Quantization, quantize


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_machine_without_cuda_has_no_kernel() -> None:
    for device in ("cuda", "cuda:1", "cpu"):
        assert not ops.has_quantized_kernel("fp8", torch.device(device), torch.bfloat16)


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_e4m3_starts_with_ada(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert ops.has_quantized_kernel("fp8", torch.device("cuda", 7), torch.bfloat16) == expected
    assert not ops.has_quantized_kernel("fp8", torch.device("cuda", 7), torch.float16)


def test_groups_of_columns_are_refused() -> None:
    weight = quantize(torch.randn(4, 64), Quantization("fp8", 32))
    with pytest.raises(ValueError, match="one scale for each row, not one for every 32 columns"):
        ops.pack(weight)


def test_rows_of_a_tied_head() -> None:
    weight = quantize(torch.randn(50, 24) * torch.logspace(-3, 3, 50)[:, None], Quantization("fp8"))
    ids = torch.tensor([3, 49, 3, 0])
    rows = ops.embedding(ops.pack(weight), ids, 24)
    assert torch.equal(rows, (weight.codes.float()[ids] * weight.scales[ids]).bfloat16())
