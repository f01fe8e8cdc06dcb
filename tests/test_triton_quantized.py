"""GEMMs with quantised weights against the oracle, run by Triton's interpreter: see test_triton_kernels."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dispec.ops.quantization import Kind, QuantizedTensor
from tests.quantized_cases import random_weight

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
    pytest.skip("the interpreter of this Triton needs numpy before 2.4", allow_module_level=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


if not INTERPRETED:

    def test_quantized_kernels_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert finished.returncode == 0, finished.stdout[-20000:]

else:
    from dispec.ops import reference
    from dispec.ops.norm import Norm
    from dispec.ops.triton.gemm_tuning import QuantizedGemmConfig
    from dispec.ops.triton.quantized_layout import pack_codes, pack_scales, read_rows
    from dispec.ops.triton.quantized_linear import quantized_linear

    ONE, SPLIT = QuantizedGemmConfig(32, 1, 2, 3), QuantizedGemmConfig(16, 3, 1, 2, 16)
    TORCH = QuantizedGemmConfig(0, 1, 4, 1)

    @pytest.fixture(autouse=True)
    def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
        """Fill what the launchers allocate with NaN, so that a row that is not written shows."""
        empty: Callable[..., Tensor] = torch.empty

        def poisoned(*size: object, **options: object) -> Tensor:
            tensor = empty(*size, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        monkeypatch.setattr(torch, "empty", poisoned)

    def packed(weight: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
        offsets = None if weight.offsets is None else pack_scales(weight.offsets)
        return pack_codes(weight.codes, weight.kind, weight.group_size), pack_scales(weight.scales), offsets

    @pytest.mark.parametrize(
        ("kind", "tokens", "features", "columns", "group", "has_offsets"),
        [
            ("int4", 1, 40, 256, 128, False),
            ("int4", 3, 50, 416, 32, True),
            ("int4", 17, 34, 200, 48, False),
            ("int4", 5, 33, 130, None, True),
            ("int4", 2, 48, 520, 256, True),
            ("int8", 1, 40, 272, 128, False),
            ("int8", 3, 50, 208, 32, True),
            ("int8", 18, 34, 100, 16, False),
            ("int8", 9, 33, 129, None, True),
            ("int8", 2, 18, 7, None, False),
        ],
    )
    @pytest.mark.parametrize("config", [ONE, SPLIT, TORCH], ids=["one", "split", "torch"])
    def test_linear(
        kind: Kind,
        tokens: int,
        features: int,
        columns: int,
        group: int | None,
        has_offsets: bool,
        config: QuantizedGemmConfig,
    ) -> None:
        torch.manual_seed(tokens)
        weight = random_weight(kind, features, columns, group, has_offsets)
        x = torch.randn(tokens, columns).half()
        is_gated, has_norm, adds = features % 2 == 0 and tokens % 2 == 1, tokens % 3 == 0, tokens > 2
        norm = torch.randn(columns).half() if has_norm else None
        bias = torch.randn(features).half() if tokens > 1 else None
        residual = torch.randn(tokens, features // 2 if is_gated else features).half() if adds else None
        expected = reference.linear(x, weight.dequantize(torch.float64), bias, norm, 1e-6, is_gated)
        if residual is not None:
            expected += residual
        rms = None if norm is None else Norm(norm, 1e-6)
        actual = quantized_linear(
            x, *packed(weight), features, kind, weight.group_size, bias, rms, residual, is_gated, config
        )
        tolerance = 1e-2 if config is TORCH or has_norm else 2e-3
        assert actual.dtype is torch.float16
        torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance * columns**0.5, rtol=tolerance)

    @pytest.mark.parametrize("kind", ["int4", "int8"])
    @pytest.mark.parametrize("group", [16, 48, 64, None])
    def test_read_rows(kind: Kind, group: int | None) -> None:
        weight = random_weight(kind, 37, 150, group, has_offsets=True)
        indices = torch.tensor([36, 0, 17, 17])
        actual = read_rows(*packed(weight), indices, 150, kind, weight.group_size)
        assert torch.equal(actual, weight.dequantize()[indices])
