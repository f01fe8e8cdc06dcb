"""A step that is under way."""

from typing import Any

import torch

from engine.step import StepResult
from engine.token_chooser import Choice


class Launched:
    """A step that the device was told to run."""

    def __init__(self, choices: list[Choice], event: torch.cuda.Event | None) -> None:
        self._choices = choices
        self._event = event

    def wait(self) -> StepResult:
        """What the step chose, once it has run."""
        if self._event is not None:
            self._event.synchronize()
        token_ids: dict[int, list[int]] = {}
        logprobs: dict[int, Any] = {}
        prompt_logprobs: dict[int, Any] = {}
        for choice in self._choices:
            choice.read(token_ids, logprobs, prompt_logprobs)
        return StepResult(token_ids, logprobs, prompt_logprobs)
