"""The steps that the engine runs: pure functions of weights, inputs and cache, each compiled as one graph.

    decode_step     equally many tokens of each sequence: decoding, and the verification of draft tokens
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
from dispec.layers.model import hidden_states, logits, select_rows
from dispec.layers.sampling import greedy
from dispec.layers.types import Batch, KVCache, Weights


class Vocabulary(NamedTuple):
    """The tokens that have logits. A draft model takes its target's.

    size: columns of the logits. Columns beyond the model's own are -inf; of a larger model the last ones are cut.
    head_tokens: the token of each row of the head, None for all in order. Logits of other tokens are -inf.
    """

    size: int
    head_tokens: Int[Tensor, "V"] | None = None

    def num_head_tokens(self, config: ModelConfig) -> int:
        """Return the number of tokens that the model's own head has logits for."""
        return min(self.size, config.vocab_size) if self.head_tokens is None else len(self.head_tokens)


class PreviousTokens(NamedTuple):
    """Token ids that earlier steps left on the device, and that the host may not know yet.

    indices: for each token of the batch, 0 if `Batch.token_ids` has its id, else 1 plus the index of its id in
        `token_ids` here.
    """

    indices: Int[Tensor, "T"]
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
    """Run a uniform step, T / B tokens of each sequence. Return the logits of its selected rows and their argmax.

    decoder: as in `layers.model.hidden_states`.
    """
    batch = batch._replace(query_len=batch.token_ids.shape[0] // batch.context_lens.shape[0])
    x = hidden_states(weights, config, _fill_in(batch, config, vocabulary, previous), kv_cache, decoder)
    return head(select_rows(x, batch), weights, config, vocabulary)


def prefill_step(
    weights: Weights,
    config: ModelConfig,
    vocabulary: Vocabulary,
    batch: Batch,
    kv_cache: KVCache,
    previous: PreviousTokens | None,
    decoder: ops.Decoder | None = None,
) -> tuple[Float[Tensor, "T E"], Float[Tensor, "R V"], Int[Tensor, "R"]]:
    """Run a ragged step. Return the hidden states of all tokens, the logits of the selected rows and their argmax.

    decoder: as in `layers.model.hidden_states`.
    """
    batch = _fill_in(batch._replace(query_len=None), config, vocabulary, previous)
    x = hidden_states(weights, config, batch, kv_cache, decoder)
    return x, *head(select_rows(x, batch), weights, config, vocabulary)


def head(
    x: Float[Tensor, "R E"], weights: Weights, config: ModelConfig, vocabulary: Vocabulary
) -> tuple[Float[Tensor, "R V"], Int[Tensor, "R"]]:
    """Return the logits of hidden states and their argmax."""
    found = logits(x, weights, config)
    size, head_tokens = vocabulary
    if head_tokens is not None:
        found = found.new_full((found.shape[0], size), -torch.inf).index_copy(1, head_tokens, found)
    elif size > config.vocab_size:
        found = torch.nn.functional.pad(found, (0, size - config.vocab_size), value=-torch.inf)
    elif size < config.vocab_size:
        found = found[:, :size]
    return found, greedy(found)


def _fill_in(batch: Batch, config: ModelConfig, vocabulary: Vocabulary, previous: PreviousTokens | None) -> Batch:
    """Return the batch with the token ids that are on the device."""
    token_ids = batch.token_ids
    if previous is not None:
        index = previous.indices.long() - 1
        sampled = previous.token_ids
        if config.shard is not None:  # the first rank alone samples
            sampled = ops.broadcast(sampled, config.shard.group)
        token_ids = torch.where(index < 0, token_ids, sampled.index_select(0, index.clamp(min=0)).to(token_ids.dtype))
    return batch._replace(token_ids=clamp_to_vocabulary(token_ids, config, vocabulary))


def clamp_to_vocabulary(token_ids: Int[Tensor, "*S"], config: ModelConfig, vocabulary: Vocabulary) -> Int[Tensor, "*S"]:
    """Return token ids that the model has an embedding for. Ids beyond its own vocabulary are padding of a larger one,
    which no tokenizer produces."""
    return token_ids.clamp(max=config.vocab_size - 1) if vocabulary.size > config.vocab_size else token_ids
