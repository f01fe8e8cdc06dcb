"""The Python API of the engine: `LLM.generate`, `.chat`, `.stream`."""

from collections.abc import Generator, Mapping
from collections.abc import Sequence as Series
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from dispec.engine.api.arguments import (
    IN_PARAMS,
    Params,
    one_for_each,
    refusing_unknown_names,
    with_parameters_of,
)
from dispec.engine.api.outputs import RequestOutput
from dispec.engine.api.progress import Progress
from dispec.engine.api.prompt_processor import Messages, PromptProcessor, template_arguments
from dispec.engine.api.prompts import Prompt, PromptInput, TokenizedPrompt, as_prompts
from dispec.engine.api.shared_engine import SharedEngine, describe
from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import RequestOutputKind, SamplingParams
from dispec.engine.text.tokenizer import Tokenizer
from dispec.engine.unknown_names import field_names, refuse_unknown
from dispec.layers.config import ModelConfig


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
        refuse_unknown("LLM", given, field_names(EngineOptions), IN_PARAMS)
        options = EngineOptions(*model, **given)
        self._shared = SharedEngine.load(options)
        self.engine = self._shared.engine
        self._prompts = PromptProcessor(self._shared.tokenizer)

    def __repr__(self) -> str:
        return describe("LLM", self.engine)

    def close(self) -> None:
        """End the processes and connections of the engine, after the step that runs. Any thread may call it.

        Calls of other threads that run, and later calls, raise RuntimeError. A second `close` does nothing.
        """
        self._shared.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ValueError for a model that was made from a `ModelConfig`."""
        return self._prompts.tokenizer

    def get_tokenizer(self) -> Tokenizer:
        """Return `tokenizer`. It has `encode`, `decode` and `apply_chat_template`, as those of transformers have."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of calls without `sampling_params`: `SamplingParams()`, with the values that the model
        states in its `generation_config.json`. `dataclasses.replace` changes some of them."""
        return self._shared.default_params

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text. (vLLM's `LLM.encode` is pooling, which this engine does not have.)

        add_special_tokens: add those that the model expects around a text, often BOS.
        Raises ValueError for text that is not valid Unicode.
        """
        return self.tokenizer.encode(text, add_special_tokens)

    def decode(self, token_ids: Series[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Bytes that are not UTF-8 become U+FFFD; unknown ids have no text."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

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
        sampling_params: one for all prompts, or one for each; by default `get_default_sampling_params()`.
        use_tqdm: show a progress bar with tokens per second; by default in a terminal and in a notebook.
        Raises ValueError, before anything runs, if any prompt cannot be served, and RuntimeError if the engine fails or
        is closed.
        """
        several = as_prompts(prompts)
        each = self._shared.params_of_each(sampling_params, len(several))
        return self._generate([self._prompts.tokenize(prompt) for prompt in several], each, use_tqdm)

    @refusing_unknown_names
    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[RequestOutput]:
        """Continue one prompt and yield outputs that hold the new tokens, with the text that they make certain.

        The last output is `finished`. With `n` above 1 an output holds the continuations that have new tokens.
        `sampling_params.output_kind` CUMULATIVE yields all tokens so far, FINAL_ONLY one output. The request starts
        when the iterator is first read; closing the iterator aborts it. Raises ValueError if the prompt cannot be
        served, and RuntimeError if the engine fails or is closed.
        """
        prompts = as_prompts(prompt)
        if len(prompts) > 1:
            raise ValueError(f"prompt holds {len(prompts)} prompts, stream takes one")
        return self._stream(prompts[0], self._shared.params_of_each(sampling_params, 1))

    def chat(
        self,
        messages: Messages | Series[Messages],
        sampling_params: Params = None,
        *,
        use_tqdm: bool | None = None,
        tools: Series[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_special_tokens_in_content: bool = False,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, with the model's chat template; return an output for each.

        sampling_params, use_tqdm: as in `generate`. The others: as in `chat_prompt`.
        """
        self._prompts.check_template_names("chat", template, ("messages", "sampling_params", "use_tqdm"))
        given = template_arguments(
            template,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            allow_special_tokens_in_content=allow_special_tokens_in_content,
        )
        several = isinstance(messages, list | tuple) and bool(messages) and isinstance(messages[0], list | tuple)
        conversations: Any = messages if several else [messages]
        each = self._shared.params_of_each(sampling_params, len(conversations))
        prompts = []
        for index, conversation in enumerate(conversations):
            try:
                prompts.append(self._prompts.chat(conversation, **given))
            except ValueError as error:
                if not several:
                    raise
                raise ValueError(f"conversation {index}: {error}") from error
        return self._generate(prompts, each, use_tqdm)

    def chat_prompt(
        self,
        messages: Messages,
        *,
        tools: Series[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_special_tokens_in_content: bool = False,
        **template: Any,
    ) -> list[int]:
        """Return the token ids of a conversation in the model's chat template, up to the assistant's turn.

        tools: functions that the model may call, in OpenAI's form.
        add_generation_prompt: end with the beginning of the assistant's turn; by default it does.
        continue_final_message: end within the last message, which the model continues.
        chat_template_kwargs: variables of the template, which need not declare them.
        allow_special_tokens_in_content: special tokens spelled out in messages are special tokens, and not text.
        template: variables that the template declares, such as `enable_thinking`; another name raises ValueError.
        """
        self._prompts.check_template_names("chat_prompt", template, ("messages",))
        given = template_arguments(
            template,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            allow_special_tokens_in_content=allow_special_tokens_in_content,
        )
        return self._prompts.chat(messages, **given).token_ids

    def _generate(
        self, prompts: list[TokenizedPrompt], params: list[SamplingParams], use_tqdm: bool | None
    ) -> list[RequestOutput]:
        for index, param in enumerate(params):
            if param.output_kind is RequestOutputKind.DELTA:
                where = "sampling_params" if len(params) == 1 else f"sampling_params[{index}]"
                raise ValueError(f"{where}: output_kind is DELTA, must be CUMULATIVE or FINAL_ONLY: use stream")
        done: dict[int, RequestOutput] = {}
        with (
            Progress(len(prompts), use_tqdm) as progress,
            closing(self._shared.run(prompts, params, RequestOutputKind.FINAL_ONLY, progress.update)) as outputs,
        ):
            for index, output in outputs:
                done[index] = output
        return [done[index] for index in range(len(prompts))]

    def _stream(self, prompt: PromptInput, params: list[SamplingParams]) -> Generator[RequestOutput]:
        tokenized = [self._prompts.tokenize(prompt)]
        with closing(self._shared.run(tokenized, params, RequestOutputKind.DELTA)) as outputs:
            for _, output in outputs:
                yield output


def generate(
    model: str | Path | ModelConfig,
    prompts: Prompt | Series[Prompt],
    sampling_params: Params = None,
    **options: Any,
) -> list[RequestOutput]:
    """Load a model, continue the prompts, close the model. Options are those of `LLM`."""
    one_for_each(sampling_params, len(as_prompts(prompts)))  # refused before a model is loaded
    with LLM(model, **options) as llm:
        return llm.generate(prompts, sampling_params)
