"""The Python face of the engine: `LLM.generate`, `.chat`, `.stream`."""

import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.completion import Choice, Completion, Piece, Timing
from engine.engine import Engine
from engine.options import EngineOptions
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence, TokenLogprobs
from engine.step import TokenOutput
from engine.text_stream import TextStream, without_texts
from engine.tokenizer import Tokenizer
from layers.config import ModelConfig

Prompt = str | Series[int]


@dataclass
class _ChoiceUnderWay:
    sequence: Sequence
    text: TextStream
    num_tokens: int = 0  # of the sequence's, those that count: a stop string may be noticed later
    first_token: float = 0.0
    finished: float = 0.0

    def take(self, output: TokenOutput) -> str:
        """Note a token's arrival; the text that it makes certain. May find that a stop string ends the choice."""
        now = time.perf_counter() - self.sequence.arrival_time
        if output.token_id is None:
            raise RuntimeError(f"the engine failed: {self.sequence.error}")
        self.num_tokens += 1
        self.first_token = self.first_token or now
        self.finished = now
        new = self.text.add(output.token_id, ends=output.finish_reason == "stop")
        if output.finish_reason is not None:
            new += self.text.finish()
        return new

    def choice(self) -> Choice:
        sequence, reason = self.sequence, self.sequence.finish_reason
        assert reason is not None
        stop_reason: str | int | None = self.text.stop_reason
        last = sequence.token_ids[-1]
        if stop_reason is not None:
            reason = "stop"
        elif reason == "stop" and last in sequence.params.stop_token_ids:
            stop_reason = last
        return Choice(
            token_ids=sequence.output_token_ids[: self.num_tokens],
            text=self.text.text,
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=sequence.logprobs[: self.num_tokens] if sequence.params.logprobs is not None else None,
            timing=Timing(self.first_token, self.finished),
        )


@dataclass
class _Request:
    choices: list[_ChoiceUnderWay]
    done: list[Choice | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.done = [None] * len(self.choices)

    def completion(self) -> Completion | None:
        """The whole, once every choice has ended."""
        choices = tuple(choice for choice in self.done if choice is not None)
        if len(choices) < len(self.choices):
            return None
        first = self.choices[0].sequence
        return Completion(
            prompt_token_ids=first.token_ids[: first.num_prompt_tokens],
            choices=choices,
            prompt_logprobs=[None, *first.prompt_logprobs] if first.params.prompt_logprobs is not None else None,
            num_cached_tokens=first.num_cached_tokens or 0,
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
        chosen = EngineOptions(model=model, **options)
        if chosen.compile is None and not chosen.enforce_eager and chosen.torch_device().type == "cuda":
            # Whoever has many prompts answered leaves no time in between, and what draws tokens should be compiled.
            chosen = replace(chosen, compile="startup")
        self.engine = Engine(chosen, show_progress)
        checkpoint = self.engine.checkpoint
        self._tokenizer = None
        if checkpoint is not None:
            self._tokenizer = Tokenizer.from_directory(checkpoint.directory)

    def close(self) -> None:
        """End what the engine started, and let go of other engines."""
        self.engine.close()

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
            for index, piece in self._run(requests):
                if piece.completion is not None:
                    done[index] = piece.completion
                    bar.update()
        return [done[index] for index in range(len(requests))]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Piece]:
        """Continue one prompt, yielding text as it becomes certain. Closing the iterator aborts the request."""
        for _, piece in self._run(self._add_all([prompt], [params or SamplingParams()])):
            yield piece

    def chat(
        self, messages: Series[Mapping[str, Any]], params: SamplingParams | None = None, **template: Any
    ) -> Completion:
        """Answer a conversation in the model's own chat template."""
        return self.generate([self.chat_prompt(messages, **template)], params)[0]

    def chat_prompt(
        self, messages: Series[Mapping[str, Any]], *, allow_special_tokens_in_content: bool = False, **template: Any
    ) -> list[int]:
        """The token ids of a conversation in the model's chat template, ready for the assistant's turn.

        Special tokens that messages spell out are text, unless `allow_special_tokens_in_content`.
        """
        text = self.tokenizer.render_chat(messages, **template)
        if allow_special_tokens_in_content:
            return self.tokenizer.encode(text.plain, add_special_tokens=False)
        return self.tokenizer.encode_chat(text)

    def _add_all(self, prompts: Series[Prompt], params: Series[SamplingParams]) -> list[_Request]:
        requests: list[_Request] = []
        try:
            for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
                try:
                    requests.append(self._add(prompt, param))
                except ValueError as error:
                    if len(prompts) == 1:
                        raise
                    raise ValueError(f"prompts[{index}]: {error}") from error
        except ValueError:
            self._abort(requests)
            raise
        return requests

    def _add(self, prompt: Prompt, params: SamplingParams) -> _Request:
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        sequence = self.engine.add(token_ids, without_texts(params, self._tokenizer))
        return _Request([_ChoiceUnderWay(choice, TextStream(self._tokenizer, params)) for choice in sequence.choices])

    def _run(self, requests: list[_Request]) -> Iterator[tuple[int, Piece]]:
        """Step until all requests have ended, yielding each token as it comes, with its request's index."""
        places = {
            choice.sequence.id: (number, index)
            for number, request in enumerate(requests)
            for index, choice in enumerate(request.choices)
        }
        try:
            while places:
                for output in self.engine.step():
                    if output.sequence.id not in places:
                        continue
                    number, index = places[output.sequence.id]
                    request = requests[number]
                    choice = request.choices[index]
                    text = choice.take(output)
                    finished = output.finish_reason
                    if choice.text.stop_reason is not None:
                        finished = "stop"
                        self.engine.finish(choice.sequence, "stop")
                    completion = None
                    if finished is not None:
                        del places[output.sequence.id]
                        request.done[index] = choice.choice()
                        completion = request.completion()
                    yield number, Piece(text, output.token_id, index, finished, completion)
        finally:
            self._abort(requests)

    def _abort(self, requests: Iterable[_Request]) -> None:
        for request in requests:
            for choice in request.choices:
                self.engine.abort(choice.sequence)


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


__all__ = ["LLM", "Choice", "Completion", "Piece", "SamplingParams", "Timing", "TokenLogprobs", "generate"]
