"""The state of `dispec chat`: a model, a conversation with it, and its settings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dispec.engine.sampling_params import SamplingParams
from dispec.serving.cli.chat.answer import write_answer
from dispec.serving.cli.chat.conversation import Turn, fit
from dispec.serving.cli.chat.statistics import ChatStatistics, answer_line
from dispec.serving.cli.chat.terminal import say_dimmed
from dispec.serving.cli.console import say

if TYPE_CHECKING:
    from dispec.engine.api.llm import LLM


@dataclass
class ChatSession:
    """A conversation and the settings of its next answer.

    default_params: those at the start, to which settings return.
    file: of the last `/save` or `/load`, which a further `/save` may overwrite.
    Raises ValueError for a model without a chat template.
    """

    llm: "LLM"
    params: SamplingParams
    system: str | None = None
    shows_statistics: bool = True
    turns: list[Turn] = field(default_factory=list)
    statistics: ChatStatistics = field(default_factory=ChatStatistics)
    file: Path | None = None
    is_over: bool = False

    def __post_init__(self) -> None:
        self.default_params = self.params
        if not self.llm.tokenizer.has_chat_template:
            raise ValueError("the model has no chat template: use `dispec generate --raw`")

    @property
    def max_model_len(self) -> int:
        return self.llm.engine.max_model_len

    def ask(self, question: str) -> bool:
        """Write the answer to a question and remember both; return whether the answer is complete.

        Raises ValueError, such as for a question that is longer than the context, and remembers nothing then.
        """
        return self._answer(self.turns, question)

    def retry(self) -> bool:
        """Replace the last answer by another. Raises ValueError where there is none."""
        return self._answer(self.turns[:-1], self.last_turn().question)

    def last_turn(self) -> Turn:
        """Return the last question and its answer. Raises ValueError where there is none."""
        if not self.turns:
            raise ValueError("nothing was asked yet")
        return self.turns[-1]

    def _answer(self, turns: list[Turn], question: str) -> bool:
        prompt, kept = fit(
            turns, question, self.system, self.llm.chat_prompt, self.max_model_len, self.params.token_limit
        )
        text, last = write_answer(self.llm, prompt, self.params)
        if text:
            self.turns = [*kept, Turn(question, text)]
        if last is None:
            say("stopped")
            return False
        self.statistics.add(last)
        if self.shows_statistics:
            say_dimmed(answer_line(last, self.max_model_len))
        return True
