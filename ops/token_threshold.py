"""Top-k and top-p as a threshold: tokens of at least that weight may be sampled.

A threshold says the same as a sorted vocabulary with a mask and needs no sort: the Triton kernel bisects, the CPU sorts
a short prefix. Tokens are compared by weight alone, so tokens of equal weight stay or go together.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec.ops.registration import register

# Largest weights that a CPU sorts first: most rows of a language model need fewer.
_PREFIX = 256
# Relative difference of two float64 sums of a row in different orders is below this.
_SUM_TOLERANCE = 1e-9


def token_threshold(
    weights: Float[Tensor, "R V"], top_k: Int[Tensor, "R"], top_p: Float[Tensor, "R"]
) -> Float[Tensor, "R"]:
    """Return the largest t of each row for which the tokens of weight at least t suffice.

    weights: float32 probabilities scaled to a row maximum of 1, exp(logit - max). `top_k` tokens suffice (off from V
    on), and among them tokens with `top_p` of their weight (off at 1). Where both are off, t is 0. A row's result
    depends on that row alone.
    """
    return torch.ops.dispec.token_threshold(weights, top_k, top_p)


def _token_threshold_cpu(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Sort a prefix of every row, and more of a row where the threshold is beyond it.

    Both ways add the same numbers in the same order, so they give a row the same result.
    """
    size = weights.shape[1]
    prefix = weights.topk(min(_PREFIX, size)).values
    mass = prefix.double().cumsum(-1)
    last = prefix.shape[1] - 1

    is_counted, is_summed = top_k < size, top_p < 1
    kth = prefix.gather(1, (top_k.long() - 1).clamp(0, last)[:, None])
    floor = torch.where(is_counted[:, None], kth, torch.zeros_like(kth))
    counted = mass.gather(1, ((prefix >= floor).sum(-1, keepdim=True) - 1).clamp(min=0))[:, 0]
    total = torch.where(is_counted, counted, _row_sums(weights))
    position = (mass < (top_p.double() * total)[:, None]).sum(-1, keepdim=True)
    threshold = torch.where(is_summed[:, None], prefix.gather(1, position.clamp(max=last)), floor)[:, 0]

    # A prefix that ends with the k-th weight may lack other tokens of that weight.
    is_settled = (~is_counted | (prefix[:, -1] < floor[:, 0])) & (~is_summed | (position[:, 0] <= last))
    for row in (~is_settled).nonzero()[:, 0].tolist():
        threshold[row] = _sorted_threshold(weights[row], int(top_k[row]), float(top_p[row]), float(total[row]))
    return threshold


def _sorted_threshold(weights: Tensor, top_k: int, top_p: float, total: float) -> Tensor:
    """Return the threshold of one row, from as many of its largest weights as it needs."""
    size = len(weights)
    if top_k < size:
        kth = weights.topk(max(top_k, 1), sorted=False).values.min()
        if top_p >= 1:
            return kth
        kept = weights[~(weights < kth)]  # not empty even if all are NaN
    else:
        # All weights below `enough` sum to less than top_p leaves out; the factor 1/2 covers rounding. Most rows need
        # far fewer weights, and the sort costs most.
        enough = (1 - top_p) * total / size / 2
        for cutoff in (2.0**-8, 2.0**-12, 2.0**-16, enough):
            kept = weights[~(weights < max(cutoff, enough))]
            if cutoff <= enough or float(kept.sum(dtype=torch.float64)) >= (top_p + _SUM_TOLERANCE) * total:
                break
    # numpy, because torch's sort also returns indices and takes three times as long.
    kept = torch.from_numpy(np.sort(kept.numpy())[::-1].copy())
    mass = kept.double().cumsum(0)
    if top_k < size:
        total = float(mass[-1])
    return kept[min(int((mass < top_p * total).sum()), len(kept) - 1)]


def _row_sums(weights: Tensor) -> Tensor:
    """Return sums in float64, one call a row: torch divides the sum of one row differently among threads."""
    return torch.tensor([float(row.sum(dtype=torch.float64)) for row in weights], dtype=torch.float64)


def _token_threshold_cuda(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    from dispec.ops.triton.token_threshold import token_threshold as kernel

    return kernel(weights, top_k, top_p)


register(
    "token_threshold(Tensor weights, Tensor top_k, Tensor top_p) -> Tensor",
    lambda weights, *_: weights.new_empty(weights.shape[0]),
    cpu=_token_threshold_cpu,
    cuda=_token_threshold_cuda,
)
