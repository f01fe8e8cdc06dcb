"""What is done to logits before a token is chosen: edits, bans, and the restriction of draws to likely tokens.

They apply in the order of this file, as they do in transformers' generation. All of it traces into one graph, and what
happens to a row depends on that row alone.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec.layers.sampling import scaled
from dispec.layers.types import Edits, Filters
from dispec.ops import token_threshold


def apply_penalties(logits: Float[Tensor, "R V"], edits: Edits) -> Float[Tensor, "R V"]:
    """Change single logits as `Edits` says, in float32.

    The division is the repetition penalty of CTRL (Keskar et al. 2019, section 4.1), with multiplication for negative
    logits so that a penalty always lowers them.
    """
    flat = logits.float().flatten()
    index = edits.place.long()
    old = flat[index]
    new = torch.where(old > 0, old / edits.scale, old * edits.scale) + edits.addend
    # Differences are added, not values stored: padding repeats an index that another entry may change, and adds 0.
    # The comparison keeps a logit of -inf from becoming NaN.
    difference = torch.where(new == old, torch.zeros_like(old), new - old)
    return flat.scatter_add(0, index, difference).view(logits.shape)


def apply_token_mask(logits: Float[Tensor, "R V"], allowed: Int[Tensor, "R W"]) -> Float[Tensor, "R V"]:
    """-inf for tokens that are not allowed.

    `allowed` is int32, W = ceil(V / 32): token v has bit v % 32, counted from the least, of word v // 32. That is the
    layout of xgrammar's token bitmasks.
    """
    bits = (allowed[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    return torch.where(bits.flatten(1)[:, : logits.shape[1]] == 1, logits, -torch.inf)


def apply_top_k_top_p(
    logits: Float[Tensor, "R V"], temperature: Float[Tensor, "R"], filters: Filters
) -> Float[Tensor, "R V"]:
    """-inf for tokens that a draw may not choose; float32, not divided by the temperature.

    Of softmax(logits / temperature), what is kept is the `top_k` most probable tokens, of these the fewest most
    probable ones that hold `top_p` of their probability (Holtzman et al. 2020), of these the ones with `min_p` times
    the probability of the likeliest (Nguyen et al. 2024). Equally probable tokens stay or go together. The likeliest
    token always stays, so greedy rows, of temperature 0, keep their argmax.
    """
    logits = logits.float()
    weights = torch.exp(scaled(logits, temperature))
    threshold = torch.maximum(token_threshold(weights, filters.top_k, filters.top_p), filters.min_p)
    return torch.where(weights >= threshold[:, None], logits, -torch.inf)
