"""From a step's logits to its tokens: only what a sequence of the step asks for is computed.

    logits ─► edit ─► allow ─► restrict ─► draw ─► tokens        greedy steps take the model's own argmax
        └───────────────────────────────────────► logprobs

Each function is compiled for several rows; a single row, as of a prompt's logprobs, runs eagerly.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dispec.engine.execution.compiled_steps import compiled, mark_dynamic
from dispec.engine.sampling_params import MAX_LOGPROBS
from dispec.engine.scheduling.scheduler_output import ScheduledSequence
from dispec.engine.scheduling.sequence import SamplingFeatures, Sequence, TokenLogprobs
from dispec.layers.logit_processing import apply_penalties, apply_token_mask, apply_top_k_top_p
from dispec.layers.logprobs import logprobs
from dispec.layers.sampling import draw, greedy
from dispec.layers.types import Edits, Filters, Logprobs, Sampling
from dispec.ops import has_sample_kernel

# Rows of logits of a prompt that exist at a time: 49152 of them in fp32 are 25 MB, 152064 are 78 MB.
_PROMPT_ROWS = 128


@dataclass
class SamplerOutput:
    """The tokens that one launch sampled, on the device or on their way to the host.

    sampled: the work whose next token each row of `tokens` and `logprobs` is. A work with draft tokens has a row for
        each of their positions and one for the position after the last.
    prompt_logprobs: of the tokens after those that a work computed.
    """

    sampled: list[ScheduledSequence | None]
    tokens: Tensor | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: list[tuple[ScheduledSequence, Logprobs]] = field(default_factory=list)

    def to_host(self) -> "SamplerOutput":
        """Start the transfer of everything to memory that the host can read."""
        return SamplerOutput(
            self.sampled,
            None if self.tokens is None else _to_host(self.tokens),
            None if self.logprobs is None else Logprobs(*map(_to_host, self.logprobs)),
            [(scheduled, Logprobs(*map(_to_host, found))) for scheduled, found in self.prompt_logprobs],
        )

    def read(
        self,
        token_ids: dict[int, list[int]],
        token_logprobs: dict[int, list[TokenLogprobs]],
        prompt_logprobs: dict[int, list[TokenLogprobs]],
    ) -> None:
        """Add what arrived to the dictionaries, by sequence id."""
        if self.tokens is not None:
            chosen = self.tokens.tolist()
            wanted: list[tuple[int, int]] = []
            wanting: list[int] = []
            for first, scheduled in _first_rows(self.sampled):
                sequence = scheduled.sequence
                count = 1 + _num_right(scheduled.draft_token_ids if scheduled.num_drafts else [], chosen[first:])
                token_ids[sequence.id] = chosen[first : first + count]
                if sequence.params.logprobs is not None:
                    wanted += [(row, sequence.params.logprobs) for row in range(first, first + count)]
                    wanting += [sequence.id] * count
            if self.logprobs is not None:
                found = _token_logprobs(self.logprobs, chosen, wanted)
                for sequence_id, value in zip(wanting, found, strict=True):
                    token_logprobs.setdefault(sequence_id, []).append(value)
        for scheduled, values in self.prompt_logprobs:
            sequence, count = scheduled.sequence, len(values.chosen)
            targets = sequence.token_ids[scheduled.start + 1 : scheduled.start + 1 + count]
            top = sequence.params.prompt_logprobs or 0
            prompt_logprobs[sequence.id] = list(_token_logprobs(values, targets, [(row, top) for row in range(count)]))


class Functions(NamedTuple):
    """The functions of sampling, compiled or not."""

    apply_penalties: Callable[..., Tensor]
    apply_token_mask: Callable[..., Tensor]
    apply_top_k_top_p: Callable[..., Tensor]
    draw: Callable[..., Tensor]
    greedy: Callable[..., Tensor]
    logprobs: Callable[..., Logprobs]


_EAGER = Functions(apply_penalties, apply_token_mask, apply_top_k_top_p, draw, greedy, logprobs)


def compiled_functions(device: torch.device) -> Functions:
    """Return functions of which those that pass over the vocabulary many times are compiled when first called.

    Before the first step, each of `calls_of_each` must have run.
    """
    functions = _EAGER._replace(
        apply_top_k_top_p=compiled(apply_top_k_top_p, replays=False), logprobs=compiled(logprobs, replays=False)
    )
    # A call of a compiled function costs the host five times what the single op does.
    return functions if has_sample_kernel(device) else functions._replace(draw=compiled(draw, replays=False))


def calls_of_each(functions: Functions, logits: Tensor, sampling: Sampling) -> list[Callable[[], object]]:
    """A call of every function; compiled ones are traced for any number of rows from two on."""
    rows, vocab_size = logits.shape
    device = logits.device
    logits = logits.float()
    words = torch.zeros(rows, -(-vocab_size // 32), dtype=torch.int32, device=device)
    place = torch.zeros(16, dtype=torch.int64, device=device)
    edits = Edits(place, *(torch.zeros(16, device=device) for _ in range(2)))
    ones = torch.ones(rows, device=device)
    filters = Filters(torch.full_like(sampling.position, vocab_size), ones, torch.zeros_like(ones))
    tokens = torch.zeros(rows, dtype=torch.int64, device=device)
    if functions is not _EAGER:
        for tensor in (logits, *sampling, words, tokens, *edits, *filters):
            mark_dynamic(tensor, 0)
    return [
        partial(functions.draw, logits, sampling),
        partial(functions.apply_penalties, logits, edits),
        partial(functions.apply_token_mask, logits, words),
        partial(functions.apply_top_k_top_p, logits, sampling.temperature, filters),
        partial(functions.greedy, logits),
        partial(functions.logprobs, logits, tokens, _num_logprobs(vocab_size)),
    ]


def _num_logprobs(vocab_size: int) -> int:
    return min(MAX_LOGPROBS, vocab_size)


def write_filters(
    sequences: Series[Sequence | None], num_columns: int, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray
) -> None:
    """Write each row's top-k, top-p and min-p to the fields of `Filters`; rows without a sequence keep all tokens."""
    top_k[:], top_p[:], min_p[:] = num_columns, 1.0, 0.0
    for row, sequence in enumerate(sequences):
        if sequence is not None and sequence.sampling_features & SamplingFeatures.TOP_K_TOP_P:
            params = sequence.params
            if params.top_k > 0:
                top_k[row] = min(params.top_k, num_columns)
            top_p[row], min_p[row] = params.top_p, params.min_p


class Sampler:
    """Samples the tokens of a launch.

    head: logits of rows of hidden states. functions: eager, until compiled ones replace them.
    """

    def __init__(self, device: torch.device, vocab_size: int, head: Callable[[Tensor], Tensor]) -> None:
        self.device = device
        self.vocab_size = vocab_size
        self._head = head
        self._count = _num_logprobs(vocab_size)
        self.functions = _EAGER

    def forget_compiled(self) -> None:
        """Run eagerly again."""
        self.functions = _EAGER

    def run_all(self, logits: Tensor, sampling: Sampling) -> None:
        """Run every function once on all rows of the logits."""
        for call in calls_of_each(self.functions, logits, sampling):
            call()

    def choose(
        self,
        scheduled: tuple[ScheduledSequence, ...],
        sampled: list[ScheduledSequence | None],
        hidden: Tensor | None,
        logits: Tensor,
        chosen: Tensor,
        sampling: Sampling,
    ) -> SamplerOutput:
        """Return the next token of each work in `sampled`, in the launch's first rows.

        hidden: of every token of `work`, [T, E], where the launch is ragged. chosen: the argmax of `logits`.
        """
        choice = SamplerOutput(sampled)
        if sampled:
            sampling_features = 0
            for item in sampled:
                if item is not None:
                    sampling_features |= item.sequence.sampling_features
            choice.tokens = self._tokens(sampling_features, sampled, logits, chosen, sampling)
            if sampling_features & SamplingFeatures.LOGPROBS:
                choice.logprobs = self._pick(len(logits)).logprobs(logits.float(), choice.tokens, self._count)
        if hidden is not None:
            choice.prompt_logprobs = list(self._prompt_logprobs(scheduled, hidden))
        return choice

    def _tokens(
        self,
        sampling_features: int,
        sampled: list[ScheduledSequence | None],
        logits: Tensor,
        chosen: Tensor,
        sampling: Sampling,
    ) -> Tensor:
        rows = len(logits)
        functions = self._pick(rows)
        if not sampling_features & (SamplingFeatures.RANDOM | SamplingFeatures.PENALTIES | SamplingFeatures.TOKEN_MASK):
            return chosen
        # The compiled functions take float32 alone.
        if (
            sampling_features
            & (SamplingFeatures.PENALTIES | SamplingFeatures.TOKEN_MASK | SamplingFeatures.TOP_K_TOP_P)
            or self.functions.draw is not draw
        ):
            logits = logits.float()
        if sampling_features & SamplingFeatures.PENALTIES and (edits := self._edits(sampled)) is not None:
            logits = functions.apply_penalties(logits, edits)
        if sampling_features & SamplingFeatures.TOKEN_MASK and (words := self._allowed(sampled, rows)) is not None:
            logits = functions.apply_token_mask(logits, words)
        if not sampling_features & SamplingFeatures.RANDOM:
            return functions.greedy(logits)
        if sampling_features & SamplingFeatures.TOP_K_TOP_P:
            logits = functions.apply_top_k_top_p(logits, sampling.temperature, self._filters(sampled, rows))
        return functions.draw(logits, sampling)

    def _pick(self, rows: int) -> Functions:
        return _EAGER if rows == 1 else self.functions

    def _edits(self, sampled: list[ScheduledSequence | None]) -> Edits | None:
        """Return the changes of single logits by the rows' penalties and biases; None if there are none."""
        places, scales, addends = [], [], []
        for first, item in _first_rows(sampled):
            sequence = item.sequence
            if sequence.sampling_features & SamplingFeatures.PENALTIES:
                assert sequence.logits_processors is not None
                after_each = [*sequence.logits_processors.entries_ahead(sequence.token_ids, item.draft_token_ids)]
                for row, (tokens, scale, addend) in enumerate(after_each[-item.num_sampled :], first):
                    places.append(tokens + row * self.vocab_size)
                    scales.append(scale)
                    addends.append(addend)
        size = sum(map(len, places))
        if not size:
            return None
        # A power of two, so that allocations are reused; never 1, which the compiler takes for a case of its own.
        padded = max(16, 1 << (size - 1).bit_length())
        neutral: tuple[np.ndarray, ...] = (
            np.zeros(padded, np.int64),
            np.ones(padded, np.float32),
            np.zeros(padded, np.float32),
        )
        for array, parts in zip(neutral, (places, scales, addends), strict=True):
            np.concatenate(parts, out=array[:size])
        return Edits(*(self._upload(array) for array in neutral))

    def _allowed(self, sampled: list[ScheduledSequence | None], rows: int) -> Tensor | None:
        """Return bit masks of the tokens that each row may sample; None if these are all tokens."""
        masks = {}
        for first, item in _first_rows(sampled):
            sequence = item.sequence
            if sequence.sampling_features & SamplingFeatures.TOKEN_MASK:
                assert sequence.logits_processors is not None
                # Tokens that the step itself computes count as generated, even before the host knows them.
                generated = item.start + item.num_tokens - item.num_drafts - sequence.num_prompt_tokens
                for ahead in range(item.num_drafts + 1):
                    guesses = item.draft_token_ids[: len(item.draft_token_ids) - item.num_drafts + ahead]
                    token_ids = [*sequence.token_ids, *guesses] if guesses else sequence.token_ids
                    mask = sequence.logits_processors.allowed_mask(generated + ahead, token_ids)
                    if mask is not None:
                        masks[first + ahead] = mask
        if not masks:
            return None
        words = np.full((rows, -(-self.vocab_size // 32)), -1, np.int32)
        for row, mask in masks.items():
            words[row] = mask.view(np.int32)
        return self._upload(words)

    def _filters(self, sampled: list[ScheduledSequence | None], rows: int) -> Filters:
        filters = np.empty(rows, np.int32), np.empty(rows, np.float32), np.empty(rows, np.float32)
        write_filters([None if item is None else item.sequence for item in sampled], self.vocab_size, *filters)
        return Filters(*map(self._upload, filters))

    def _prompt_logprobs(
        self, scheduled: tuple[ScheduledSequence, ...], hidden: Tensor
    ) -> Iterator[tuple[ScheduledSequence, Logprobs]]:
        first = 0
        for item in scheduled:
            sequence = item.sequence
            # What follows the prompt's last token is no part of the prompt.
            count = min(item.num_tokens, sequence.num_prompt_tokens - 1 - item.start)
            if sequence.sampling_features & SamplingFeatures.PROMPT_LOGPROBS and count > 0:
                targets = self._upload(np.array(sequence.token_ids[item.start + 1 : item.start + 1 + count], np.int64))
                parts = [
                    self._logprobs_of(hidden[first + row : first + min(row + _PROMPT_ROWS, count)], targets[row:])
                    for row in range(0, count, _PROMPT_ROWS)
                ]
                yield item, Logprobs(*map(torch.cat, zip(*parts, strict=True)))
            first += item.num_tokens

    def _logprobs_of(self, hidden: Tensor, targets: Tensor) -> Logprobs:
        rows = len(hidden)
        logits = self._head(hidden)
        # A copy, because targets is a view with an offset, on which the compiler would guard.
        return self._pick(rows).logprobs(logits.float(), targets[:rows].clone(), self._count)

    def _upload(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def _first_rows(sampled: list[ScheduledSequence | None]) -> Iterator[tuple[int, ScheduledSequence]]:
    """Yield each work that samples, with the first of its rows."""
    row = 0
    while row < len(sampled):
        scheduled = sampled[row]
        if scheduled is not None:
            yield row, scheduled
        row += scheduled.num_sampled if scheduled is not None else 1


def _num_right(drafts: list[int], chosen: list[int]) -> int:
    """Return the number of accepted draft tokens: those before the first that differs from its position's sample."""
    return next((index for index, draft in enumerate(drafts) if draft != chosen[index]), len(drafts))


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _token_logprobs(values: Logprobs, token_ids: list[int], wanted: list[tuple[int, int]]) -> Iterator[TokenLogprobs]:
    """Yield the logprobs of each wanted (row, count), with the row's `count` likeliest tokens."""
    chosen, rank, top, top_ids = (value.tolist() for value in values)
    for row, count in wanted:
        likeliest = tuple(zip(top_ids[row][:count], top[row][:count], strict=True))
        yield TokenLogprobs(token_ids[row], chosen[row], rank[row], likeliest)
