"""A step that is under way."""

from typing import TYPE_CHECKING, Any

import torch

from dispec.engine.execution.sampler import SamplerOutput
from dispec.engine.scheduling.scheduler_output import ModelRunnerOutput

if TYPE_CHECKING:
    from dispec.engine.speculation.draft_loop import DeviceDrafts


class PendingStep:
    """A step that the device was told to run.

    draft_seconds: what the device took, before the step, for draft tokens that the host did not wait for.
    """

    def __init__(
        self, choices: list[SamplerOutput], event: torch.cuda.Event | None, drafts: "DeviceDrafts | None" = None
    ) -> None:
        self._choices = choices
        self._event = event
        self._drafts = drafts
        self.draft_seconds = 0.0

    def wait(self) -> ModelRunnerOutput:
        """Return what the step sampled, once it has run."""
        if self._event is not None:
            self._event.synchronize()
        if self._drafts is not None:
            self.draft_seconds = self._drafts.wait()
        token_ids: dict[int, list[int]] = {}
        logprobs: dict[int, Any] = {}
        prompt_logprobs: dict[int, Any] = {}
        for choice in self._choices:
            choice.read(token_ids, logprobs, prompt_logprobs)
        return ModelRunnerOutput(token_ids, logprobs, prompt_logprobs)
