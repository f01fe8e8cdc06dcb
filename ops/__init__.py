"""Operations on tensors, registered with torch so that compiled graphs call them by name.

Each op has a fake implementation for tracing, a Triton one for CUDA, a torch one for CPU, and an oracle in
`ops.reference`. Ops that only a CPU has lack the Triton one. `decoder_layers` and `decode_tokens` are never traced:
they are plain functions.
"""

from dispec.ops.block_transfer import fold_blocks, transfer_blocks
from dispec.ops.collective import all_gather_columns, all_reduce, broadcast
from dispec.ops.decoder import MAX_QUERY_LEN, Decoder, DecoderLayers, build_decoder, decode_tokens, decoder_layers
from dispec.ops.embedding import embedding
from dispec.ops.huge_pages import on_huge_pages
from dispec.ops.kv_cache import copy_blocks, write_kv
from dispec.ops.linear import Matrix, PackedWeight, allocate_workspaces, linear, pack
from dispec.ops.noise import uniform_noise
from dispec.ops.norm import Norm, rms_norm
from dispec.ops.paged_attention import paged_attention
from dispec.ops.quantization import Kind, Quantization, QuantizedTensor, concatenate, quantize
from dispec.ops.quantized_linear import QuantizedWeight, has_quantized_kernel
from dispec.ops.rotary import qkv_rope_write, rope_cos_sin, rope_write
from dispec.ops.sampling import argmax, has_sample_kernel, mask_tokens, sample
from dispec.ops.stacking import clone, copy_layer, empty_stack, is_alike, layer_of
from dispec.ops.token_threshold import token_threshold

__all__ = [
    "MAX_QUERY_LEN",
    "Decoder",
    "DecoderLayers",
    "Kind",
    "Matrix",
    "Norm",
    "PackedWeight",
    "Quantization",
    "QuantizedTensor",
    "QuantizedWeight",
    "all_gather_columns",
    "all_reduce",
    "allocate_workspaces",
    "argmax",
    "broadcast",
    "build_decoder",
    "clone",
    "concatenate",
    "copy_blocks",
    "copy_layer",
    "decode_tokens",
    "decoder_layers",
    "embedding",
    "empty_stack",
    "fold_blocks",
    "has_quantized_kernel",
    "has_sample_kernel",
    "is_alike",
    "layer_of",
    "linear",
    "mask_tokens",
    "on_huge_pages",
    "pack",
    "paged_attention",
    "qkv_rope_write",
    "quantize",
    "rms_norm",
    "rope_cos_sin",
    "rope_write",
    "sample",
    "token_threshold",
    "transfer_blocks",
    "uniform_noise",
    "write_kv",
]
