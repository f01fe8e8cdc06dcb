"""From texts and messages to token ids, in threads, so that nobody's long prompt holds up everybody's tokens."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from dispec.engine.errors import ContextOverflow
from dispec.engine.request_checks import check_prompt_length, check_token_ids
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.text.text_stream import tokenize_bad_words
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.api.protocol import ChatRequest, PromptInput, Sampling, TokenizeRequest
from dispec.serving.api.protocol_sampling import template_arguments
from dispec.serving.http.errors import ApiError, invalid
from dispec.serving.settings import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_PROMPTS

T = TypeVar("T")


class Prompt(NamedTuple):
    """A prompt as the engine takes it. `text` is for echoing, where the client sent one."""

    token_ids: list[int]
    text: str | None = None


class Cut(NamedTuple):
    """How a prompt is shortened: `keep` tokens, -1 for as many as leave room for an answer; `side` loses the rest."""

    keep: int
    side: str

    @classmethod
    def of(cls, request: Sampling) -> "Cut | None":
        """What a request asks for. Raises ApiError for a side that there is not."""
        side = request.truncation_side or "left"
        if side not in ("left", "right"):
            raise invalid("truncation_side", f"truncation_side is {side!r:.50}, must be left or right")
        return None if request.truncate_prompt_tokens is None else cls(request.truncate_prompt_tokens, side)

    def apply(self, token_ids: list[int], max_model_len: int) -> list[int]:
        """Raises ApiError if the prompt would have no tokens, or leave no room."""
        if self.keep != -1 and not 1 <= self.keep < max_model_len:
            must_be = f"must be -1 or between 1 and {max_model_len - 1} (below max_model_len)"
            raise invalid("truncate_prompt_tokens", f"truncate_prompt_tokens is {self.keep}, {must_be}")
        keep = max_model_len - 1 if self.keep == -1 else self.keep
        return token_ids[:keep] if self.side == "right" else token_ids[-keep:]


class Prompts:
    """Makes prompts for one model, and checks that they fit."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
        timeout: float,
        allows_special_tokens: bool = False,
    ) -> None:
        """`allows_special_tokens`: whether messages may spell special tokens, where a request does not say."""
        self._tokenizer = tokenizer
        self._allows_special_tokens = allows_special_tokens
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._timeout = timeout
        # No text of more characters than that fits. Tokenising one of 32 MiB to find out would take half a minute.
        vocabulary = () if tokenizer is None else tokenizer.backend.get_vocab()
        self._longest_text = max_model_len * max((len(token) for token in vocabulary), default=1)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ApiError for a model of dummy weights, which has none."""
        if self._tokenizer is None:
            raise ApiError(400, "this model has no tokenizer: send token ids to /v1/completions")
        return self._tokenizer

    async def of_texts(
        self, given: PromptInput, add_special_tokens: bool | None = None, cut: Cut | None = None
    ) -> list[Prompt]:
        """The four forms of `prompt`: a text, texts, token ids, lists of token ids. Raises ApiError."""
        several = self._several(given)
        is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        special = True if add_special_tokens is None else add_special_tokens

        def tokenize() -> list[Prompt]:
            return [
                self._fitting(
                    Prompt(item) if isinstance(item, list) else Prompt(self._encode(item, special), item),
                    "prompt",
                    "prompt" if is_one else f"prompt[{index}]",
                    cut,
                )
                for index, item in enumerate(several)
            ]

        if any(isinstance(item, str) for item in several):
            return await self.off_loop(tokenize)
        return tokenize()

    async def of_chat(self, request: ChatRequest) -> Prompt:
        """Raises ApiError."""
        cut = Cut.of(request)
        token_ids = await self.off_loop(lambda: self._of_messages(request))
        return self._fitting(Prompt(token_ids), "messages", "messages", cut)

    async def of_tokenize(self, request: TokenizeRequest) -> list[int]:
        """Raises ApiError."""
        if (request.prompt is None) == (request.messages is None):
            said = "prompt is missing" if request.prompt is None else "prompt and messages exclude each other"
            raise invalid("prompt", said)
        text = request.prompt
        if text is None:
            return await self.off_loop(lambda: self._of_messages(request))
        special = request.add_special_tokens is not False
        return await self.off_loop(lambda: self._encode(text, special))

    async def without_texts(self, params: SamplingParams) -> SamplingParams:
        """The same, its bad words as token ids: at the start of a word and within one. Raises ApiError."""
        if not params.bad_words:
            return params
        if len(params.bad_words) > MAX_BAD_WORDS:
            said = f"bad_words holds {len(params.bad_words)} texts, must be at most {MAX_BAD_WORDS}"
            raise invalid("bad_words", said)

        def tokenize() -> SamplingParams:
            tokenized = tokenize_bad_words(params, self.tokenizer)
            if (count := sum(map(len, tokenized.bad_words_token_ids))) > MAX_BAD_WORD_TOKENS:
                said = f"bad_words holds {count} tokens, must be at most {MAX_BAD_WORD_TOKENS}"
                raise invalid("bad_words", said)
            return tokenized

        return await self.off_loop(tokenize)

    async def off_loop(self, work: Callable[[], T]) -> T:
        """Run it in a thread. Raises ApiError if it takes too long: nobody waits for it any more, then."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(work), self._timeout)
        except TimeoutError:
            raise ApiError(400, f"the prompt takes more than {self._timeout:g} s to prepare: make it shorter") from None
        except RecursionError:
            raise ApiError(400, "messages is nested too deeply", param="messages") from None

    def _several(self, given: PromptInput) -> list[str | list[int]]:
        if isinstance(given, str):
            return [given]
        if not given:
            raise invalid("prompt", "prompt is empty, must be a text, token ids, or a list of either")
        kinds = {type(item) for item in given}
        if len(kinds) > 1:
            raise invalid("prompt", "prompt mixes texts, token ids and lists, must hold one kind of them")
        if kinds == {int}:
            return [given]  # type: ignore[list-item]
        if len(given) > MAX_PROMPTS:
            raise invalid("prompt", f"prompt holds {len(given)} prompts, must be at most {MAX_PROMPTS}")
        return given  # type: ignore[return-value]

    def _fitting(self, prompt: Prompt, field: str, where: str, cut: Cut | None) -> Prompt:
        check_token_ids(prompt.token_ids, self.vocab_size, field, where)
        if cut is not None:
            kept = cut.apply(prompt.token_ids, self.max_model_len)
            prompt = prompt if len(kept) == len(prompt.token_ids) else Prompt(kept)
        check_prompt_length(len(prompt.token_ids), self.max_model_len, field, where)
        return prompt

    def _of_messages(self, request: ChatRequest | TokenizeRequest) -> list[int]:
        continues = bool(request.continue_final_message)
        opens = not continues if request.add_generation_prompt is None else request.add_generation_prompt
        arguments: Mapping[str, Any] = template_arguments(request.chat_template_kwargs)
        text = self.tokenizer.render_chat(request.messages or [], opens, None, continues, **arguments)
        allows = request.allow_special_tokens_in_content
        if self._allows_special_tokens if allows is None else allows:
            return self._encode(text.plain, bool(request.add_special_tokens), "messages")
        self._check_length(text.plain, "messages")
        return self.tokenizer.encode_chat(text, bool(request.add_special_tokens))

    def _encode(self, text: str, add_special_tokens: bool, field: str = "prompt") -> list[int]:
        self._check_length(text, field)
        # `encode` holds Python's lock for as long as it takes; this does not, nor does it note where tokens begin.
        return self.tokenizer.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def _check_length(self, text: str, field: str) -> None:
        if len(text) > self._longest_text:
            least = -(-len(text) * self.max_model_len // self._longest_text)  # tokens, each as long as the longest
            raise ContextOverflow(field, f"{field} has at least {least} tokens", self.max_model_len)
