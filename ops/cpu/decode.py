"""Tokens of a model, one after another, in one call: see decode.cpp."""

import ctypes

import torch
from torch import Tensor

from ops.cpu.attention import int32
from ops.cpu.library import library

_NUMBER, _POINTER, _FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class CDecoder(ctypes.Structure):
    """What `dispec_decode` takes of a model, in its order: numbers, and addresses of what others keep."""

    _fields_ = (
        ("hidden", _NUMBER),
        ("intermediate", _NUMBER),
        ("heads", _NUMBER),
        ("kv_heads", _NUMBER),
        ("head_dim", _NUMBER),
        ("block_size", _NUMBER),
        ("vocab", _NUMBER),
        ("embedding_is_tiled", _NUMBER),
        ("embedding", _POINTER),
        ("num_layers", _NUMBER),
        ("layers_are_int8", _NUMBER),
        ("layers", _POINTER),
        ("final_norm", _POINTER),
        ("head_rows", _NUMBER),
        ("head_is_int8", _NUMBER),
        ("columns", _NUMBER),
        ("head", _POINTER),
        ("head_tokens", _POINTER),
        ("cosine", _POINTER),
        ("sine", _POINTER),
        ("eps", _FLOAT),
        ("scale", _FLOAT),
    )


def decode(
    model: CDecoder,
    counts: Tensor,
    token_ids: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    temperature: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """As `ops.decode`."""
    kernels = library()
    assert kernels is not None
    counts, token_ids, block_tables, context_lens = map(int32, (counts, token_ids, block_tables, context_lens))
    sequences, query_len = token_ids.shape
    output = torch.zeros(sequences, int(counts[0]), dtype=torch.int64)
    kernels.dispec_decode(
        ctypes.byref(model),
        sequences,
        query_len,
        counts.data_ptr(),
        token_ids.data_ptr(),
        block_tables.data_ptr(),
        block_tables.stride(0),
        context_lens.data_ptr(),
        None if temperature is None else temperature.data_ptr(),
        None if seed is None else seed.data_ptr(),
        output.data_ptr(),
    )
    return output
