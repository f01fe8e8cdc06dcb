"""The steps that the engine runs: pure functions of weights, inputs and cache, each compiled as one graph.

    decode_step     as many tokens of each sequence: decoding, and the verification of draft tokens
    prefill_step    any number of tokens of each sequence
    draft_step      one draft token of each sequence (in `layers.speculation`)

On CUDA each is compiled with `torch.compile(mode="reduce-overhead", fullgraph=True)`, all sizes symbolic.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec import ops
from dispec.layers.config import ModelConfig
from dispec.layers.model import hidden_states, logits, wanted_rows
from dispec.layers.sampling import greedy
from dispec.layers.types import Batch, KVCache, Weights


class Vocabulary(NamedTuple):
    """The tokens that logits are for. A draft model's are its target's.

    size: columns of the logits; where the model has fewer, the others are -inf, where it has more, they are cut.
    head_tokens: which tokens the rows of the head stand for, None for all in order; logits of the others are -inf.
    """

    size: int
    head_tokens: Int[Tensor, "V"] | None = None


class PreviousTokens(NamedTuple):
    """Token ids that the host does not know yet, where the device left them.

    source: 0 for a token whose id is in the batch, else 1 plus the place of its id in `token_ids`.
    """

    source: Int[Tensor, "T"]
    token_ids: Int[Tensor, "S"]


def decode_step(
    weights: Weights,
    config: ModelConfig,
    vocabulary: Vocabulary,
    batch: Batch,
    kv_cache: KVCache,
    previous: PreviousTokens | None,
    decoder: ops.Decoder | None = None,
) -> tuple[Float[Tensor, "R V"], Int[Tensor, "R"]]:
    """Logits and their argmax for the wanted rows of a uniform step: every sequence has T / B tokens.

    decoder: as in `layers.model.hidden_states`.
    """
    batch = batch._replace(query_len=batch.token_ids.shape[0] // batch.context_lens.shape[0])
    x = hidden_states(weights, config, _known(batch, config, vocabulary, previous), kv_cache, decoder)
    return head(wanted_rows(x, batch), weights, config, vocabulary)


def prefill_step(
    weights: Weights,
    config: ModelConfig,
    vocabulary: Vocabulary,
    batch: Batch,
    kv_cache: KVCache,
    previous: PreviousTokens | None,
) -> tuple[Float[Tensor, "T E"], Float[Tensor, "R V"], Int[Tensor, "R"]]:
    """The hidden states of all tokens of a ragged step; logits and their argmax for the wanted rows."""
    batch = _known(batch._replace(query_len=None), config, vocabulary, previous)
    x = hidden_states(weights, config, batch, kv_cache)
    return x, *head(wanted_rows(x, batch), weights, config, vocabulary)


def head(
    x: Float[Tensor, "R E"], weights: Weights, config: ModelConfig, vocabulary: Vocabulary
) -> tuple[Float[Tensor, "R V"], Int[Tensor, "R"]]:
    """Logits of hidden states, and their argmax."""
    found = logits(x, weights, config)
    size, head_tokens = vocabulary
    if head_tokens is not None:
        found = found.new_full((found.shape[0], size), -torch.inf).index_copy(1, head_tokens, found)
    elif size > config.vocab_size:
        found = torch.nn.functional.pad(found, (0, size - config.vocab_size), value=-torch.inf)
    elif size < config.vocab_size:
        found = found[:, :size]
    return found, greedy(found)


def _known(batch: Batch, config: ModelConfig, vocabulary: Vocabulary, previous: PreviousTokens | None) -> Batch:
    """The batch with the ids of all its tokens."""
    token_ids = batch.token_ids
    if previous is not None:
        place = previous.source.long() - 1
        sampled = previous.token_ids
        if config.shard is not None:  # the first rank alone samples
            sampled = ops.broadcast(sampled, config.shard.group)
        token_ids = torch.where(place < 0, token_ids, sampled.index_select(0, place.clamp(min=0)).to(token_ids.dtype))
    if vocabulary.size > config.vocab_size:
        token_ids = in_vocabulary(token_ids, config)
    return batch._replace(token_ids=token_ids)


def num_columns(vocabulary: Vocabulary, config: ModelConfig) -> int:
    """Return the number of tokens that the model's own head has logits for."""
    size, head_tokens = vocabulary
    return min(size, config.vocab_size) if head_tokens is None else len(head_tokens)


def in_vocabulary(token_ids: Int[Tensor, "*S"], config: ModelConfig) -> Int[Tensor, "*S"]:
    """Token ids that the model has an embedding for: a larger vocabulary is padded with ids that no tokenizer has."""
    return token_ids.clamp(max=config.vocab_size - 1)
