"""The reasoning of a model before its answer, between two markers of its family."""

from typing import Literal, NamedTuple

from dispec.engine.text.tokenizer import Tokenizer


class ReasoningFormat(NamedTuple):
    """The markers of reasoning. name: for `--reasoning-parser`, one of `settings.ReasoningParserName`."""

    name: str
    start: str = "<think>"
    end: str = "</think>"

    def position(self, prompt: str, begun: str = "") -> Literal["before", "within", "after"]:
        """Return where an output begins: before a start marker that may follow, within the reasoning, or after it.

        prompt: the rendered conversation. begun: the message that the output continues, if any.
        """
        end = prompt.rstrip()
        if end.endswith(self.start) or begun.rfind(self.start) > begun.rfind(self.end):
            return "within"
        return "after" if end.endswith(self.end) or begun.strip() else "before"

    def token_ids(self, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens of the start and the end marker: one each in the vocabularies of reasoning models."""
        start, end = (tuple(tokenizer.encode(marker, add_special_tokens=False)) for marker in (self.start, self.end))
        return start, end


# The families whose markers are not <think> and </think>.
_OTHERS = (
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>"),
)


def choose_reasoning_format(name: str, tokenizer: Tokenizer | None) -> ReasoningFormat | None:
    """Return the format of `--reasoning-parser`, None for a model without reasoning.

    "auto" finds the start marker in the chat template, and both markers among the tokens.
    """
    if tokenizer is None or name == "none":
        return None
    if name != "auto":
        return next((known for known in _OTHERS if known.name == name), ReasoningFormat(name))
    template, vocabulary = tokenizer.chat_template or "", tokenizer.vocabulary
    for known in (ReasoningFormat("think"), *_OTHERS):
        if known.start in template and known.start in vocabulary and known.end in vocabulary:
            return known
    return None


class ReasoningParser:
    """Splits the text of one choice into reasoning, which comes first, and answer, without the space between them.

    is_open: the prompt ends within the reasoning, so that the text begins there. Else it has reasoning if it begins
        with the start marker.
    """

    def __init__(self, format: ReasoningFormat, is_open: bool = False) -> None:
        self.has_reasoning = is_open
        self.has_ended = False
        self._format = format
        self._held = ""
        self._has_begun = False  # whether the text is past a start marker, if any
        self._has_text = {"reasoning": False, "answer": False}

    def add(self, text: str) -> tuple[str, str]:
        """Return reasoning and answer that the text makes certain. What may be a marker is held back."""
        if self.has_ended:
            return "", self._without_first_lines("answer", text)
        self._held += text
        if not self._has_begun and not self._begin():
            return "", ""
        if not self.has_reasoning:
            self.has_ended, held, self._held = True, self._held, ""
            self._has_text["answer"] = True  # a text without reasoning stays as it is
            return "", held
        reasoning, marker, answer = self._held.partition(self._format.end)
        if marker:
            self.has_ended, self._held = True, ""
            found = self._without_first_lines("reasoning", reasoning.rstrip())
            return found, self._without_first_lines("answer", answer)
        certain = self._held[: len(self._held) - _overlap(self._held, self._format.end)].rstrip()
        self._held = self._held[len(certain) :]
        return self._without_first_lines("reasoning", certain), ""

    def finish(self) -> tuple[str, str]:
        """Return what was held back, at the end of the output."""
        held, self._held = self._held, ""
        if self.has_reasoning and not self.has_ended:
            return self._without_first_lines("reasoning", held.rstrip()), ""
        return "", held

    def _begin(self) -> bool:
        """Drop a start marker; return whether the text is long enough to tell."""
        held = self._held.lstrip()
        if held.startswith(self._format.start):
            self.has_reasoning, self._held = True, held[len(self._format.start) :]
        elif self._format.start.startswith(held):
            return False
        self._has_begun = True
        return True

    def _without_first_lines(self, part: str, text: str) -> str:
        if not self._has_text[part]:
            text = text.lstrip("\n")
            self._has_text[part] = bool(text)
        return text


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of the text with which the marker begins."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
