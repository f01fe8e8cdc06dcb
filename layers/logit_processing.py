"""Changes of logits before sampling: penalties, token masks, top-k, top-p and min-p.

They apply in the order of this file, which is that of transformers' generation. All of it traces into one graph, and
each row is processed by itself.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec import ops
from dispec.layers.sampling import scale_by_temperature
from dispec.layers.types import Penalties, SamplingFilters


def apply_penalties(logits: Float[Tensor, "R V"], penalties: Penalties) -> Float[Tensor, "R V"]:
    """Return the logits in float32, changed as `Penalties` says.

    The division is the repetition penalty of CTRL (Keskar et al. 2019, section 4.1), with multiplication for negative
    logits so that a penalty always lowers them.
    """
    flat = logits.float().flatten()
    index = penalties.indices.long()
    old = flat[index]
    new = torch.where(old > 0, old / penalties.scale, old * penalties.scale) + penalties.addend
    # Differences are added, not values stored: padding repeats an index that another entry may change, and adds 0.
    # The comparison keeps a logit of -inf from becoming NaN.
    difference = torch.where(new == old, torch.zeros_like(old), new - old)
    return flat.scatter_add(0, index, difference).view(logits.shape)


def apply_token_mask(logits: Float[Tensor, "R V"], allowed: Int[Tensor, "R W"]) -> Float[Tensor, "R V"]:
    """Return the logits with -inf for tokens that are not allowed. allowed: as in `ops.mask_tokens`."""
    masked = logits.clone()
    ops.mask_tokens(masked, allowed)
    return masked


def apply_top_k_top_p(
    logits: Float[Tensor, "R V"], temperature: Float[Tensor, "R"], filters: SamplingFilters
) -> Float[Tensor, "R V"]:
    """Return the logits in float32, not divided by the temperature, with -inf for tokens outside of the filters.

    The filters apply to softmax(logits / temperature), one after the other: the `top_k` most probable tokens; of these
    the fewest most probable ones that hold `top_p` of their probability (Holtzman et al. 2020); of these the ones with
    `min_p` times the probability of the likeliest (Nguyen et al. 2024). Equally probable tokens stay or go together.
    The likeliest token always stays, so greedy rows, of temperature 0, keep their argmax.
    """
    logits = logits.float()
    weights = torch.exp(scale_by_temperature(logits, temperature))
    threshold = torch.maximum(ops.token_threshold(weights, filters.top_k, filters.top_p), filters.min_p)
    return torch.where(weights >= threshold[:, None], logits, -torch.inf)
