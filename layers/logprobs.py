"""Log-probabilities of chosen tokens and of the likeliest ones."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec.layers.types import Logprobs


def logprobs(logits: Float[Tensor, "R V"], token_ids: Int[Tensor, "R"], count: int) -> Logprobs:
    """Natural log-probabilities, in float32, of `token_ids` and of the `count` likeliest tokens of each row.

    A token's rank is 1 plus the number of tokens that are more probable. All values are of one tensor, so that a
    token's own is exactly the one it has among the likeliest.
    """
    values = torch.log_softmax(logits.float(), dim=-1)
    chosen = values.gather(1, token_ids.long()[:, None])
    top = values.topk(count, dim=-1)
    return Logprobs(chosen[:, 0], (values > chosen).sum(-1) + 1, top.values, top.indices)
