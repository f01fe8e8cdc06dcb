"""The tables of launch configurations, by the figures that were measured for them."""

import pytest

pytest.importorskip("triton")

from dispec.ops.triton.gemm_tuning import (
    QuantizedGemmConfig,
    SkinnyGemmConfig,
    choose_fused_linear,
    choose_quantized_linear,
)
from dispec.ops.triton.tuning import Device

H100, A100 = Device("sm_90", 132), Device("sm_80", 108)
# Hidden size, features of the query, key and value projection, columns of the output projection, intermediate size.
SMALL, LARGE = (1536, 2048, 1536, 8960), (3584, 4608, 3584, 18944)
Products = tuple[SkinnyGemmConfig | None, SkinnyGemmConfig | None, SkinnyGemmConfig | None, SkinnyGemmConfig | None]

NONE: Products = (None, None, None, None)
GATED = SkinnyGemmConfig(64, 128, 1, 4, 3)
GATED_UP_TO_64 = SkinnyGemmConfig(64, 64, 1, 4, 4)
GEMV, NORMED_GEMV = SkinnyGemmConfig(2, 512, 0, 2), SkinnyGemmConfig(4, 512, 0, 2, fuses_norm=True)

# By number of tokens.
HOPPER_SMALL: dict[int, Products] = {
    1: (NORMED_GEMV, GEMV, GATED, SkinnyGemmConfig(64, 128, 5, 4, 5)),
    8: (
        SkinnyGemmConfig(64, 128, 4, 4, 3),
        SkinnyGemmConfig(64, 128, 3, 4, 4),
        GATED,
        SkinnyGemmConfig(64, 128, 5, 4, 5),
    ),
    32: (None, None, GATED, SkinnyGemmConfig(64, 128, 5, 4, 5)),
    64: (None, None, GATED_UP_TO_64, SkinnyGemmConfig(64, 128, 5, 4, 4)),
    65: NONE,
}
LONG = SkinnyGemmConfig(64, 128, 2, 4, 6)
HOPPER_LARGE: dict[int, Products] = {
    1: (NORMED_GEMV, SkinnyGemmConfig(4, 512, 0, 4), GATED, LONG),
    8: (SkinnyGemmConfig(16, 128, 1, 2, 5, fuses_norm=True), LONG, GATED, LONG),
    32: (None, LONG, GATED, LONG),
    64: (None, None, GATED_UP_TO_64, LONG),
    65: NONE,
}


def ampere(splits: int) -> dict[int, Products]:
    up_to_16: Products = (
        SkinnyGemmConfig(16, 128, 1, 2, 5, fuses_norm=True),
        SkinnyGemmConfig(16, 512, 1, 4, 3),
        GATED._replace(fuses_norm=True),
        SkinnyGemmConfig(64, 128, splits, 4, 5),
    )
    return {
        1: (NORMED_GEMV, GEMV, NORMED_GEMV, SkinnyGemmConfig(2, 1024, 0, 4)),
        4: up_to_16,
        16: up_to_16,
        32: (None, None, GATED, None),
        64: NONE,
    }


def layer(device: Device, rows: int, hidden: int, qkv: int, attended: int, intermediate: int) -> Products:
    return (
        choose_fused_linear(device, rows, qkv, hidden, has_norm=True),
        choose_fused_linear(device, rows, hidden, attended),
        choose_fused_linear(device, rows, 2 * intermediate, hidden, has_norm=True, is_gated=True),
        choose_fused_linear(device, rows, hidden, intermediate),
    )


@pytest.mark.parametrize(
    ("device", "shape", "expected"),
    [(H100, SMALL, HOPPER_SMALL), (H100, LARGE, HOPPER_LARGE), (A100, SMALL, ampere(4)), (A100, LARGE, ampere(1))],
)
def test_products_of_a_layer(device: Device, shape: tuple[int, int, int, int], expected: dict[int, Products]) -> None:
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
