"""A product in 16 bits with the norm before it and the gate or residual after it: `ops.linear` on CUDA."""

from torch import Tensor
from torch.nn.functional import linear

from dispec.ops.norm import Norm
from dispec.ops.triton import few_rows
from dispec.ops.triton.add_product import add_product
from dispec.ops.triton.gate_product import gate_product
from dispec.ops.triton.layer_parts import gate_halves, norm_rows
from dispec.ops.triton.tuning import FOLDS_NORM_UP_TO, choose_product, describe


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, is_gated: bool) -> Tensor:
    """`ops.linear` in one kernel for few rows; for more, torch's product between kernels for the rest.

    x: [T, K]; weight: [N, K]; bias: [N]. Returns [T, M], contiguous. One kernel rounds nothing before its end: gate and
    up stay in float32. Rows that it norms are not rounded either, or on tensor cores in bfloat16 only after the norm's
    weight.
    """
    rows, (features, columns) = x.shape[0], weight.shape
    if rows == 0:
        return x.new_empty(0, features // 2 if is_gated else features)
    config = None
    if weight.is_contiguous() and not (is_gated and bias is not None):
        config = choose_product(
            describe(x.device), rows, features, columns, has_norm=norm is not None, is_gated=is_gated
        )
    x = x.contiguous()
    if norm is not None and (config is None or rows > FOLDS_NORM_UP_TO):
        x, norm = norm_rows(x, norm), None
    if config is None:
        return gate_halves(linear(x, weight, bias)) if is_gated else few_rows.linear(x, weight, bias)
    if is_gated:
        return gate_product(x, weight, norm, config)
    return add_product(x, weight, bias, None, norm, config)


def linear_residual(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add `x @ weight.T + bias` to `total` [T, N], contiguous: in one kernel, or two if torch adds a bias."""
    rows, (features, columns) = x.shape[0], weight.shape
    if rows == 0:
        return
    config = None
    if weight.is_contiguous():
        config = choose_product(describe(x.device), rows, features, columns)
    if config is not None:
        add_product(x.contiguous(), weight, bias, total, None, config)
        return
    total.addmm_(x, weight.T)
    if bias is not None:
        total.add_(bias)
