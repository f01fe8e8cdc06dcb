"""The tokens and logprobs that one launch of the model sampled, on their way to the host."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dispec.engine.scheduling.scheduler_output import ScheduledSequence
from dispec.engine.scheduling.token_output import TokenLogprobs
from dispec.layers.types import Logprobs


@dataclass
class SamplerOutput:
    """The samples of one launch, on the device or being copied to the host.

    rows: the sequence of each row of `token_ids`, [R], and `logprobs`. A sequence with draft tokens has a row for each
        of their positions and one for the position after the last. None where the sample is not used.
    prompt_logprobs: of the prompt tokens that follow those a sequence computed.
    """

    rows: list[ScheduledSequence | None]
    token_ids: Tensor | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: list[tuple[ScheduledSequence, Logprobs]] = field(default_factory=list)

    def to_host(self, token_ids: Tensor) -> "SamplerOutput":
        """Start the copy of all tensors to memory that the host can read.

        token_ids: pinned memory for the token ids, where they are on another device.
        """
        sampled = self.token_ids
        if sampled is not None and sampled.device != token_ids.device:
            sampled = token_ids[: len(sampled)].copy_(sampled, non_blocking=True)
        return SamplerOutput(
            self.rows,
            sampled,
            None if self.logprobs is None else Logprobs(*map(_to_host, self.logprobs)),
            [(item, Logprobs(*map(_to_host, values))) for item, values in self.prompt_logprobs],
        )

    def read(
        self,
        token_ids: dict[int, list[int]],
        logprobs: dict[int, list[TokenLogprobs]],
        prompt_logprobs: dict[int, list[TokenLogprobs]],
    ) -> None:
        """Add the values, which are on the host, to the dictionaries by sequence id."""
        if self.token_ids is not None:
            sampled = self.token_ids.tolist()
            values = None if self.logprobs is None else [value.tolist() for value in self.logprobs]
            for first, item in first_rows(self.rows):
                sequence = item.sequence
                end = first + 1
                if num_drafts := item.num_draft_tokens:
                    end += num_accepted(item.draft_token_ids, sampled[first : first + num_drafts])
                token_ids[sequence.id] = sampled[first:end]
                if values is not None and (count := sequence.params.logprobs) is not None:
                    rows = range(first, end)
                    logprobs[sequence.id] = [_token_logprobs(sampled[row], values, row, count) for row in rows]
        for item, tensors in self.prompt_logprobs:
            sequence, values = item.sequence, [value.tolist() for value in tensors]
            targets = sequence.token_ids[item.start + 1 : item.start + 1 + len(tensors.logprob)]
            count = sequence.params.prompt_logprobs or 0
            prompt_logprobs[sequence.id] = [
                _token_logprobs(token_id, values, row, count) for row, token_id in enumerate(targets)
            ]


def first_rows(rows: list[ScheduledSequence | None]) -> Iterator[tuple[int, ScheduledSequence]]:
    """Yield the first row of each sequence that samples."""
    row = 0
    while row < len(rows):
        item = rows[row]
        if item is not None:
            yield row, item
        row += 1 if item is None else 1 + item.num_draft_tokens


def num_accepted(drafts: list[int], sampled: list[int]) -> int:
    """Return the number of draft tokens before the first that differs from the sample at its position."""
    return next((index for index, draft in enumerate(drafts) if draft != sampled[index]), len(drafts))


def _token_logprobs(token_id: int, values: list[list], row: int, count: int) -> TokenLogprobs:
    """Return a row's logprobs with its `count` likeliest tokens. values: the fields of `Logprobs` as lists."""
    logprob, rank, top_logprobs, top_token_ids = (value[row] for value in values)
    likeliest = tuple(zip(top_token_ids[:count], top_logprobs[:count], strict=True))
    return TokenLogprobs(token_id, logprob, rank, likeliest)


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
