"""A transformer layer of a uniform step on CUDA, in as few kernels as its number of rows allows.

Few rows, no norms of heads: (1) norm, projection, rotation and page write; (2) attention and (3), where contexts are
split, its combination; (4) output and residual; (5) norm, gate and up; (6) down and residual. Norms of heads need whole
heads and take one more. What no configuration is known for is torch's product between kernels of ours.
"""

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from ops.norm import Norm
from ops.triton.add_product import add_product, split_evenly
from ops.triton.decode_attention import decode
from ops.triton.gate_product import gate_product
from ops.triton.layer_parts import gate_halves, norm_rows, rotate_heads
from ops.triton.rotate_product import Slots, rotate_product
from ops.triton.tuning import LayerConfig, choose_layer, describe


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
    config: LayerConfig | None = None,
) -> Tensor:
    """As `ops.decoder_layer`; every sequence has T / B queries. `config` replaces what the table would choose.

    Where a product and what follows it are one kernel, what it would have rounded in between stays in float32: gate and
    up, and sums before the residual is added. Normed rows are not rounded either, and on tensor cores in bfloat16 only
    after their weight.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x)
    x = x.contiguous()
    before, after = Norm(attention_norm, eps), Norm(mlp_norm, eps)
    if config is None:
        config = choose_layer(describe(x.device), x.shape[0], x.shape[1], qkv.shape[0], intermediate)
    early = config.early
    slots = Slots(keys, values, slot_mapping, cosine.contiguous(), sine.contiguous())
    of_output, of_down, both = _arrivals(output, down, config)
    slots = slots._replace(arrivals=both)
    normed, folded = (x, before) if config.qkv and config.folds_norm else (norm_rows(x, before)[0], None)
    if config.qkv is not None and query_norm is None:
        query = rotate_product(normed, qkv, qkv_bias, folded, slots, heads, config.qkv, early)
    else:
        if config.qkv is None:
            projected = linear(normed, qkv, qkv_bias)
        else:
            projected = add_product(normed, qkv, qkv_bias, None, folded, config.qkv, early)
        query = rotate_heads(projected, query_norm, key_norm, eps, slots, heads, early)
    query_len = x.shape[0] // context_lens.shape[0]
    attended = decode(query, keys, values, block_tables, context_lens, query_len, scale, early=early).flatten(1)
    folds = config.gate_up is not None and config.folds_norm
    if config.output is not None:
        x = add_product(attended, output, output_bias, x, None, config.output, early, of_output)
        normed = x if folds else norm_rows(x, after)[0]
    elif folds:
        normed = x = linear(attended, output, output_bias).add_(x)
    else:
        normed, x = norm_rows(linear(attended, output, output_bias), after, x)
    if config.gate_up is None:
        gated = gate_halves(linear(normed, gate_up))
    else:
        gated = gate_product(normed, gate_up, after if folds else None, config.gate_up, early)
    if config.down is None:
        return linear(gated, down).add_(x)
    return add_product(gated, down, None, x, None, config.down, early, of_down)


def _arrivals(output: Tensor, down: Tensor, config: LayerConfig) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Counters for the two products whose columns may be split, and the tensor that holds them; None where not."""
    sizes = []
    for weight, product in ((output, config.output), (down, config.down)):
        is_split = product is not None and split_evenly(weight.shape[1], product)[1] > 1
        sizes.append(triton.cdiv(weight.shape[0], product.block_n) if is_split and product is not None else 0)
    if not any(sizes):
        return None, None, None
    both = torch.empty(triton.next_power_of_2(sum(sizes)), dtype=torch.int32, device=output.device)
    return both[: sizes[0]], both[sizes[0] : sum(sizes)], both
