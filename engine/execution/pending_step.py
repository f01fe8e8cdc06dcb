"""A step that was launched on the device, and the draft tokens that the device computes for it."""

from typing import Any

import torch
from torch import Tensor

from dispec.engine.execution.ranks import Ranks
from dispec.engine.execution.sampler import SamplerOutput
from dispec.engine.scheduling.scheduler_output import ModelRunnerOutput
from dispec.engine.scheduling.sequence import Sequence


class DeviceDrafts:
    """Draft tokens that the device computes; the sequences' `draft.token_ids` hold placeholders until `wait`.

    num_draft_tokens: of each sequence, in the order of the rows of `token_ids`, [B, K].
    started: an event before the first draft token's computation.
    first_index: by sequence id, the place of its first draft token among the token ids that the target's step reads.
    """

    def __init__(self, num_draft_tokens: dict[Sequence, int], token_ids: Tensor, started: torch.cuda.Event) -> None:
        num_columns = token_ids.shape[1]
        self.first_index = {sequence.id: row * num_columns for row, sequence in enumerate(num_draft_tokens)}
        self.num_draft_tokens, self.token_ids, self.started = num_draft_tokens, token_ids, started
        self._host_token_ids = torch.empty_like(token_ids, device="cpu", pin_memory=True)
        self._host_token_ids.copy_(token_ids, non_blocking=True)
        self._ended = torch.cuda.Event(enable_timing=True)
        self._ended.record()
        for sequence, count in num_draft_tokens.items():
            sequence.draft.token_ids = [0] * count

    def wait(self) -> float:
        """Write the draft tokens to their sequences, and return the seconds that they took the device."""
        self._ended.synchronize()
        write_drafts(self.num_draft_tokens, self._host_token_ids)
        return 1e-3 * self.started.elapsed_time(self._ended)


def write_drafts(num_draft_tokens: dict[Sequence, int], token_ids: Tensor) -> None:
    """Set the sequences' `draft.token_ids` to the first tokens of their rows of `token_ids`, [B, K] on the host."""
    for (sequence, count), row in zip(num_draft_tokens.items(), token_ids.tolist(), strict=True):
        sequence.draft.token_ids = row[:count]


class PendingStep:
    """A step that the device was told to run.

    ranks: the other ranks that run the step, if there are any.
    draft_seconds: device time of the draft tokens that the step verifies, where the host did not wait for them.
    """

    def __init__(
        self,
        outputs: list[SamplerOutput],
        event: torch.cuda.Event | None,
        drafts: DeviceDrafts | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._outputs = outputs
        self._event = event
        self._drafts = drafts
        self._ranks = ranks
        self.draft_seconds = 0.0

    def wait(self) -> ModelRunnerOutput:
        """Return what the step sampled, once it has run. Raises TensorParallelError if another rank has failed."""
        if self._event is not None:
            self._event.synchronize()
        if self._ranks is not None:
            self._ranks.check()
        if self._drafts is not None:
            self.draft_seconds = self._drafts.wait()
        token_ids: dict[int, list[int]] = {}
        logprobs: dict[int, Any] = {}
        prompt_logprobs: dict[int, Any] = {}
        for output in self._outputs:
            output.read(token_ids, logprobs, prompt_logprobs)
        return ModelRunnerOutput(token_ids, logprobs, prompt_logprobs)
