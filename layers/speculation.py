"""One draft token of each sequence, and the state of the next one: a draft loop is this step k times.

Draft tokens are sampled as the target samples its tokens, with the noise of the sequence's seed and position, so that
both sample the same token wherever they agree (Gumbel coupling, arXiv:2408.07978). A head of some tokens alone samples
with those tokens' noise.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from dispec.layers.config import ModelConfig
from dispec.layers.logit_processing import apply_top_k_top_p
from dispec.layers.model import hidden_states, logits, select_rows
from dispec.layers.sampling import greedy, sample
from dispec.layers.steps import Vocabulary, clamp_to_vocabulary
from dispec.layers.types import Batch, KVCache, Sampling, SamplingFilters, Weights, slots_of


class DraftState(NamedTuple):
    """The inputs of the next draft token of each sequence. `batch` is uniform and selects the last token of each.

    last_positions: of the last token of each sequence that gets keys and values. A sequence that has all its draft
        tokens repeats this position, with the padding block as the target of its writes.
    sampling: None where all draft tokens are greedy.
    filters: None where no sequence filters. `top_k` counts the tokens that the head knows.
    """

    batch: Batch
    last_positions: Int[Tensor, "B"]
    sampling: Sampling | None
    filters: SamplingFilters | None


def draft_step(
    weights: Weights, config: ModelConfig, vocabulary: Vocabulary, state: DraftState, kv_cache: KVCache
) -> tuple[Int[Tensor, "B"], DraftState]:
    """Return a draft token of each sequence, and the state one token later. Writes keys and values.

    The state's batch has T / B tokens of each sequence: all that the model has not computed yet.
    """
    batch = state.batch
    token_ids = clamp_to_vocabulary(batch.token_ids, config, vocabulary)
    batch = batch._replace(token_ids=token_ids, query_len=token_ids.shape[0] // batch.context_lens.shape[0])
    found = logits(select_rows(hidden_states(weights, config, batch, kv_cache), batch), weights, config)
    if vocabulary.head_tokens is None:
        found = found[:, : vocabulary.size]
    if state.sampling is None:
        token_ids = greedy(found)
    else:
        if state.filters is not None:
            found = apply_top_k_top_p(found, state.sampling.temperature, state.filters)
        token_ids = sample(found, state.sampling, vocabulary.head_tokens)
    if vocabulary.head_tokens is not None:
        token_ids = vocabulary.head_tokens.index_select(0, token_ids)
    return token_ids, _advance(state, token_ids, kv_cache.block_size)


def _advance(state: DraftState, token_ids: Int[Tensor, "B"], block_size: int) -> DraftState:
    batch, last_positions = state.batch, state.last_positions
    positions = torch.minimum(batch.context_lens, last_positions)
    blocks = batch.block_tables.gather(1, (positions // block_size).long()[:, None])[:, 0]
    slots = torch.where(batch.context_lens <= last_positions, slots_of(blocks, positions, block_size), 0)
    num_seqs = batch.context_lens.shape[0]
    query_start = torch.arange(num_seqs + 1, dtype=batch.query_start.dtype, device=positions.device)
    following = Batch(
        token_ids=token_ids.to(batch.token_ids.dtype),
        positions=positions,
        slot_mapping=slots.to(batch.slot_mapping.dtype),
        block_tables=batch.block_tables,
        query_start=query_start,
        context_lens=positions + 1,
        # Not None: the first step selects rows, and all steps are one graph.
        logits_indices=query_start[:-1].clone(),
    )
    sampling = None if state.sampling is None else state.sampling._replace(position=state.sampling.position + 1)
    return state._replace(batch=following, sampling=sampling)
