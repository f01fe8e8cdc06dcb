"""A draft model's guesses: one step to the next with nothing of the host's in between.

Guesses are chosen as their target chooses tokens, with the noise of the sequence's seed and position, so that both
choose the same token wherever they agree (Gumbel coupling, arXiv:2408.07978). A head that knows some tokens alone
draws with those tokens' noise.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from layers.config import ModelConfig
from layers.logit_processing import restrict
from layers.model import forward
from layers.sampling import draw, greedy
from layers.types import Batch, Filters, KVCache, Sampling, Weights


class DraftState(NamedTuple):
    """What the next guess of each sequence follows from; `batch` is uniform and wants the logits of last tokens.

    draws: whether any token is drawn; else all are the likeliest ones.
    filters: None where nobody restricts what may be drawn. `top_k` counts the tokens that the head knows.
    """

    batch: Batch
    sampling: Sampling
    draws: bool = True
    filters: Filters | None = None


def guess(
    weights: Weights,
    config: ModelConfig,
    state: DraftState,
    kv_cache: KVCache,
    vocab_size: int,
    head_tokens: Int[Tensor, "V"] | None,
) -> Int[Tensor, "B"]:
    """Guess a token of each sequence; writes keys and values.

    vocab_size: of the target, whose tokens are guessed. head_tokens: what the columns of the logits stand for, if not
    for all tokens in order.
    """
    batch, sampling = state.batch, state.sampling
    if config.vocab_size < vocab_size:  # padding of the larger vocabulary, which no tokenizer knows
        batch = batch._replace(token_ids=batch.token_ids.clamp(max=config.vocab_size - 1))
    logits = forward(weights, config, batch, kv_cache)
    if head_tokens is None:
        logits = logits[:, :vocab_size]
    if state.draws:
        if state.filters is not None:
            logits = restrict(logits, sampling.temperature, state.filters)
        token_ids = draw(logits, sampling, head_tokens)
    else:
        token_ids = greedy(logits)
    return token_ids if head_tokens is None else head_tokens[token_ids]


def advance(
    state: DraftState, token_ids: Int[Tensor, "B"], last_positions: Int[Tensor, "B"], block_size: int
) -> DraftState:
    """The state one token later.

    last_positions: of the last token of each sequence whose keys and values are to be computed. A sequence that has its
    guesses stays where it is, and what it computes goes into the padding block.
    """
    batch, sampling = state.batch, state.sampling
    positions = torch.minimum(batch.context_lens, last_positions)
    blocks = batch.block_tables.gather(1, (positions // block_size).long()[:, None])[:, 0]
    slots = torch.where(batch.context_lens <= last_positions, blocks * block_size + positions % block_size, 0).to(
        batch.slot_mapping.dtype
    )
    size = len(batch.context_lens)
    rows = torch.arange(size + 1, dtype=batch.query_start.dtype, device=positions.device)
    following = Batch(
        token_ids=token_ids.to(batch.token_ids.dtype),
        positions=positions,
        slot_mapping=slots,
        block_tables=batch.block_tables,
        query_start=rows,
        context_lens=positions + 1,
        logits_indices=rows[:-1],
        query_len=1,
    )
    return state._replace(batch=following, sampling=sampling._replace(position=sampling.position + 1))
