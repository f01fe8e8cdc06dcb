"""`dispec chat`: a conversation in a terminal, or through a pipe with one question a line."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from dispec.engine.sampling_params import SamplingParams
from dispec.serving.chat_output.chat_parser import ChatParser
from dispec.serving.chat_output.deltas import ContentDelta, ReasoningDelta
from dispec.serving.chat_output.reasoning import choose_reasoning_format
from dispec.serving.cli.console import explain, say

if TYPE_CHECKING:
    from dispec.engine.api.llm import LLM
    from dispec.engine.api.outputs import RequestOutput
    from dispec.engine.text.tokenizer import Tokenizer

_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"  # SGR 2 and 0 of ECMA-48
_BLANK_LINE = "\n\n"
_END_TOKENS = 16  # of a prompt, which may end with a marker of reasoning
_COMMAND = re.compile(r"/[a-z]+")  # matches a whole line: a question may begin with a path


class Turn(NamedTuple):
    """A question and its answer, which may have been stopped."""

    question: str
    answer: str


def converse(llm: "LLM", params: SamplingParams, system: str | None = None) -> Iterator["RequestOutput"]:
    """Read questions and write answers until the input ends; yield each answer that was not stopped.

    Raises ValueError for a model without a chat template.
    """
    if not llm.tokenizer.has_chat_template:
        raise ValueError("the model has no chat template: use `dispec generate --raw`")
    turns: list[Turn] = []
    while (line := _read_line()) is not None:
        question = line.strip()
        if _COMMAND.fullmatch(question):
            if question == "/exit":
                return
            if question == "/clear":
                turns = []
                say("forgotten")
            else:
                say(f"unknown command {question}: /clear forgets the conversation, /exit leaves")
        elif question:
            try:
                prompt, turns = fit(
                    turns, question, system, llm.chat_prompt, llm.engine.max_model_len, params.max_tokens
                )
                answer, output = _answer(llm, prompt, params)
            except ValueError as error:  # such as a question that is too long: the conversation goes on
                say(f"error: {explain(error)[0]}")
                continue
            if answer:
                turns.append(Turn(question, answer))
            if output is not None:
                yield output


def fit(
    turns: list[Turn],
    question: str,
    system: str | None,
    tokenize: Callable[[list[dict[str, str]]], list[int]],
    max_model_len: int,
    max_tokens: int,
) -> tuple[list[int], list[Turn]]:
    """Return the prompt of a conversation and the turns that it holds, without the oldest ones that do not fit.

    Room is kept for an answer of `max_tokens` tokens, or of a quarter of the context if that is less. The question
    always stays, so that a prompt without turns may still be too long.
    """
    room = min(max_tokens, max_model_len // 4)
    kept = turns
    while True:
        messages = [] if system is None else [{"role": "system", "content": system}]
        for turn in kept:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        prompt = tokenize([*messages, {"role": "user", "content": question}])
        if not kept or len(prompt) + room <= max_model_len:
            break
        kept = kept[1:]
    if dropped := len(turns) - len(kept):
        what = "oldest turn is" if dropped == 1 else f"{dropped} oldest turns are"
        say(f"the conversation no longer fits {max_model_len} tokens: its {what} forgotten")
    return prompt, kept


def _answer(llm: "LLM", prompt: list[int], params: SamplingParams) -> tuple[str, "RequestOutput | None"]:
    """Write an answer as it is generated; return its text and last output, which is None after Ctrl-C.

    The model's reasoning is no part of the text. A terminal shows it, dimmed.
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
                        print(f"{_BLANK_LINE if begins_answer else ''}{delta.text}", end="", flush=True)
                        texts.append(delta.text)
                    elif isinstance(delta, ReasoningDelta) and shows_reasoning:
                        print(f"{_DIM}{delta.text}{_NORMAL}", end="", flush=True)
    except KeyboardInterrupt:
        pass
    answer = "".join(texts)
    if not answer.endswith("\n"):
        print(flush=True)
    if last is None:
        say("stopped")
    return answer, last


def _parser(tokenizer: "Tokenizer", prompt: list[int]) -> ChatParser:
    reasoning = choose_reasoning_format("auto", tokenizer)
    if reasoning is None:
        return ChatParser()
    position = reasoning.position(tokenizer.decode(prompt[-_END_TOKENS:], skip_special_tokens=False))
    return ChatParser() if position == "after" else ChatParser(reasoning, position == "within")


def _read_line() -> str | None:
    """Return the next line, or None at the end of the input. A terminal shows a prompt and edits lines."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return sys.stdin.readline() or None
    with suppress(ImportError):
        import readline  # noqa: F401 (its import gives `input` editing and history)
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
