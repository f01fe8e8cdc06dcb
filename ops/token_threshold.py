"""How large a token's weight must be for it to be among the top_k, and then the top_p, of its row.

A threshold for each row says the same as a sorted vocabulary with a mask, and is found without sorting: the kernel
bisects, the CPU sorts a short prefix. Tokens are compared by weight alone, so ties stand or fall together.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_library = torch.library.Library("dispec", "FRAGMENT")
_library.define("token_threshold(Tensor weights, Tensor top_k, Tensor top_p) -> Tensor")

# Sorted weights that are looked at first on CPU. Most draws of a language model are settled within fewer.
_PREFIX = 256
# Of a row's sum: more than what float64 sums of one row in two orders differ by.
_SLACK = 1e-9


def token_threshold(
    weights: Float[Tensor, "R V"], top_k: Int[Tensor, "R"], top_p: Float[Tensor, "R"]
) -> Float[Tensor, "R"]:
    """The largest t of each row for which the tokens of weight at least t are enough.

    `weights` are float32 probabilities scaled to a row maximum of 1, exp(logit - max). Enough are `top_k` tokens (off
    from V on), and then tokens that hold `top_p` of the weight of those (off at 1). Where both are off t is 0. Each
    row's result depends on that row alone.
    """
    return torch.ops.dispec.token_threshold(weights, top_k, top_p)


def _token_threshold_cpu(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Sort a prefix of every row, and more only of the rows that it does not settle.

    Both ways add the same numbers in the same order, so a row's result is the same whichever way it goes.
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

    # A prefix that ends with the k-th weight may leave out others like it.
    is_settled = (~is_counted | (prefix[:, -1] < floor[:, 0])) & (~is_summed | (position[:, 0] <= last))
    for row in (~is_settled).nonzero()[:, 0].tolist():
        threshold[row] = _sorted_threshold(weights[row], int(top_k[row]), float(top_p[row]), float(total[row]))
    return threshold


def _sorted_threshold(weights: Tensor, top_k: int, top_p: float, total: float) -> Tensor:
    """The threshold of one row, from as many of its weights as it takes, sorted."""
    size = len(weights)
    if top_k < size:
        kth = weights.topk(max(top_k, 1), sorted=False).values.min()
        if top_p >= 1:
            return kth
        kept = weights[~(weights < kth)]  # never empty, not even of NaN
    else:
        # All weights below this are together less than the part that top_p leaves out; half of it allows for rounding.
        # Most rows need far fewer, and the sort is what costs.
        enough = (1 - top_p) * total / size / 2
        for cutoff in (2.0**-8, 2.0**-12, 2.0**-16, enough):
            kept = weights[~(weights < max(cutoff, enough))]
            if cutoff <= enough or float(kept.sum(dtype=torch.float64)) >= (top_p + _SLACK) * total:
                break
    # By numpy: torch's sort keeps the indices too, and takes three times as long.
    kept = torch.from_numpy(np.sort(kept.numpy())[::-1].copy())
    mass = kept.double().cumsum(0)
    if top_k < size:
        total = float(mass[-1])
    return kept[min(int((mass < top_p * total).sum()), len(kept) - 1)]


def _row_sums(weights: Tensor) -> Tensor:
    """Sums in float64. One call a row, because a sum is split among threads otherwise for one row than for two."""
    return torch.tensor([float(row.sum(dtype=torch.float64)) for row in weights], dtype=torch.float64)


def _token_threshold_cuda(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    from dispec.ops.triton.token_threshold import token_threshold as kernel

    return kernel(weights, top_k, top_p)


def _token_threshold_fake(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    return weights.new_empty(weights.shape[0])


_library.impl("token_threshold", _token_threshold_cpu, "CPU")
_library.impl("token_threshold", _token_threshold_cuda, "CUDA")
torch.library.register_fake("dispec::token_threshold", _token_threshold_fake, lib=_library)
