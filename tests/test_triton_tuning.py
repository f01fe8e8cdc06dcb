"""The tables of launch configurations, by the figures that were measured for them."""

import pytest

pytest.importorskip("triton")

from dispec.ops.triton.tuning import (
    Device,
    QuantizedGemmConfig,
    SkinnyGemmConfig,
    choose_fused_linear,
    choose_quantized_linear,
)

H100, A100 = Device("sm_90", 132), Device("sm_80", 108)
# Hidden size, features of the query, key and value projection, columns of the output projection, intermediate size.
SMALL, LARGE = (1536, 2048, 1536, 8960), (3584, 4608, 3584, 18944)
Products = tuple[SkinnyGemmConfig | None, SkinnyGemmConfig | None, SkinnyGemmConfig | None, SkinnyGemmConfig | None]

ONE_OR_TWO: Products = (
    SkinnyGemmConfig(4, 512, 0, 2, 1),
    SkinnyGemmConfig(2, 512, 0, 2, 1),
    SkinnyGemmConfig(4, 512, 0, 2, 1),
    SkinnyGemmConfig(2, 1024, 0, 4, 1),
)
GATED = SkinnyGemmConfig(64, 128, 1, 4, 3)
UP_TO_32: Products = (None, None, GATED, None)
NONE: Products = (None, None, None, None)


def up_to_16(splits: int) -> Products:
    return (
        SkinnyGemmConfig(16, 128, 1, 2, 5),
        SkinnyGemmConfig(16, 512, 1, 4, 3),
        GATED,
        SkinnyGemmConfig(64, 128, splits, 4, 5),
    )


def layer(device: Device, rows: int, hidden: int, qkv: int, attended: int, intermediate: int) -> Products:
    return (
        choose_fused_linear(device, rows, qkv, hidden, has_norm=True),
        choose_fused_linear(device, rows, hidden, attended),
        choose_fused_linear(device, rows, 2 * intermediate, hidden, has_norm=True, is_gated=True),
        choose_fused_linear(device, rows, hidden, intermediate),
    )


@pytest.mark.parametrize(
    ("device", "shape", "splits"), [(H100, SMALL, 5), (H100, LARGE, 2), (A100, SMALL, 4), (A100, LARGE, 1)]
)
def test_products_of_a_layer(device: Device, shape: tuple[int, int, int, int], splits: int) -> None:
    expected = {
        1: ONE_OR_TWO,
        2: ONE_OR_TWO,
        4: up_to_16(splits),
        16: up_to_16(splits),
        24: UP_TO_32,
        32: UP_TO_32,
        64: NONE,
    }
    assert {rows: layer(device, rows, *shape) for rows in expected} == expected


def test_what_the_kernels_do_not_take_is_torchs() -> None:
    assert layer(Device("fallback", 132), 2, *SMALL) == NONE
    assert choose_fused_linear(H100, 2, 2048, 1544, has_norm=True) is None
    assert choose_fused_linear(H100, 2, 2040, 1536, has_norm=True) is None


@pytest.mark.parametrize(
    ("tokens", "features", "columns", "kind", "expected"),
    [
        (1, 37888, 3584, "int4", QuantizedGemmConfig(64, 1, 2, 3)),
        (1, 152064, 3584, "int8", QuantizedGemmConfig(32, 1, 2, 3)),
        (1, 4608, 3584, "int4", QuantizedGemmConfig(64, 8, 2, 3)),
        (8, 3584, 18944, "int4", QuantizedGemmConfig(64, 10, 2, 3)),
        (1, 1536, 1536, "int4", QuantizedGemmConfig(64, 6, 2, 3)),
        (32, 37888, 3584, "int4", QuantizedGemmConfig(128, 1, 4, 3)),
        (256, 37888, 3584, "int4", QuantizedGemmConfig(128, 1, 4, 3)),
        (2048, 37888, 3584, "int4", QuantizedGemmConfig(0, 1, 4, 1)),
    ],
)
def test_quantized_products(tokens: int, features: int, columns: int, kind: str, expected: QuantizedGemmConfig) -> None:
    assert choose_quantized_linear(H100, tokens, features, columns, kind) == expected
