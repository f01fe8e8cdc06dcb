"""The Python API of the engine: `LLM.generate`, `.chat`, `.stream`."""

from collections.abc import Generator, Mapping
from collections.abc import Sequence as Series
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from dispec.engine.api.argument_names import IN_LLM, IN_PARAMS, RENAMED, refusing_unknown_names, with_parameters_of
from dispec.engine.api.outputs import RequestOutput
from dispec.engine.api.prompts import Prompt, PromptInput, TokenizedPrompt, as_prompts
from dispec.engine.api.shared_engine import SharedEngine
from dispec.engine.engine import Engine
from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import RequestOutputKind, SamplingParams
from dispec.engine.text.special_token_marker import ChatText
from dispec.engine.text.tokenizer import Tokenizer
from dispec.engine.unknown_names import field_names, refuse_unknown
from dispec.layers.config import ModelConfig

Messages = Series[Mapping[str, Any]]
Params = SamplingParams | Series[SamplingParams] | None

# Variables that templates of other models declare.
_OF_TEMPLATES: tuple[str, ...] = ("enable_thinking", "thinking", "reasoning_effort", "documents")
_IN_TEMPLATES = {"chat_template_kwargs={{{!r}: …}}": _OF_TEMPLATES}
_TEMPLATE_ARGUMENTS = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class LLM:
    """A loaded model.

        with LLM("smollm2") as llm:
            llm.generate("Once upon a time", SamplingParams(max_tokens=64))[0].outputs[0].text
            llm.chat([{"role": "user", "content": "What is the capital of France?"}])[0].outputs[0].text

    The arguments are those of `EngineOptions`. Several threads may use it, and several iterators of `stream` may be
    read in turns: all requests run in one batch.
    """

    @with_parameters_of(EngineOptions)
    def __init__(self, *model: Any, **given: Any) -> None:
        refuse_unknown("LLM", given, field_names(EngineOptions), IN_PARAMS, RENAMED)
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

    @refusing_unknown_names
    def generate(
        self,
        prompts: Prompt | Series[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue one prompt or many, and return a finished output for each, in the prompts' order.

        prompts: each a text, a list of token ids, or a mapping with `prompt` or `prompt_token_ids` and optionally
            `cache_salt`; a prompt shares cached prefixes only with prompts of the same salt.
        sampling_params: one for all prompts, or one for each.
        use_tqdm: show a progress bar; by default for eight prompts or more on a terminal.
        Raises ValueError, before anything runs, if any prompt cannot be served.
        """
        several = as_prompts(prompts)
        return self._generate(self._tokenize(several), _one_each(sampling_params, len(several)), use_tqdm)

    @refusing_unknown_names
    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[RequestOutput]:
        """Continue one prompt and yield outputs that hold the new tokens, with the text that they make certain.

        The last output is `finished`. With `n` above 1 an output holds the continuations that have new tokens. The
        request starts when the iterator is first read; closing the iterator aborts it.
        """
        prompts = as_prompts(prompt)
        if len(prompts) > 1:
            raise ValueError(f"prompt holds {len(prompts)} prompts, stream takes one")
        return self._stream(prompts, _one_each(sampling_params, 1))

    def chat(
        self,
        messages: Messages | Series[Messages],
        sampling_params: Params = None,
        *,
        use_tqdm: bool | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, with the model's chat template; return an output for each.

        sampling_params, use_tqdm: as in `generate`. template: as in `chat_prompt`.
        """
        own = ("messages", "sampling_params", "use_tqdm", "allow_special_tokens_in_content")
        self._check_template_names("chat", template, own)
        several = isinstance(messages, list | tuple) and bool(messages) and isinstance(messages[0], list | tuple)
        conversations: Any = messages if several else [messages]
        each = _one_each(sampling_params, len(conversations))
        prompts = []
        for index, conversation in enumerate(conversations):
            try:
                prompts.append(self._chat_prompt(conversation, **template))
            except ValueError as error:
                if not several:
                    raise
                raise ValueError(f"conversation {index}: {error}") from error
        return self._generate(prompts, each, use_tqdm)

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
        allowed = {"allow_special_tokens_in_content": allow_special_tokens_in_content}
        return self._chat_prompt(messages, **allowed, **template).token_ids

    def _chat_prompt(
        self, messages: Messages, *, allow_special_tokens_in_content: bool = False, **template: Any
    ) -> TokenizedPrompt:
        more = template.pop("chat_template_kwargs", None) or {}
        if not isinstance(more, Mapping):
            raise ValueError(f"chat_template_kwargs is {type(more).__name__}, must be a mapping of template variables")
        for name in more:
            if not isinstance(name, str) or name == "messages" or name in template:
                raise ValueError(f"chat_template_kwargs holds {name!r}, which is given already or is no variable")
        text = self.tokenizer.render_chat(messages, **template, **more)
        if allow_special_tokens_in_content:
            text = ChatText(text.plain, text.plain, None)
        return TokenizedPrompt(self.tokenizer.encode_chat(text), text.plain)

    def _check_template_names(self, owner: str, given: Mapping[str, Any], own: tuple[str, ...]) -> None:
        known = (*own, *_TEMPLATE_ARGUMENTS, *sorted(self.tokenizer.template_variables))
        refuse_unknown(owner, given, known, IN_PARAMS | IN_LLM | _IN_TEMPLATES, RENAMED)

    def _tokenize(self, prompts: list[PromptInput]) -> list[TokenizedPrompt]:
        found = []
        for text, token_ids, cache_salt in prompts:
            ids = self.tokenizer.encode(text or "") if token_ids is None else token_ids
            found.append(TokenizedPrompt(ids, text, cache_salt))
        return found

    def _generate(
        self, prompts: list[TokenizedPrompt], params: list[SamplingParams], use_tqdm: bool | None
    ) -> list[RequestOutput]:
        disable = None if use_tqdm is None and len(prompts) >= 8 else not use_tqdm
        done: dict[int, RequestOutput] = {}
        with (
            closing(self._shared.run(prompts, params, RequestOutputKind.FINAL_ONLY)) as outputs,
            tqdm(total=len(prompts), desc="generating", unit="prompt", disable=disable) as bar,
        ):
            for index, output in outputs:
                done[index] = output
                bar.update()
        return [done[index] for index in range(len(prompts))]

    def _stream(self, prompts: list[PromptInput], params: list[SamplingParams]) -> Generator[RequestOutput]:
        with closing(self._shared.run(self._tokenize(prompts), params, RequestOutputKind.DELTA)) as outputs:
            for _, output in outputs:
                yield output


def _one_each(given: Params, count: int) -> list[SamplingParams]:
    """Return the parameters of each prompt. Raises ValueError for anything but SamplingParams."""
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    name = type(given).__name__
    if isinstance(given, Mapping):
        refuse_unknown("SamplingParams", map(str, given), field_names(SamplingParams))
        fields = ", ".join(f"{field}={value!r:.50}" for field, value in given.items())
        raise ValueError(f"sampling_params is {name}, must be SamplingParams: write SamplingParams({fields})")
    if not isinstance(given, Series) or isinstance(given, str | bytes):
        raise ValueError(f"sampling_params is {name}, must be SamplingParams or a list of them")
    for index, one in enumerate(given):
        if not isinstance(one, SamplingParams):
            raise ValueError(f"sampling_params[{index}] is {type(one).__name__}, must be SamplingParams")
    if len(given) != count:
        raise ValueError(f"sampling_params holds {len(given)} SamplingParams for {count} prompts")
    return list(given)


def generate(
    model: str | Path | ModelConfig,
    prompts: Prompt | Series[Prompt],
    sampling_params: Params = None,
    **options: Any,
) -> list[RequestOutput]:
    """Load a model, continue the prompts, close the model. Options are those of `LLM`."""
    several = as_prompts(prompts)
    each = _one_each(sampling_params, len(several))
    with LLM(model, **options) as llm:
        return llm._generate(llm._tokenize(several), each, None)
