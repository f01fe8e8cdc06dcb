"""All layers of a step in one call, and a loop of decode steps in one call: see decoder.cpp."""

import ctypes

import torch
from torch import Tensor

from dispec.ops.cpu.library import Matrix, address, int32, kernel

_NUMBER, _POINTER, _FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class Layer(ctypes.Structure):
    """`Layer` of decoder.cpp."""

    _fields_ = (
        ("attention_norm", _POINTER),
        ("qkv", Matrix),
        ("qkv_bias", _POINTER),
        ("query_norm", _POINTER),
        ("key_norm", _POINTER),
        ("output", Matrix),
        ("output_bias", _POINTER),
        ("mlp_norm", _POINTER),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("keys", _POINTER),
        ("values", _POINTER),
    )


class Model(ctypes.Structure):
    """`Model` of decoder.cpp. Its addresses are valid as long as their tensors live."""

    _fields_ = (
        ("hidden", _NUMBER),
        ("intermediate", _NUMBER),
        ("heads", _NUMBER),
        ("kv_heads", _NUMBER),
        ("head_dim", _NUMBER),
        ("block_size", _NUMBER),
        ("cache_type", _NUMBER),
        ("vocab", _NUMBER),
        ("embedding", Matrix),
        ("num_layers", _NUMBER),
        ("layers", ctypes.POINTER(Layer)),
        ("final_norm", _POINTER),
        ("head_rows", _NUMBER),
        ("columns", _NUMBER),
        ("head", Matrix),
        ("head_tokens", _POINTER),
        ("cosine", _POINTER),
        ("sine", _POINTER),
        ("eps", _FLOAT),
        ("scale", _FLOAT),
    )


class _Step(ctypes.Structure):
    """`Step` of decoder.cpp."""

    _fields_ = (
        ("tokens", _NUMBER),
        ("sequences", _NUMBER),
        ("cosine", _POINTER),
        ("sine", _POINTER),
        ("slot_mapping", _POINTER),
        ("block_tables", _POINTER),
        ("table_stride", _NUMBER),
        ("query_start", _POINTER),
        ("context_lens", _POINTER),
    )


def layers(
    model: Model,
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
) -> Tensor:
    """Compute `ops.decoder_layers`."""
    x, cosine, sine = (tensor.contiguous() for tensor in (x, cosine, sine))
    slot_mapping, block_tables, query_start, context_lens = map(
        int32, (slot_mapping, block_tables, query_start, context_lens)
    )
    step = _Step(
        len(x),
        len(context_lens),
        cosine.data_ptr(),
        sine.data_ptr(),
        slot_mapping.data_ptr(),
        block_tables.data_ptr(),
        block_tables.stride(0),
        query_start.data_ptr(),
        context_lens.data_ptr(),
    )
    result = torch.empty_like(x)
    kernel("layers")(ctypes.byref(model), ctypes.byref(step), x.data_ptr(), result.data_ptr())
    return result


def decode(
    model: Model,
    counts: Tensor,
    token_ids: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    temperature: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """Compute `ops.decode_tokens`."""
    counts, token_ids, block_tables, context_lens = map(int32, (counts, token_ids, block_tables, context_lens))
    sequences, query_len = token_ids.shape
    output = torch.zeros(sequences, int(counts[0]), dtype=torch.int64)
    kernel("decode")(
        ctypes.byref(model),
        sequences,
        query_len,
        counts.data_ptr(),
        token_ids.data_ptr(),
        block_tables.data_ptr(),
        block_tables.stride(0),
        context_lens.data_ptr(),
        address(temperature),
        address(seed),
        output.data_ptr(),
    )
    return output
