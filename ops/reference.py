"""Slow, obvious oracles of the ops, one sequence and one token at a time, in float64 where rounding matters."""

import math

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from dispec.ops.noise import uniform_noise


def write_kv(
    keys: Float[Tensor, "NB KV D BS"],
    values: Float[Tensor, "NB KV BS D"],
    key: Float[Tensor, "T KV D"],
    value: Float[Tensor, "T KV D"],
    slot_mapping: Int[Tensor, "T"],
) -> None:
    """Store each token's key and value at its slot."""
    block_size = keys.shape[3]
    for token, slot in enumerate(slot_mapping.tolist()):
        block, offset = divmod(slot, block_size)
        keys[block, :, :, offset] = key[token]
        values[block, :, offset, :] = value[token]


def copy_blocks(
    keys: Float[Tensor, "L NB KV D BS"],
    values: Float[Tensor, "L NB KV BS D"],
    source: Int[Tensor, "N"],
    destination: Int[Tensor, "N"],
) -> None:
    """Copy each source block to its destination, layer by layer."""
    for old, new in zip(source.tolist(), destination.tolist(), strict=True):
        for layer_keys, layer_values in zip(keys, values, strict=True):
            layer_keys[new] = layer_keys[old]
            layer_values[new] = layer_values[old]


def fold_blocks(
    keys: Int64[Tensor, "L NB W"], values: Int64[Tensor, "L NB W"], blocks: Int[Tensor, "N"]
) -> Int64[Tensor, "N 2*L"]:
    """Fold each block's words, row by row, in Python's integers."""
    folds = torch.empty(len(blocks), 2 * keys.shape[0], dtype=torch.int64)
    for item, block in enumerate(blocks.tolist()):
        for row, layer in enumerate([*keys, *values]):
            total = 0
            for position, word in enumerate(layer[block].tolist()):
                high, low = divmod(word % 2**64, 2**32)
                a = (position * 0x9E3779B1 + 0x85EBCA77) % 2**32
                b = (position * 0xC2B2AE3D + 0x27D4EB2F) % 2**32
                total += ((low + a) % 2**32) * ((high + b) % 2**32)
            folds[item, row] = (total + 2**63) % 2**64 - 2**63
    return folds


def paged_attention(
    query: Float[Tensor, "T H D"],
    keys: Float[Tensor, "NB KV D BS"],
    values: Float[Tensor, "NB KV BS D"],
    block_tables: Int[Tensor, "B P"],
    query_start: Int[Tensor, "B+1"],
    context_lens: Int[Tensor, "B"],
    scale: float,
) -> Float[Tensor, "T H D"]:
    """Attend causally from each token to its own sequence's pages, with a softmax in float64.

    Rows that belong to no sequence, and rows of a sequence with context 0, are zero.
    """
    block_size = keys.shape[3]
    group = query.shape[1] // keys.shape[1]
    output = torch.zeros_like(query)
    for sequence, context in enumerate(context_lens.tolist()):
        start, end = query_start[sequence : sequence + 2].tolist()
        for row in range(start, end):
            visible = context - (end - 1 - row)
            if visible <= 0:
                continue
            for head in range(query.shape[1]):
                blocks = block_tables[sequence, : math.ceil(visible / block_size)].long()
                k = keys[blocks, head // group].permute(0, 2, 1).flatten(0, 1)[:visible].double()
                v = values[blocks, head // group].flatten(0, 1)[:visible].double()
                probabilities = torch.softmax(k @ query[row, head].double() * scale, dim=0)
                output[row, head] = (probabilities @ v).to(query.dtype)
    return output


def linear(
    x: Float[Tensor, "T K"],
    weight: Float[Tensor, "N K"],
    bias: Float[Tensor, "N"] | None,
    norm: Float[Tensor, "K"] | None,
    eps: float,
    is_gated: bool,
) -> Float[Tensor, "T M"]:
    """Return `norm(x) @ weight.T + bias` in float64; if `is_gated`, silu of its first half times its second."""
    y = _normed(x.double(), norm, eps) @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if is_gated:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    return y


def qkv_rope_write(
    x: Float[Tensor, "T E"],
    qkv: Float[Tensor, "QKV E"],
    bias: Float[Tensor, "QKV"] | None,
    norm: Float[Tensor, "E"],
    eps: float,
    cosine: Float[Tensor, "T D2"],
    sine: Float[Tensor, "T D2"],
    keys: Float[Tensor, "NB KV D BS"],
    values: Float[Tensor, "NB KV BS D"],
    slot_mapping: Int[Tensor, "T"],
    query_norm: Float[Tensor, "D"] | None,
    key_norm: Float[Tensor, "D"] | None,
) -> Float[Tensor, "T H D"]:
    """Return rotated queries in float64 of a projection rounded to x's dtype; write keys and values to pages."""

    def rotate(y: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=-1)
        cos, sin = cosine.double()[:, None], sine.double()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    kv_heads, head_dim = keys.shape[1:3]
    projected = linear(x, qkv, bias, norm, eps, False).to(x.dtype).double()
    query, key, value = projected.unflatten(1, (-1, head_dim)).tensor_split((-2 * kv_heads, -kv_heads), dim=1)
    write_kv(keys, values, rotate(_normed(key, key_norm, eps)).to(keys.dtype), value.to(keys.dtype), slot_mapping)
    return rotate(_normed(query, query_norm, eps))


def _normed(y: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return y if weight is None else y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def sampling_scores(
    logits: Float[Tensor, "R V"],
    temperature: Float[Tensor, "R"],
    seed: Int[Tensor, "R"],
    position: Int[Tensor, "R"],
    token_ids: Int[Tensor, "V"] | None,
) -> Float[Tensor, "R V"]:
    """Return each token's logit / temperature + Gumbel noise in float64; the largest of a row is sampled."""
    if token_ids is None:
        token_ids = torch.arange(logits.shape[1])
    uniform = uniform_noise(seed, position, token_ids).clamp(max=1 - 2.0**-24)
    values = logits.double()
    for row, divisor in enumerate(temperature.tolist()):
        if divisor != 0:
            gumbel = -torch.log(-torch.log1p(-uniform[row].double()))
            values[row] = (values[row] - values[row].max()) / divisor + gumbel
    return values


def mask_tokens(logits: Float[Tensor, "R V"], allowed: Int[Tensor, "R W"]) -> Float[Tensor, "R V"]:
    """Return the logits after `ops.mask_tokens`."""
    masked = logits.clone()
    for row, words in enumerate(allowed.tolist()):
        for token in range(logits.shape[1]):
            if not words[token // 32] >> (token % 32) & 1:
                masked[row, token] = -math.inf
    return masked


def token_threshold(
    weights: Float[Tensor, "R V"], top_k: Int[Tensor, "R"], top_p: Float[Tensor, "R"]
) -> Float[Tensor, "R"]:
    """Return the last weight of each sorted row that top_k tokens, and then top_p of their sum, need."""
    thresholds = torch.zeros_like(top_p)
    for row, (k, p) in enumerate(zip(top_k.tolist(), top_p.tolist(), strict=True)):
        ordered = weights[row].double().sort(descending=True).values
        if k < len(ordered):
            thresholds[row] = ordered[k - 1]
            ordered = ordered[ordered >= ordered[k - 1]]
        if p < 1:
            mass = ordered.cumsum(0)
            thresholds[row] = ordered[mass >= p * mass[-1]][0]
    return thresholds
