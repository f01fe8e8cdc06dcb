"""The requests of one caller, and their outputs until they are read."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from dispec.engine.api.outputs import RequestOutput
from dispec.engine.api.prompts import TokenizedPrompt
from dispec.engine.api.running_request import RunningRequest
from dispec.engine.sampling_params import RequestOutputKind, SamplingParams
from dispec.engine.structured_output.grammar_compiler import Grammar


class PreparedRequest(NamedTuple):
    """A request that passed the checks of its texts. engine_params: `params` without texts."""

    prompt: TokenizedPrompt
    params: SamplingParams
    engine_params: SamplingParams
    grammar: Grammar | None


@dataclass(eq=False)
class Call:
    """The requests of one caller.

    outputs: in the order of arrival, each with its request's index, until the caller reads them.
    num_open: requests that have not ended.
    num_prompt_tokens, num_output_tokens: that were computed so far, prompt tokens from the cache included.
    error: the reason why no more outputs come.
    """

    requests: list[RunningRequest] = field(default_factory=list)
    outputs: deque[tuple[int, RequestOutput]] = field(default_factory=deque)
    num_open: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: Exception | None = None

    def take(self) -> tuple[int, RequestOutput] | None:
        """Return the next output; None if there is none. Any thread may call it."""
        try:
            return self.outputs.popleft()
        except IndexError:
            return None

    def put(self, index: int, output: RequestOutput) -> None:
        """Append an output of a request. One that holds all tokens so far replaces one that was not read."""
        if len(self.requests) == 1 and self.requests[0].kind is RequestOutputKind.CUMULATIVE:
            self.outputs.clear()
        self.outputs.append((index, output))
