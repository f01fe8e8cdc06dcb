"""A GEMM in 16 bits with the norm before it and the gate or residual after it: `ops.linear` on CUDA."""

from torch import Tensor
from torch.nn.functional import linear

from dispec.ops.norm import Norm
from dispec.ops.triton import skinny_linear
from dispec.ops.triton.gated_gemm import gated_gemm
from dispec.ops.triton.gated_linear import gated_linear
from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig, choose_fused_linear, choose_gated_gemm
from dispec.ops.triton.linear_residual import norm_linear_residual
from dispec.ops.triton.norm_activation import rms_norm, silu_and_mul
from dispec.ops.triton.tuning import describe


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, is_gated: bool
) -> Tensor:
    """Compute `ops.linear` in one kernel for few tokens; for more, with torch's GEMM between a norm and a gate kernel.

    x: [T, K]; weight: [N, K]; bias: [N]; norm: [K]. Returns [T, M], contiguous. The one kernel rounds once, at its end;
    on tensor cores in bfloat16 it also rounds the rows that it norms, after the norm's weight. For thousands of tokens
    the gate is in the GEMM as well.
    """
    if norm is None and not is_gated:
        return skinny_linear.linear(x, weight, bias)
    num_tokens, out_features = x.shape[0], weight.shape[0]
    if num_tokens == 0:
        return x.new_empty(0, out_features // 2 if is_gated else out_features)
    config = None if is_gated and bias is not None else _config(x, weight, norm is not None, is_gated)
    x, rms = x.contiguous(), None if norm is None else Norm(norm, eps)
    if rms is not None and (config is None or not config.fuses_norm):
        x, rms = rms_norm(x, rms), None
    if config is None:
        return _many_tokens(x, weight, bias) if is_gated else skinny_linear.linear(x, weight, bias)
    if is_gated:
        return gated_linear(x, weight, rms, config)
    return norm_linear_residual(x, weight, bias, None, rms, config)


def _many_tokens(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the gated activation of `x @ weight.T + bias`."""
    config = choose_gated_gemm(describe(x.device), x.shape[0], *weight.shape)
    if config is None or bias is not None or not weight.is_contiguous():
        return silu_and_mul(linear(x, weight, bias))
    return gated_gemm(x, weight, config)


def linear_residual(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add `x @ weight.T + bias` to `residual` [T, N], contiguous: in one kernel, or two if torch adds a bias."""
    if len(x) == 0:
        return
    config = _config(x, weight, has_norm=False, is_gated=False)
    if config is not None:
        norm_linear_residual(x.contiguous(), weight, bias, residual, None, config)
        return
    residual.addmm_(x, weight.T)
    if bias is not None:
        residual.add_(bias)


def _config(x: Tensor, weight: Tensor, has_norm: bool, is_gated: bool) -> SkinnyGemmConfig | None:
    if not weight.is_contiguous():
        return None
    return choose_fused_linear(describe(x.device), x.shape[0], *weight.shape, has_norm=has_norm, is_gated=is_gated)
