"""A model for `dispec chat` that answers with given texts."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from dispec import SamplingParams
from dispec.engine.api.outputs import CompletionOutput, RequestMetrics, RequestOutput
from dispec.engine.text.text_stream import TextStream
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.cli.chat.session import ChatSession
from tests.scripted_engine import thinking_tokenizer


class ScriptedModel:
    """What a chat needs of an `LLM`. Each answer is the next of `answers`; one that is None is stopped by Ctrl-C.

    prompts, params: those of the answers so far.
    """

    def __init__(self, *answers: str | None, tokenizer: Tokenizer | None = None, max_model_len: int = 4096) -> None:
        self.engine = SimpleNamespace(max_model_len=max_model_len)
        self.tokenizer = tokenizer or thinking_tokenizer(are_special=True)
        self.answers = list(answers)
        self.drafts = (0, 0)  # draft tokens of each answer, and the accepted ones
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[Any]:
        self.prompts.append(self.tokenizer.decode(prompt, skip_special_tokens=False))
        self.params.append(params)
        answer = self.answers.pop(0)
        if answer is None:
            raise KeyboardInterrupt
        text = TextStream(self.tokenizer, params, prompt)
        token_ids = self.tokenizer.encode(answer)
        for count, token_id in enumerate(token_ids, start=1):
            is_last = count == len(token_ids)
            yield RequestOutput(
                request_id="0",
                prompt=None,
                prompt_token_ids=prompt,
                prompt_logprobs=None,
                outputs=[CompletionOutput(0, text.add(token_id, ends=False), [token_id])],
                finished=is_last,
                metrics=RequestMetrics(0.0, 0.5, 0.0, 0.5, 2.0, count, (count - 1) / 2.0, *self.drafts),
                num_cached_tokens=4,
            )


def chat_session(*answers: str | None, **settings: Any) -> ChatSession:
    """A conversation with a scripted model. settings: fields of `ChatSession`."""
    params = settings.pop("params", SamplingParams(max_tokens=100))
    return ChatSession(ScriptedModel(*answers), params, **settings)  # type: ignore[arg-type]
