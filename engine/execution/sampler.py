"""From a step's logits to its tokens: only features that a sequence of the step uses are computed.

    logits ─► penalties ─► token mask ─► top-k, top-p, min-p ─► sample ─► tokens
        └──────────────────────────────────────────────────────► logprobs

Greedy steps without penalties and masks take the model's own argmax. Functions are compiled for two rows or more; a
single row, as of a prompt's logprobs, runs eagerly.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dispec.engine.execution.compiled_steps import compile_function, mark_dynamic
from dispec.engine.execution.sampler_output import SamplerOutput, first_rows
from dispec.engine.sampling_params import MAX_LOGPROBS
from dispec.engine.scheduling.scheduler_output import ScheduledSequence
from dispec.engine.scheduling.sequence import SamplingFeatures, Sequence
from dispec.layers.logit_processing import apply_penalties, apply_token_mask, apply_top_k_top_p
from dispec.layers.logprobs import logprobs
from dispec.layers.sampling import greedy, sample
from dispec.layers.types import Logprobs, Penalties, Sampling, SamplingFilters
from dispec.ops import has_sample_kernel

# Rows of a prompt's logits that exist at a time: of 49152 tokens in float32 they are 25 MB, of 152064 tokens 78 MB.
_PROMPT_ROWS = 128


class SamplerFunctions(NamedTuple):
    """The functions of sampling, compiled or not."""

    apply_penalties: Callable[..., Tensor]
    apply_token_mask: Callable[..., Tensor]
    apply_top_k_top_p: Callable[..., Tensor]
    sample: Callable[..., Tensor]
    greedy: Callable[..., Tensor]
    logprobs: Callable[..., Logprobs]


_EAGER = SamplerFunctions(apply_penalties, apply_token_mask, apply_top_k_top_p, sample, greedy, logprobs)


def compiled_functions(device: torch.device) -> SamplerFunctions:
    """Return functions of which those that pass over the vocabulary many times are compiled when first called.

    Before the first step, each of `warm_up_calls` must have run.
    """
    functions = _EAGER._replace(
        apply_top_k_top_p=compile_function(apply_top_k_top_p, replays=False),
        logprobs=compile_function(logprobs, replays=False),
    )
    # A call of a compiled function takes the host five times as long as a call of the single op.
    return (
        functions if has_sample_kernel(device) else functions._replace(sample=compile_function(sample, replays=False))
    )


def warm_up_calls(functions: SamplerFunctions, logits: Tensor, sampling: Sampling) -> list[Callable[[], object]]:
    """Return a call of every function; compiled ones are traced for any number of rows from two on."""
    rows, vocab_size = logits.shape
    logits = logits.float()
    zeros = partial(torch.zeros, device=logits.device)
    mask = zeros(rows, _num_words(vocab_size), dtype=torch.int32) - 1
    penalties = Penalties(zeros(16, dtype=torch.int64), zeros(16), zeros(16))
    filters = SamplingFilters(torch.full_like(sampling.position, vocab_size), zeros(rows) + 1, zeros(rows))
    token_ids = zeros(rows, dtype=torch.int64)
    if functions is not _EAGER:
        for tensor in (logits, *sampling, mask, token_ids, *penalties, *filters):
            mark_dynamic(tensor, 0)
    return [
        partial(functions.sample, logits, sampling),
        partial(functions.apply_penalties, logits, penalties),
        partial(functions.apply_token_mask, logits, mask),
        partial(functions.apply_top_k_top_p, logits, sampling.temperature, filters),
        partial(functions.greedy, logits),
        partial(functions.logprobs, logits, token_ids, _num_logprobs(vocab_size)),
    ]


def _num_logprobs(vocab_size: int) -> int:
    return min(MAX_LOGPROBS, vocab_size)


def _num_words(vocab_size: int) -> int:
    """Return the number of int32 words of a token mask."""
    return -(-vocab_size // 32)


def write_sampling_filters(
    sequences: list[Sequence | None], num_tokens: int, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray
) -> None:
    """Write each row's top-k, top-p and min-p; rows without a sequence keep all `num_tokens` tokens."""
    top_k[:], top_p[:], min_p[:] = num_tokens, 1.0, 0.0
    for row, sequence in enumerate(sequences):
        if sequence is not None and sequence.sampling_features & SamplingFeatures.TOP_K_TOP_P:
            params = sequence.params
            if params.top_k > 0:
                top_k[row] = min(params.top_k, num_tokens)
            top_p[row], min_p[row] = params.top_p, params.min_p


class Sampler:
    """Samples the tokens of a launch.

    compute_logits: of rows of hidden states, for prompt logprobs.
    functions: eager, until compiled ones replace them.
    """

    def __init__(self, device: torch.device, vocab_size: int, compute_logits: Callable[[Tensor], Tensor]) -> None:
        self.device = device
        self.vocab_size = vocab_size
        self._compute_logits = compute_logits
        self._num_logprobs = _num_logprobs(vocab_size)
        self.functions = _EAGER

    def use_eager_functions(self) -> None:
        """Run eagerly again."""
        self.functions = _EAGER

    def run_all(self, logits: Tensor, sampling: Sampling) -> None:
        """Run every function once on all rows of the logits."""
        for call in warm_up_calls(self.functions, logits, sampling):
            call()

    def sample(
        self,
        scheduled: tuple[ScheduledSequence, ...],
        rows: list[ScheduledSequence | None],
        hidden: Tensor | None,
        logits: Tensor,
        argmax: Tensor,
        sampling: Sampling,
    ) -> SamplerOutput:
        """Return the token that each row of the logits, [R, V], samples.

        rows: the sequence of each row, in order; the logits may have more rows, which are padding.
        hidden: of every scheduled token, [T, E], where the step is ragged.
        """
        output = SamplerOutput(rows)
        if rows:
            features = 0
            for item in rows:
                if item is not None:
                    features |= item.sequence.sampling_features
            output.token_ids = self._token_ids(features, rows, logits, argmax, sampling)
            if features & SamplingFeatures.LOGPROBS:
                functions = self._functions_for(len(logits))
                output.logprobs = functions.logprobs(logits.float(), output.token_ids, self._num_logprobs)
        if hidden is not None:
            output.prompt_logprobs = list(self._prompt_logprobs(scheduled, hidden))
        return output

    def _token_ids(
        self,
        features: int,
        rows: list[ScheduledSequence | None],
        logits: Tensor,
        argmax: Tensor,
        sampling: Sampling,
    ) -> Tensor:
        num_rows = len(logits)
        functions = self._functions_for(num_rows)
        changed = features & (SamplingFeatures.PENALTIES | SamplingFeatures.TOKEN_MASK)
        if not changed and not features & SamplingFeatures.RANDOM:
            return argmax
        # Compiled functions take float32 alone. The kernels of `argmax` and `sample` read the model's dtype and masks.
        takes_float32 = SamplingFeatures.PENALTIES | SamplingFeatures.TOP_K_TOP_P
        if features & takes_float32 or self.functions.sample is not sample:
            logits = logits.float()
        if features & SamplingFeatures.PENALTIES and (penalties := self._penalties(rows)) is not None:
            logits = functions.apply_penalties(logits, penalties)
        mask = self._token_mask(rows, num_rows) if features & SamplingFeatures.TOKEN_MASK else None
        if mask is not None and (features & SamplingFeatures.TOP_K_TOP_P or not has_sample_kernel(self.device)):
            logits, mask = functions.apply_token_mask(logits, mask), None
        if not features & SamplingFeatures.RANDOM:
            return functions.greedy(logits, mask)
        if features & SamplingFeatures.TOP_K_TOP_P:
            logits = functions.apply_top_k_top_p(logits, sampling.temperature, self._filters(rows, num_rows))
        return functions.sample(logits, sampling) if mask is None else functions.sample(logits, sampling, allowed=mask)

    def _functions_for(self, num_rows: int) -> SamplerFunctions:
        return _EAGER if num_rows == 1 else self.functions

    def _penalties(self, rows: list[ScheduledSequence | None]) -> Penalties | None:
        """Return the changes of single logits by penalties and biases; None if there are none."""
        entries: list[tuple[np.ndarray, ...]] = []
        for first, item in first_rows(rows):
            sequence = item.sequence
            if sequence.sampling_features & SamplingFeatures.PENALTIES:
                assert sequence.logits_processors is not None
                after_each = [*sequence.logits_processors.entries_ahead(sequence.token_ids, item.draft_token_ids)]
                for row, (token_ids, scale, addend) in enumerate(after_each[-item.num_sampled :], first):
                    entries.append((token_ids + row * self.vocab_size, scale, addend))
        size = sum(len(token_ids) for token_ids, _, _ in entries)
        if not size:
            return None
        # A power of two, so that allocations are reused; never 1, on which the compiler specialises.
        padded = max(16, 1 << (size - 1).bit_length())
        neutral: tuple[np.ndarray, ...] = (
            np.zeros(padded, np.int64),
            np.ones(padded, np.float32),
            np.zeros(padded, np.float32),
        )
        for array, parts in zip(neutral, zip(*entries, strict=True), strict=True):
            np.concatenate(parts, out=array[:size])
        return Penalties(*map(self._upload, neutral))

    def _token_mask(self, rows: list[ScheduledSequence | None], num_rows: int) -> Tensor:
        """Return bit masks of the tokens that each row may sample.

        They are computed while the device runs the model, straight into memory that it can copy from.
        """
        words = torch.full(
            (num_rows, _num_words(self.vocab_size)), -1, dtype=torch.int32, pin_memory=self.device.type == "cuda"
        )
        masks = words.numpy()
        for first, item in first_rows(rows):
            sequence = item.sequence
            if sequence.sampling_features & SamplingFeatures.TOKEN_MASK:
                assert sequence.logits_processors is not None
                # Tokens that the step itself computes count as output, even before the host knows them.
                drafts = item.draft_token_ids
                # A draft model's step samples after all draft tokens so far, a verification after each.
                num_output = item.start + item.num_tokens - len(drafts) - sequence.num_prompt_tokens
                own = masks[first : first + item.num_sampled]
                sequence.logits_processors.write_masks(own, sequence.token_ids, num_output, drafts)
        return words.to(self.device, non_blocking=True)

    def _filters(self, rows: list[ScheduledSequence | None], num_rows: int) -> SamplingFilters:
        filters = np.empty(num_rows, np.int32), np.empty(num_rows, np.float32), np.empty(num_rows, np.float32)
        write_sampling_filters([None if item is None else item.sequence for item in rows], self.vocab_size, *filters)
        return SamplingFilters(*map(self._upload, filters))

    def _prompt_logprobs(
        self, scheduled: tuple[ScheduledSequence, ...], hidden: Tensor
    ) -> Iterator[tuple[ScheduledSequence, Logprobs]]:
        first = 0
        for item in scheduled:
            sequence = item.sequence
            # The token after the prompt's last one belongs to the output.
            count = min(item.num_tokens, sequence.num_prompt_tokens - 1 - item.start)
            if sequence.sampling_features & SamplingFeatures.PROMPT_LOGPROBS and count > 0:
                targets = self._upload(np.array(sequence.token_ids[item.start + 1 : item.start + 1 + count], np.int64))
                parts = zip(hidden[first : first + count].split(_PROMPT_ROWS), targets.split(_PROMPT_ROWS), strict=True)
                found: list[Any] = [self._logprobs(*part) for part in parts]
                yield item, Logprobs(*map(torch.cat, zip(*found, strict=True)))
            first += item.num_tokens

    def _logprobs(self, hidden: Tensor, targets: Tensor) -> Logprobs:
        logits = self._compute_logits(hidden).float()
        # A copy, because targets is a view with an offset, on which the compiler would guard.
        return self._functions_for(len(hidden)).logprobs(logits, targets.clone(), self._num_logprobs)

    def _upload(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
