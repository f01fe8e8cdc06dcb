"""A whole transformer layer as one op, where there are kernels for it: decoding on a CPU with tiled weights, on CUDA in
16 bits with plain ones."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops.cpu import layer as cpu_layer
from ops.cpu.linear import TILE
from ops.linear import Matrix, Packed
from ops.norm import Norm
from ops.paged_attention import TRITON_HEAD_DIMS, has_cpu_kernel

_library = torch.library.Library("dispec", "FRAGMENT")
_library.define(
    "decoder_layer(Tensor x, Tensor attention_norm, Tensor qkv, Tensor? qkv_bias, Tensor? query_norm, Tensor? key_norm,"
    " Tensor output, Tensor? output_bias, Tensor mlp_norm, Tensor gate_up, Tensor down, float eps, Tensor cosine,"
    " Tensor sine, Tensor(a!) keys, Tensor(b!) values, Tensor slot_mapping, Tensor block_tables, Tensor query_start,"
    " Tensor context_lens, int heads, int intermediate, float scale) -> Tensor"
)


def has_layer_kernel(matrices: tuple[Matrix, ...], gate_up: Matrix, keys: Float[Tensor, "NB KV D BS"]) -> bool:
    """Whether `decoder_layer` can take a layer's matrices, of which one is `gate_up`, and cache."""
    if keys.is_cuda:
        return keys.shape[2] in TRITON_HEAD_DIMS and all(
            isinstance(matrix, Tensor)
            and matrix.dtype is keys.dtype
            and matrix.dtype in (torch.bfloat16, torch.float16)
            and matrix.is_contiguous()
            for matrix in (*matrices, gate_up)
        )
    return (
        isinstance(gate_up, Packed)
        and all(
            isinstance(matrix, Packed) and matrix.is_tiled and matrix.blocked.dtype is gate_up.blocked.dtype
            for matrix in (*matrices, gate_up)
        )
        and gate_up.features % (2 * TILE) == 0
        and keys.dtype is torch.bfloat16
        and has_cpu_kernel(keys.dtype, keys.shape[2], keys.shape[3])
    )


def decoder_layer(
    x: Float[Tensor, "T E"],
    attention_norm: Norm,
    qkv: Matrix,
    qkv_bias: Float[Tensor, "QKV"] | None,
    query_norm: Float[Tensor, "D"] | None,
    key_norm: Float[Tensor, "D"] | None,
    output: Matrix,
    output_bias: Float[Tensor, "E"] | None,
    mlp_norm: Norm,
    gate_up: Matrix,
    down: Matrix,
    rotation: tuple[Float[Tensor, "T D2"], Float[Tensor, "T D2"]],
    keys: Float[Tensor, "NB KV D BS"],
    values: Float[Tensor, "NB KV BS D"],
    slot_mapping: Int[Tensor, "T"],
    block_tables: Int[Tensor, "B P"],
    query_start: Int[Tensor, "B+1"],
    context_lens: Int[Tensor, "B"],
    scale: float,
) -> Float[Tensor, "T E"]:
    """Attention and MLP with their norms and residual connections; writes the tokens' keys and values first.

    On a CPU the very bits that `linear`, `rotate_and_write` and `paged_attention` give one after the other; on CUDA
    what one kernel hands to its own end is not rounded. All norms have the same `eps`. Only where `has_layer_kernel`,
    and for few query tokens per sequence, on CUDA as many for each.
    """
    kv_heads, head_dim = keys.shape[1:3]
    return torch.ops.dispec.decoder_layer(
        x,
        attention_norm.weight,
        _tensor(qkv),
        qkv_bias,
        query_norm,
        key_norm,
        _tensor(output),
        output_bias,
        mlp_norm.weight,
        _tensor(gate_up),
        _tensor(down),
        mlp_norm.eps,
        *rotation,
        keys,
        values,
        slot_mapping,
        block_tables,
        query_start,
        context_lens,
        _features(qkv) // head_dim - 2 * kv_heads,
        _features(gate_up) // 2,
        scale,
    )


def _tensor(matrix: Matrix) -> Tensor:
    return matrix.blocked if isinstance(matrix, Packed) else matrix


def _features(matrix: Matrix) -> int:
    return matrix.features if isinstance(matrix, Packed) else matrix.shape[0]


def _cuda_layer(*arguments: Any) -> Tensor:
    from ops.triton.decoder_layer import decoder_layer as kernels

    return kernels(*arguments)


_library.impl("decoder_layer", _cuda_layer, "CUDA")
_library.impl("decoder_layer", cpu_layer.decoder_layer, "CPU")
torch.library.register_fake("dispec::decoder_layer", lambda x, *_: torch.empty_like(x), lib=_library)
