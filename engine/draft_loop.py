"""Guesses of a draft model on a CPU, one after another.

But for the tokens, all that changes from one to the next is known beforehand. Where the model's layers are ops of ours
all guesses are one call (`ops.decode`); else, and where somebody restricts what may be drawn, the host writes the few
numbers that a step needs, and nothing else stands between two steps.

`engine.recorded_draft_loop` is the same for CUDA, where the host is far away.
"""

import functools
import operator
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ops
from engine.runner import Runner
from engine.sequence import Needs, Sequence
from engine.token_chooser import write_filters
from layers.config import ModelConfig
from layers.decoding import decoder
from layers.speculation import DraftState, guess
from layers.types import Batch, Filters, Sampling

# Tokens of a sequence that the draft model may not have computed: a guess that stood, and what followed it.
LAST_TOKENS = 2

# Where nothing is drawn.
_UNUSED = Sampling(*(torch.empty(0, dtype=kind) for kind in (torch.float32, torch.int64, torch.int32)))


class Guesser(NamedTuple):
    """A draft model. vocab_size: of its target. head_tokens: as in `layers.speculation.guess`."""

    config: ModelConfig
    runner: Runner
    vocab_size: int
    head_tokens: Tensor | None

    @property
    def num_columns(self) -> int:
        """Tokens that it may guess."""
        return min(self.vocab_size, self.config.vocab_size) if self.head_tokens is None else len(self.head_tokens)

    def guess(self, state: DraftState) -> Tensor:
        """A token of each sequence."""
        weights, cache = self.runner.weights, self.runner.kv_cache
        return guess(weights, self.config, state, cache, self.vocab_size, self.head_tokens)

    def decoder(self, max_model_len: int) -> ops.Decoder | None:
        """What makes many guesses in one call; None where that is not to be had."""
        weights, cache = self.runner.weights, self.runner.kv_cache
        return decoder(weights, self.config, cache, max_model_len, self.num_columns, self.head_tokens)


def num_missing(sequence: Sequence) -> int:
    """Tokens that the draft model has not computed."""
    return len(sequence.token_ids) - sequence.num_drafter_tokens


def can_loop(sequence: Sequence) -> bool:
    """Whether nothing that a guess of it depends on is known to the host alone."""
    return len(sequence.token_ids) >= LAST_TOKENS and not sequence.needs & (Needs.EDIT | Needs.MASK)


class DraftLoop:
    """Guesses for sequences of which the draft model has computed all but the last two tokens."""

    def __init__(self, guesser: Guesser, max_num_seqs: int, max_model_len: int) -> None:
        self._guesser = guesser
        self._decoder = guesser.decoder(max_model_len)
        self._block_size = guesser.runner.block_size
        self._rows = torch.arange(LAST_TOKENS * max_num_seqs + 1, dtype=torch.int32)

    @torch.inference_mode()
    def run(self, depths: dict[Sequence, int]) -> None:
        """Guess so many tokens of each sequence, into its `draft_token_ids`."""
        # Those with most guesses first, so that the others can be left out when they have theirs.
        depths = dict(sorted(depths.items(), key=lambda item: -item[1]))
        # One more token than was missing is computed again: a uniform step is that much faster.
        query_len = LAST_TOKENS if any(num_missing(sequence) > 1 for sequence in depths) else 1
        needs = functools.reduce(operator.or_, (sequence.needs for sequence in depths))
        if self._decoder is not None and not needs & Needs.RESTRICT:
            found = self._decode(self._decoder, depths, query_len, draws=bool(needs & Needs.DRAW)).tolist()
            for (sequence, count), guessed in zip(depths.items(), found, strict=True):
                sequence.draft_token_ids = guessed[:count]
            return
        state = self._first(list(depths), query_len, needs)
        token_ids = self._guesser.guess(state)
        guesses = [token_ids.tolist()]
        for place in range(1, max(depths.values())):
            guessing = [sequence for sequence, count in depths.items() if count > place]
            state = self._following(state, token_ids[: len(guessing)], guessing, place)
            token_ids = self._guesser.guess(state)
            guesses.append(token_ids.tolist())
        for row, (sequence, count) in enumerate(depths.items()):
            sequence.draft_token_ids = [guesses[place][row] for place in range(count)]

    @staticmethod
    def _decode(decoder: ops.Decoder, depths: dict[Sequence, int], query_len: int, *, draws: bool) -> Tensor:
        """All guesses in one call."""
        return ops.decode(
            decoder,
            _int32(depths.values()),
            _int32(chain.from_iterable(sequence.token_ids[-query_len:] for sequence in depths)).view(-1, query_len),
            _block_tables(list(depths)),
            _int32(len(sequence.token_ids) for sequence in depths),
            _temperatures(depths) if draws else None,
            _seeds(depths) if draws else None,
        )

    def _first(self, sequences: list[Sequence], query_len: int, needs: int) -> DraftState:
        tables = _block_tables(sequences)
        last = _int32(chain.from_iterable(sequence.token_ids[-query_len:] for sequence in sequences))
        batch = self._batch(sequences, last, tables, 0, query_len)
        sampling = _UNUSED
        if needs & Needs.DRAW:
            sampling = Sampling(_temperatures(sequences), _seeds(sequences), batch.context_lens)
        filters = None
        if needs & Needs.RESTRICT:
            filters = Filters(last.new_empty(len(sequences)), *torch.empty(2, len(sequences)))
            write_filters(sequences, self._guesser.num_columns, *(field.numpy() for field in filters))
        return DraftState(batch, sampling, bool(needs & Needs.DRAW), filters)

    def _following(self, state: DraftState, token_ids: Tensor, guessing: list[Sequence], place: int) -> DraftState:
        """After `place` guesses, of the first sequences alone, which are to have more."""
        count = len(guessing)
        batch = self._batch(guessing, token_ids.to(torch.int32), state.batch.block_tables[:count], place, 1)
        sampling, filters = state.sampling, state.filters
        if state.draws:
            sampling = Sampling(sampling.temperature[:count], sampling.seed[:count], batch.context_lens)
        if filters is not None:
            filters = Filters(*(field[:count] for field in filters))
        return DraftState(batch, sampling, state.draws, filters)

    def _batch(
        self, sequences: list[Sequence], token_ids: Tensor, block_tables: Tensor, place: int, query_len: int
    ) -> Batch:
        ends = [len(sequence.token_ids) + place for sequence in sequences]
        positions = [position for end in ends for position in range(end - query_len, end)]
        tables = chain.from_iterable([sequence.block_table] * query_len for sequence in sequences)
        size = self._block_size
        slots = _int32(
            table[position // size] * size + position % size for table, position in zip(tables, positions, strict=True)
        )
        starts = self._rows[: len(positions) + 1 : query_len]
        return Batch(
            token_ids,
            _int32(positions),
            slots,
            block_tables,
            starts.contiguous(),
            _int32(ends),
            starts[1:] - 1 if query_len > 1 else self._rows[: len(ends)],
            query_len,
        )


def _block_tables(sequences: list[Sequence]) -> Tensor:
    tables = np.zeros((len(sequences), max(2, *(len(sequence.block_table) for sequence in sequences))), np.int32)
    for row, sequence in zip(tables, sequences, strict=True):
        row[: len(sequence.block_table)] = sequence.block_table
    return torch.from_numpy(tables)


def _temperatures(sequences: Iterable[Sequence]) -> Tensor:
    return torch.from_numpy(np.fromiter((sequence.params.temperature for sequence in sequences), np.float32))


def _seeds(sequences: Iterable[Sequence]) -> Tensor:
    return torch.from_numpy(np.fromiter((sequence.seed for sequence in sequences), np.int64))


def _int32(values: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.fromiter(values, dtype=np.int32))
