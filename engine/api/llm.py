"""The Python API of the engine: `LLM.generate`, `.chat`, `.stream`."""

import inspect
from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as Series
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, overload

from tqdm import tqdm

from dispec.engine.api.outputs import Choice, Completion, Piece, Timing
from dispec.engine.api.prompts import Prompt, PromptInput, TokenizedPrompt, as_prompts
from dispec.engine.api.shared_engine import SharedEngine
from dispec.engine.engine import Engine
from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.token_output import TokenLogprobs
from dispec.engine.text.tokenizer import Tokenizer
from dispec.engine.unknown_names import field_names, refuse_unknown
from dispec.layers.config import ModelConfig

_P = ParamSpec("_P")
Messages = Series[Mapping[str, Any]]
Params = SamplingParams | Series[SamplingParams] | None

# Where a name belongs that was passed to another function.
_IN_PARAMS = {"params=SamplingParams({}=…)": field_names(SamplingParams)}
_IN_LLM = {"LLM({}=…)": field_names(EngineOptions)}
# Variables that templates of other models declare.
_OF_TEMPLATES: tuple[str, ...] = ("enable_thinking", "thinking", "reasoning_effort", "documents")
_IN_TEMPLATES = {"chat_template_kwargs={{{!r}: …}}": _OF_TEMPLATES}
_TEMPLATE_ARGUMENTS = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")


def _with_parameters_of(
    options: Callable[_P, EngineOptions],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, _P], None]]:
    """Give a method the parameters of a class, with their types and documentation, for editors and type checkers."""

    def decorate(method: Callable[..., None]) -> Callable[Concatenate[Any, _P], None]:
        own = next(iter(inspect.signature(method).parameters.values()))
        taken = inspect.signature(options)
        method.__signature__ = taken.replace(parameters=[own, *taken.parameters.values()])  # type: ignore[attr-defined]
        method.__doc__ = options.__doc__
        return method

    return decorate


class LLM:
    """A loaded model.

        with LLM("smollm2") as llm:
            llm.generate(["Once upon a time"], SamplingParams(max_tokens=64))[0].text
            llm.chat([{"role": "user", "content": "What is the capital of France?"}]).text

    The arguments are those of `EngineOptions`. Several threads may use it, and several iterators of `stream` may be
    read in turns: all requests run in one batch.
    """

    @_with_parameters_of(EngineOptions)
    def __init__(self, *model: Any, **given: Any) -> None:
        refuse_unknown("LLM", given, field_names(EngineOptions), _IN_PARAMS)
        options = EngineOptions(*model, **given)
        if options.compile == "background":
            raise ValueError("compile is 'background', which is for a server: an LLM is never idle, use startup or off")
        self.engine = Engine(options)
        checkpoint = self.engine.checkpoint
        self._tokenizer = None
        if checkpoint is not None:
            self._tokenizer = Tokenizer.from_directory(checkpoint.directory)
        self._shared = SharedEngine(self.engine, self._tokenizer)

    def close(self) -> None:
        """End the processes and connections of the engine. Later calls raise RuntimeError."""
        self._shared.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ValueError for a model that was made from a `ModelConfig`."""
        if self._tokenizer is None:
            raise ValueError("this model was made from a ModelConfig and has no tokenizer: pass token ids")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Series[Prompt],
        params: Params = None,
        *,
        use_tqdm: bool | None = None,
        **unknown: Any,
    ) -> list[Completion]:
        """Continue one prompt or many, and return the completions in the prompts' order.

        prompts: each a text, a list of token ids, or a mapping with `prompt` or `prompt_token_ids` and optionally
            `cache_salt`; a prompt shares cached prefixes only with prompts of the same salt.
        params: one for all prompts, or one for each.
        use_tqdm: show a progress bar; by default for eight prompts or more on a terminal.
        Raises ValueError, before anything runs, if any prompt cannot be served.
        """
        refuse_unknown("generate", unknown, ("prompts", "params", "use_tqdm"), _IN_PARAMS | _IN_LLM)
        several = as_prompts(prompts)
        return self._generate(several, _one_each(params, len(several)), use_tqdm)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **unknown: Any) -> Generator[Piece]:
        """Continue one prompt and yield its tokens with their text.

        The request starts when the iterator is first read. Closing the iterator aborts it.
        """
        refuse_unknown("stream", unknown, ("prompt", "params"), _IN_PARAMS | _IN_LLM)
        prompts = as_prompts(prompt)
        if len(prompts) > 1:
            raise ValueError(f"prompt holds {len(prompts)} prompts, stream takes one")
        return self._stream(prompts, _one_each(params, 1))

    @overload
    def chat(
        self, messages: Messages, params: Params = None, *, use_tqdm: bool | None = None, **template: Any
    ) -> Completion: ...

    @overload
    def chat(
        self, messages: Series[Messages], params: Params = None, *, use_tqdm: bool | None = None, **template: Any
    ) -> list[Completion]: ...

    def chat(
        self,
        messages: Messages | Series[Messages],
        params: Params = None,
        *,
        use_tqdm: bool | None = None,
        **template: Any,
    ) -> Completion | list[Completion]:
        """Answer a conversation, or each of several, with the model's chat template.

        params, use_tqdm: as in `generate`. template: as in `chat_prompt`.
        """
        own = ("messages", "params", "use_tqdm", "allow_special_tokens_in_content")
        self._check_template_names("chat", template, own)
        several = isinstance(messages, list | tuple) and bool(messages) and isinstance(messages[0], list | tuple)
        conversations: Any = messages if several else [messages]
        each = _one_each(params, len(conversations))
        prompts = []
        for index, conversation in enumerate(conversations):
            try:
                prompts.append(PromptInput(self.chat_prompt(conversation, **template)))
            except ValueError as error:
                if not several:
                    raise
                raise ValueError(f"conversation {index}: {error}") from error
        completions = self._generate(prompts, each, use_tqdm)
        return completions if several else completions[0]

    def chat_prompt(
        self, messages: Messages, *, allow_special_tokens_in_content: bool = False, **template: Any
    ) -> list[int]:
        """Return the token ids of a conversation in the model's chat template, up to the assistant's turn.

        allow_special_tokens_in_content: special tokens spelled out in messages are special tokens, and not text.
        template: `tools`, `add_generation_prompt`, `continue_final_message`, and variables that the template declares,
            such as `enable_thinking`; another name raises ValueError. `chat_template_kwargs` is a mapping of variables
            that need not be declared.
        """
        self._check_template_names("chat_prompt", template, ("messages", "allow_special_tokens_in_content"))
        more = template.pop("chat_template_kwargs", None) or {}
        if not isinstance(more, Mapping):
            raise ValueError(f"chat_template_kwargs is {type(more).__name__}, must be a mapping of template variables")
        for name in more:
            if not isinstance(name, str) or name == "messages" or name in template:
                raise ValueError(f"chat_template_kwargs holds {name!r}, which is given already or is no variable")
        text = self.tokenizer.render_chat(messages, **template, **more)
        if allow_special_tokens_in_content:
            return self.tokenizer.encode(text.plain, add_special_tokens=False)
        return self.tokenizer.encode_chat(text)

    def _check_template_names(self, owner: str, given: Mapping[str, Any], own: tuple[str, ...]) -> None:
        known = (*own, *_TEMPLATE_ARGUMENTS, *sorted(self.tokenizer.template_variables))
        refuse_unknown(owner, given, known, _IN_PARAMS | _IN_LLM | _IN_TEMPLATES)

    def _tokenize(self, prompts: list[PromptInput]) -> list[TokenizedPrompt]:
        return [
            TokenizedPrompt(self.tokenizer.encode(content) if isinstance(content, str) else content, cache_salt)
            for content, cache_salt in prompts
        ]

    def _generate(
        self, prompts: list[PromptInput], params: list[SamplingParams], use_tqdm: bool | None
    ) -> list[Completion]:
        disable = None if use_tqdm is None and len(prompts) >= 8 else not use_tqdm
        done: dict[int, Completion] = {}
        with (
            closing(self._shared.run(self._tokenize(prompts), params)) as pieces,
            tqdm(total=len(prompts), desc="generating", unit="prompt", disable=disable) as bar,
        ):
            for index, piece in pieces:
                if piece.completion is not None:
                    done[index] = piece.completion
                    bar.update()
        return [done[index] for index in range(len(prompts))]

    def _stream(self, prompts: list[PromptInput], params: list[SamplingParams]) -> Generator[Piece]:
        with closing(self._shared.run(self._tokenize(prompts), params)) as pieces:
            for _, piece in pieces:
                yield piece


def _one_each(params: Params, count: int) -> list[SamplingParams]:
    """Return the parameters of each prompt. Raises ValueError for anything but SamplingParams."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if isinstance(params, Mapping):
        refuse_unknown("SamplingParams", map(str, params), field_names(SamplingParams))
        given = ", ".join(f"{name}={value!r:.50}" for name, value in params.items())
        raise ValueError(f"params is {type(params).__name__}, must be SamplingParams: write SamplingParams({given})")
    if not isinstance(params, Series) or isinstance(params, str | bytes):
        raise ValueError(f"params is {type(params).__name__}, must be SamplingParams or a list of them")
    for index, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise ValueError(f"params[{index}] is {type(one).__name__}, must be SamplingParams")
    if len(params) != count:
        raise ValueError(f"params holds {len(params)} SamplingParams for {count} prompts")
    return list(params)


def generate(
    model: str | Path | ModelConfig,
    prompts: Prompt | Series[Prompt],
    params: Params = None,
    **options: Any,
) -> list[Completion]:
    """Load a model, continue the prompts, close the model. Options are those of `LLM`."""
    several = as_prompts(prompts)
    each = _one_each(params, len(several))
    with LLM(model, **options) as llm:
        return llm._generate(several, each, None)


__all__ = ["LLM", "Choice", "Completion", "Piece", "SamplingParams", "Timing", "TokenLogprobs", "generate"]
