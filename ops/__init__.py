"""Operations on tensors, registered with torch so that compiled graphs call them by name.

Each op has a fake implementation for tracing, a Triton one for CUDA, a torch one for CPU, and an oracle in
`ops.reference`. What is for a CPU alone has no Triton one. `decoder_layers` and `decode`, which are never traced, are
plain functions.
"""

from dispec.ops.argmax import argmax
from dispec.ops.collective import all_gather_columns, all_reduce, broadcast
from dispec.ops.decode import Decoder, DecoderLayers, decode, decoder, decoder_layers
from dispec.ops.draw import draw, has_draw_kernel
from dispec.ops.embedding import embedding
from dispec.ops.kv_cache import copy_blocks, write_kv
from dispec.ops.linear import Matrix, Packed, linear, pack, prepare
from dispec.ops.norm import Norm, rms_norm
from dispec.ops.paged_attention import paged_attention
from dispec.ops.rotary import qkv_rope_write, rotate_and_write, rotation
from dispec.ops.token_threshold import token_threshold

__all__ = [
    "Decoder",
    "DecoderLayers",
    "Matrix",
    "Norm",
    "Packed",
    "all_gather_columns",
    "all_reduce",
    "argmax",
    "broadcast",
    "copy_blocks",
    "decode",
    "decoder",
    "decoder_layers",
    "draw",
    "embedding",
    "has_draw_kernel",
    "linear",
    "pack",
    "paged_attention",
    "prepare",
    "qkv_rope_write",
    "rms_norm",
    "rotate_and_write",
    "rotation",
    "token_threshold",
    "write_kv",
]
