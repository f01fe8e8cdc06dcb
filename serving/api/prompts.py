"""From texts and messages to token ids, in threads, so that a long prompt does not delay other requests' tokens."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from dispec.engine.errors import ContextOverflow, InvalidField
from dispec.engine.request_checks import check_prompt_length, check_token_ids
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.text.text_stream import tokenize_bad_words
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.api.protocol import MAX_ARGUMENT_NAME, ChatRequest, PromptInput, SamplingRequest
from dispec.serving.http.errors import ApiError
from dispec.serving.settings import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_PROMPTS, MAX_TEMPLATE_ARGUMENTS

T = TypeVar("T")

_ARGUMENTS = "chat_template_kwargs"
RESERVED_TEMPLATE_NAMES = frozenset({
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens", "raise_exception", "strftime_now", "self", "range", "dict", "lipsum", "cycler",
    "joiner", "namespace", "loop",
})  # fmt: skip


# From checked messages to those for the chat template, and its `tools`.
WithTools = Callable[
    [Sequence[Mapping[str, Any]]], tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]
]


class Prompt(NamedTuple):
    """A prompt for the engine. `text` is the client's, for echoing, unless the client sent token ids.

    That of a chat is the rendered conversation, before its truncation.
    """

    token_ids: list[int]
    text: str | None = None


class Truncation(NamedTuple):
    """The tokens to keep of a prompt: their number, -1 for as many as leave room for an output, and the side to cut."""

    num_tokens: int
    side: str

    @classmethod
    def requested(cls, request: SamplingRequest) -> "Truncation | None":
        """Return the truncation that a request asks for, if any. Raises InvalidField for an unknown side."""
        side = request.truncation_side or "left"
        if side not in ("left", "right"):
            raise InvalidField("truncation_side", f"truncation_side is {side!r:.50}, must be left or right")
        return None if request.truncate_prompt_tokens is None else cls(request.truncate_prompt_tokens, side)

    def apply(self, token_ids: list[int], max_model_len: int) -> list[int]:
        """Return the tokens to keep. Raises InvalidField if they are none, or leave no room."""
        if self.num_tokens != -1 and not 1 <= self.num_tokens < max_model_len:
            must_be = f"must be -1 or between 1 and {max_model_len - 1} (below max_model_len)"
            raise InvalidField("truncate_prompt_tokens", f"truncate_prompt_tokens is {self.num_tokens}, {must_be}")
        count = max_model_len - 1 if self.num_tokens == -1 else self.num_tokens
        return token_ids[:count] if self.side == "right" else token_ids[-count:]


class Prompts:
    """Makes the prompts of one model. Errors are InvalidField, ContextOverflow or ApiError."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
        timeout: float,
        allows_special_tokens: bool = False,
    ) -> None:
        """`timeout`: seconds for one prompt. `allows_special_tokens`: the default of
        `allow_special_tokens_in_content`."""
        self._tokenizer = tokenizer
        self._allows_special_tokens = allows_special_tokens
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._timeout = timeout
        # No longer text fits. It is refused before it is tokenized, which takes half a minute for 32 MiB.
        vocabulary = () if tokenizer is None else tokenizer.vocabulary
        self._max_text_length = max_model_len * max((len(token) for token in vocabulary), default=1)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's. Raises ApiError for a model that was made from a `ModelConfig`."""
        if self._tokenizer is None:
            raise ApiError(400, "this model has no tokenizer: send token ids to /v1/completions")
        return self._tokenizer

    async def of_completion(
        self, given: PromptInput, add_special_tokens: bool | None = None, truncation: Truncation | None = None
    ) -> list[Prompt]:
        """Return the prompts of a text, of texts, of token ids or of lists of token ids."""
        several = _as_list(given)
        is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        special = add_special_tokens is not False

        def tokenize() -> list[Prompt]:
            return [
                self._checked(
                    Prompt(item) if isinstance(item, list) else Prompt(self._encode(item, special), item),
                    "prompt",
                    "prompt" if is_one else f"prompt[{index}]",
                    truncation,
                )
                for index, item in enumerate(several)
            ]

        if any(isinstance(item, str) for item in several):
            return await self.in_thread(tokenize)
        return tokenize()

    async def of_chat(
        self,
        request: ChatRequest,
        variables: Mapping[str, Any] | None = None,
        with_tools: WithTools | None = None,
    ) -> Prompt:
        """Return the prompt of messages in the chat template, which need not fit the context.

        variables: of the template, besides `chat_template_kwargs`. with_tools: adds the request's tools.
        """
        return await self.in_thread(lambda: self._encode_messages(request, variables, with_tools))

    def checked_chat(self, request: ChatRequest, prompt: Prompt) -> Prompt:
        """Return the prompt of a chat, truncated as it asks. Raises ContextOverflow if it does not fit."""
        truncation = Truncation.requested(request)
        return self._checked(prompt, "messages", "messages", truncation)._replace(text=prompt.text)

    async def token_ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text, which need not fit the context."""
        return await self.in_thread(lambda: self._encode(text, add_special_tokens))

    async def tokenize_bad_words(self, params: SamplingParams) -> SamplingParams:
        """Return parameters with bad words as token ids."""
        if not params.bad_words:
            return params
        if len(params.bad_words) > MAX_BAD_WORDS:
            said = f"bad_words holds {len(params.bad_words)} texts, must be at most {MAX_BAD_WORDS}"
            raise InvalidField("bad_words", said)
        found = await self.in_thread(lambda: tokenize_bad_words(params, self._tokenizer))
        if (count := sum(map(len, found.bad_words_token_ids))) > MAX_BAD_WORD_TOKENS:
            raise InvalidField("bad_words", f"bad_words holds {count} tokens, must be at most {MAX_BAD_WORD_TOKENS}")
        return found

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Return the result of `work`. Raises ApiError if it takes too long; the thread still runs to its end."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(work), self._timeout)
        except TimeoutError:
            raise ApiError(400, f"the prompt takes more than {self._timeout:g} s to prepare: make it shorter") from None
        except RecursionError:
            raise InvalidField("messages", "messages is nested too deeply") from None

    def _checked(self, prompt: Prompt, field: str, where: str, truncation: Truncation | None) -> Prompt:
        check_token_ids(prompt.token_ids, self.vocab_size, field, where)
        if truncation is not None:
            kept = truncation.apply(prompt.token_ids, self.max_model_len)
            prompt = prompt if len(kept) == len(prompt.token_ids) else Prompt(kept)
        check_prompt_length(len(prompt.token_ids), self.max_model_len, field, where)
        return prompt

    def _encode_messages(
        self,
        request: ChatRequest,
        variables: Mapping[str, Any] | None,
        with_tools: WithTools | None,
    ) -> Prompt:
        continues = bool(request.continue_final_message)
        opens = not continues if request.add_generation_prompt is None else request.add_generation_prompt
        arguments = {**(variables or {}), **_template_arguments(request.chat_template_kwargs)}
        messages: Sequence[Mapping[str, Any]] = request.messages or []
        tools: Sequence[Mapping[str, Any]] | None = None
        if with_tools is not None:
            messages, tools = with_tools(messages)
        text = self.tokenizer.render_chat(messages, opens, tools, continues, **arguments)
        allows = request.allow_special_tokens_in_content
        if self._allows_special_tokens if allows is None else allows:
            return Prompt(self._encode(text.plain, bool(request.add_special_tokens), "messages"), text.plain)
        self._check_text_length(text.plain, "messages")
        return Prompt(self.tokenizer.encode_chat(text, bool(request.add_special_tokens)), text.plain)

    def _encode(self, text: str, add_special_tokens: bool, field: str = "prompt") -> list[int]:
        self._check_text_length(text, field)
        return self.tokenizer.encode(text, add_special_tokens)

    def _check_text_length(self, text: str, field: str) -> None:
        if len(text) > self._max_text_length:
            least = -(-len(text) * self.max_model_len // self._max_text_length)  # as many of the longest token
            raise ContextOverflow(field, f"{field} has at least {least} tokens", self.max_model_len)


def _as_list(given: PromptInput) -> list[str | list[int]]:
    """Return one prompt or several as a list."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidField("prompt", "prompt is empty, must be a text, token ids, or a list of either")
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise InvalidField("prompt", "prompt mixes texts, token ids and lists, must hold one kind of them")
    if kinds == {int}:
        return [given]  # type: ignore[list-item]
    if len(given) > MAX_PROMPTS:
        raise InvalidField("prompt", f"prompt holds {len(given)} prompts, must be at most {MAX_PROMPTS}")
    return given  # type: ignore[return-value]


def _template_arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the template's variables that a request sets. Raises InvalidField for reserved names and for objects."""
    arguments = dict(given or {})
    if len(arguments) > MAX_TEMPLATE_ARGUMENTS:
        said = f"{_ARGUMENTS} holds {len(arguments)} values, must be at most {MAX_TEMPLATE_ARGUMENTS}"
        raise InvalidField(_ARGUMENTS, said)
    for name, value in arguments.items():
        is_free = name.isidentifier() and not name.startswith("_") and name not in RESERVED_TEMPLATE_NAMES
        if not is_free or len(name) > MAX_ARGUMENT_NAME:
            said = f"{_ARGUMENTS} holds {name!r:.70}, must be names of variables that a request may set"
            raise InvalidField(_ARGUMENTS, said)
        if value is not None and type(value) not in (str, int, float, bool):
            kind = type(value).__name__
            raise InvalidField(_ARGUMENTS, f"{_ARGUMENTS}.{name} is a {kind}, must be a text, number or boolean")
    return arguments
