"""Log-probabilities of given tokens and of the likeliest ones."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec.layers.types import Logprobs


def logprobs(logits: Float[Tensor, "R V"], token_ids: Int[Tensor, "R"], count: int) -> Logprobs:
    """Return log-probabilities, in float32, of `token_ids` and of the `count` likeliest tokens of each row.

    A token's rank is 1 plus the number of tokens that are more probable. Both values of a token that is among the
    likeliest are equal, because they are read from one tensor.
    """
    values = torch.log_softmax(logits.float(), dim=-1)
    logprob = values.gather(1, token_ids.long()[:, None])
    top = values.topk(count, dim=-1)
    return Logprobs(logprob[:, 0], (values > logprob).sum(-1) + 1, top.values, top.indices)
