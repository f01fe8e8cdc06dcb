"""An answer as it is generated.

It is shown as plain text, Markdown included: a rendered answer would have to be drawn again with each token, which
flickers once it is taller than the terminal, and what is copied from it would not be what the model wrote.
"""

import sys
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from dispec.engine.sampling_params import SamplingParams
from dispec.serving.chat_output.chat_parser import ChatParser
from dispec.serving.chat_output.deltas import ContentDelta, ReasoningDelta
from dispec.serving.chat_output.reasoning import choose_reasoning_format
from dispec.serving.cli.chat.terminal import dimmed
from dispec.serving.cli.console import printable

if TYPE_CHECKING:
    from dispec.engine.api.llm import LLM
    from dispec.engine.api.outputs import RequestOutput
    from dispec.engine.text.tokenizer import Tokenizer

_BLANK_LINE = "\n\n"
_END_TOKENS = 16  # of a prompt, which may end with a marker of reasoning


class Answer(NamedTuple):
    """The text of an answer, without the model's reasoning. last: its last output, None if Ctrl-C stopped it."""

    text: str
    last: "RequestOutput | None"


def write_answer(llm: "LLM", prompt: list[int], params: SamplingParams) -> Answer:
    """Write an answer to standard output as it is generated, and return it.

    A terminal shows the model's reasoning too, dimmed.
    """
    texts: list[str] = []
    last = None
    parser, shows_reasoning = _parser(llm.tokenizer, prompt), sys.stdout.isatty()
    if parser.may_be_reasoning:  # some vocabularies have its markers as special tokens
        params = replace(params, skip_special_tokens=False)
    try:
        with closing(llm.stream(prompt, params)) as outputs:
            for output in outputs:
                last = output if output.finished else None
                for delta in [*parser.add(output.outputs[0].text), *(parser.finish() if output.finished else ())]:
                    if isinstance(delta, ContentDelta):
                        begins_answer = not texts and parser.has_reasoning and shows_reasoning
                        print(f"{_BLANK_LINE if begins_answer else ''}{printable(delta.text)}", end="", flush=True)
                        texts.append(delta.text)
                    elif isinstance(delta, ReasoningDelta) and shows_reasoning:
                        print(dimmed(printable(delta.text)), end="", flush=True)
    except KeyboardInterrupt:
        pass
    text = "".join(texts)
    if not text.endswith("\n"):
        print(flush=True)
    return Answer(text, last)


def _parser(tokenizer: "Tokenizer", prompt: list[int]) -> ChatParser:
    reasoning = choose_reasoning_format("auto", tokenizer)
    if reasoning is None:
        return ChatParser()
    position = reasoning.position(tokenizer.decode(prompt[-_END_TOKENS:], skip_special_tokens=False))
    return ChatParser() if position == "after" else ChatParser(reasoning, position == "within")
