"""A whole layer of a step in one call: see layer.cpp."""

import torch
from torch import Tensor

from ops.cpu.attention import int32
from ops.cpu.library import library


def decoder_layer(
    x: Tensor,
    attention_norm: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    output: Tensor,
    output_bias: Tensor | None,
    mlp_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    eps: float,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    heads: int,
    intermediate: int,
    scale: float,
) -> Tensor:
    """As `ops.decoder_layer`, the matrices in tiles and floating-point tensors dense."""
    kernels = library()
    assert kernels is not None
    slot_mapping, block_tables, query_start, context_lens = map(
        int32, (slot_mapping, block_tables, query_start, context_lens)
    )
    tokens, hidden = x.shape
    _, kv_heads, head_dim, block_size = keys.shape
    result = torch.empty_like(x)
    kernels.dispec_layer(
        x.data_ptr(),
        result.data_ptr(),
        tokens,
        hidden,
        intermediate,
        eps,
        qkv.dtype is torch.int8,
        attention_norm.data_ptr(),
        qkv.data_ptr(),
        None if qkv_bias is None else qkv_bias.data_ptr(),
        None if query_norm is None else query_norm.data_ptr(),
        None if key_norm is None else key_norm.data_ptr(),
        output.data_ptr(),
        None if output_bias is None else output_bias.data_ptr(),
        mlp_norm.data_ptr(),
        gate_up.data_ptr(),
        down.data_ptr(),
        cosine.data_ptr(),
        sine.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        slot_mapping.data_ptr(),
        block_tables.data_ptr(),
        block_tables.stride(0),
        query_start.data_ptr(),
        context_lens.data_ptr(),
        len(context_lens),
        heads,
        kv_heads,
        head_dim,
        block_size,
        scale,
    )
    return result
