"""The Python face of the engine: `LLM.generate`, `.chat`, `.stream`."""

import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.detokenize import IncrementalDetokenizer
from engine.engine import Engine
from engine.options import EngineOptions
from engine.sequence import FinishReason, SamplingParams, Sequence
from engine.tokenizer import Tokenizer
from layers.config import ModelConfig

Prompt = str | Series[int]


@dataclass(frozen=True)
class Timing:
    """When what happened to a request, in seconds from its arrival. `first_token` includes queueing and prefill."""

    first_token: float
    finished: float

    def tokens_per_second(self, num_tokens: int) -> float:
        """The rate of decoding after the first token; 0 where there was only one."""
        elapsed = self.finished - self.first_token
        return (num_tokens - 1) / elapsed if num_tokens > 1 and elapsed > 0 else 0.0


@dataclass(frozen=True)
class Completion:
    """A finished request. `text` leaves special tokens out, `token_ids` has them."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    timing: Timing


@dataclass(frozen=True)
class Piece:
    """News of a streamed request: the text that has become certain, and on the last one the whole completion."""

    text: str
    token_id: int | None
    completion: Completion | None = None


@dataclass
class _Request:
    sequence: Sequence
    detokenizer: IncrementalDetokenizer | None
    text: list[str]
    first_token: float = 0.0

    def take(self, token_id: int) -> str:
        """Note a token's arrival; the text that it makes certain."""
        if self.sequence.num_output_tokens == 1:
            self.first_token = time.perf_counter() - self.sequence.arrival_time
        # The token that ends a sequence is not part of its text, special or not.
        ends = self.sequence.finish_reason == "stop"
        new = "" if self.detokenizer is None or ends else self.detokenizer.add(token_id)
        if self.sequence.finish_reason is not None and self.detokenizer is not None:
            new += self.detokenizer.finish()
        self.text.append(new)
        return new

    def completion(self) -> Completion:
        sequence = self.sequence
        assert sequence.finish_reason is not None
        finished = time.perf_counter() - sequence.arrival_time
        return Completion(
            prompt_token_ids=sequence.token_ids[: sequence.num_prompt_tokens],
            token_ids=sequence.token_ids[sequence.num_prompt_tokens :],
            text="".join(self.text),
            finish_reason=sequence.finish_reason,
            timing=Timing(self.first_token or finished, finished),
        )


class LLM:
    """A model, ready to answer.

        llm = LLM("smollm2")
        llm.generate(["Once upon a time"], SamplingParams(max_tokens=64))[0].text
        llm.chat([{"role": "user", "content": "What is the capital of France?"}]).text

    Options are those of `EngineOptions`. Use it from the thread that made it.
    """

    def __init__(
        self, model: str | Path | ModelConfig = "smollm2", *, show_progress: bool = False, **options: Any
    ) -> None:
        self.engine = Engine(EngineOptions(model=model, **options), show_progress)
        checkpoint = self.engine.checkpoint
        self._tokenizer = None
        if checkpoint is not None:
            self._tokenizer = Tokenizer.from_directory(checkpoint.directory)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ValueError for a model of dummy weights, which has none."""
        if self._tokenizer is None:
            raise ValueError("this model was made from a ModelConfig and has no tokenizer: pass token ids")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Series[Prompt],
        params: SamplingParams | Series[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[Completion]:
        """Continue one prompt or many, each a text or a list of token ids; the completions in the prompts' order.

        `params` is one for all or one each. A progress bar shows for eight prompts and more on a terminal, or as
        `use_tqdm` says. Raises ValueError, before anything runs, if any prompt cannot be served.
        """
        several = as_prompts(prompts)
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(several)
        else:
            each = list(params)
            if len(each) != len(several):
                raise ValueError(f"params holds {len(each)} SamplingParams for {len(several)} prompts")
        requests = self._add_all(several, each)
        disable = None if use_tqdm is None and len(several) >= 8 else not use_tqdm
        done: dict[int, Completion] = {}
        with tqdm(total=len(several), desc="generating", unit="prompt", disable=disable) as bar:
            for request, _, _ in self._run(requests):
                if request.sequence.finish_reason is not None:
                    done[request.sequence.id] = request.completion()
                    bar.update()
        return [done[request.sequence.id] for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Piece]:
        """Continue one prompt, yielding text as it becomes certain. Closing the iterator aborts the request."""
        for request, token_id, text in self._run(self._add_all([prompt], [params or SamplingParams()])):
            finished = request.sequence.finish_reason is not None
            yield Piece(text, token_id, request.completion() if finished else None)

    def chat(
        self, messages: Series[Mapping[str, Any]], params: SamplingParams | None = None, **template: Any
    ) -> Completion:
        """Answer a conversation in the model's own chat template."""
        return self.generate([self.chat_prompt(messages, **template)], params)[0]

    def chat_prompt(self, messages: Series[Mapping[str, Any]], **template: Any) -> list[int]:
        """The token ids of a conversation in the model's chat template, ready for the assistant's turn."""
        text = self.tokenizer.apply_chat_template(messages, **template)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _add_all(self, prompts: Series[Prompt], params: Series[SamplingParams]) -> list[_Request]:
        requests: list[_Request] = []
        try:
            for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
                try:
                    token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
                    sequence = self.engine.add(token_ids, param)
                except ValueError as error:
                    if len(prompts) == 1:
                        raise
                    raise ValueError(f"prompts[{index}]: {error}") from error
                detokenizer = IncrementalDetokenizer(self._tokenizer) if self._tokenizer else None
                requests.append(_Request(sequence, detokenizer, []))
        except ValueError:
            self._abort(requests)
            raise
        return requests

    def _run(self, requests: list[_Request]) -> Iterator[tuple[_Request, int, str]]:
        """Step until all requests have ended, yielding each token as it comes."""
        by_id = {request.sequence.id: request for request in requests}
        try:
            while any(request.sequence.finish_reason is None for request in requests):
                for output in self.engine.step():
                    request = by_id.get(output.sequence.id)
                    if request is not None and output.token_id is not None:
                        yield request, output.token_id, request.take(output.token_id)
        finally:
            self._abort(requests)

    def _abort(self, requests: Iterable[_Request]) -> None:
        for request in requests:
            self.engine.abort(request.sequence)


def as_prompts(prompts: Prompt | Series[Prompt]) -> list[Prompt]:
    """One prompt or many as a list: a text is one, and so is a list of token ids. Raises ValueError if empty."""
    if isinstance(prompts, str):
        return [prompts]
    several = list(prompts)
    if several and all(isinstance(item, int) for item in several):
        return [several]  # type: ignore[list-item]
    if not several:
        raise ValueError("prompts is empty: give at least one prompt")
    for index, item in enumerate(several):
        if not isinstance(item, str) and not (
            isinstance(item, Series) and all(isinstance(token, int) for token in item)
        ):
            raise ValueError(f"prompts[{index}] is {type(item).__name__}, must be a text or a list of token ids")
    return several  # type: ignore[return-value]


def generate(
    model: str | Path,
    prompts: Prompt | Series[Prompt],
    params: SamplingParams | Series[SamplingParams] | None = None,
    **options: Any,
) -> list[Completion]:
    """Load a model, continue the prompts, forget the model. Options are those of `EngineOptions`."""
    return LLM(model, **options).generate(prompts, params)


__all__ = ["LLM", "Completion", "Piece", "SamplingParams", "Timing", "generate"]
