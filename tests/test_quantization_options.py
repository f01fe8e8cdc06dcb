"""The options of quantisation: what is refused, by name, before anything is loaded."""

import pytest
import torch

from dispec.engine.loading.quantization import packing_for
from dispec.engine.options import EngineOptions
from dispec.ops import Quantization
from dispec.ops.cpu.library import has_packed_linear

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int5"}, "quantization is 'int5', must be one of native, int4, int8, fp8, off"),
        ({"quantization": "int4", "quantization_group_size": 48}, "quantization_group_size is 48, must be one of"),
        ({"quantization": "int8", "quantization_group_size": 64}, "is 64 and quantization is 'int8', must be 'int4'"),
        ({"quantization_group_size": 32}, "quantization_group_size is 32 and quantization is None, must be 'int4'"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype is 'int4', must be one of auto, int8, fp8"),
    ],
)
def test_invalid_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "fp8"},
        {"quantization": "int4", "dtype": "float32"},
        {"quantization": "int8", "dtype": "float32"},
    ],
)
def test_a_format_without_a_kernel_is_refused(options: dict[str, str]) -> None:
    message = f"quantization is '{options['quantization']}', which has no kernel for {options.get('dtype', 'bfloat16')}"
    with pytest.raises(ValueError, match=message):
        packing_for(EngineOptions(**options), CPU)


@pytest.mark.skipif(not has_packed_linear(), reason="this CPU has no kernels of packed weights")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"quantization": "native"}, None),
        ({"quantization": "int8"}, Quantization("int8")),
        ({"quantization": "int4"}, Quantization("int4", 32)),
        ({"quantization": "int4", "quantization_group_size": 128}, Quantization("int4", 128)),
    ],
)
def test_how_plain_matrices_are_rounded(options: dict[str, object], expected: Quantization | None) -> None:
    assert packing_for(EngineOptions(**options), CPU).quantization == expected
