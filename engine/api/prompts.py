"""The forms of prompts that `LLM` takes, normalized to one."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Series
from typing import Any, NamedTuple

from dispec.engine.unknown_names import refuse_unknown

Prompt = str | Series[int] | Mapping[str, Any]

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class PromptInput(NamedTuple):
    """A prompt as text, token ids or both. cache_salt: prefixes are shared only with prompts of the same salt."""

    text: str | None
    token_ids: list[int] | None = None
    cache_salt: str | None = None


class TokenizedPrompt(NamedTuple):
    """A prompt as token ids. text: where it was given as text."""

    token_ids: list[int]
    text: str | None = None
    cache_salt: str | None = None


def as_prompts(prompts: Prompt | Series[Prompt]) -> list[PromptInput]:
    """Return one prompt or many as a list.

    A prompt is a text, a list of token ids, or a mapping as in vLLM: `prompt` or `prompt_token_ids`, and optionally
    `cache_salt`. Raises ValueError for an empty list, or for the first item that is none of these.
    """
    if isinstance(prompts, str | Mapping):
        return [_as_prompt(prompts, "prompt")]
    # Bytes are iterables of numbers, and sets have no order.
    if isinstance(prompts, bytes | bytearray | set | frozenset) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is {type(prompts).__name__}, must be one prompt or a list of them")
    several: list[Any] = list(prompts)
    if several and all(isinstance(item, int) for item in several):
        return [PromptInput(None, several)]
    if not several:
        raise ValueError("prompts is empty: give at least one prompt")
    return [_as_prompt(item, f"prompts[{index}]") for index, item in enumerate(several)]


def _as_prompt(given: Any, where: str) -> PromptInput:
    if isinstance(given, Mapping):
        return _from_mapping(given, where)
    if isinstance(given, str):
        return PromptInput(given)
    if _is_token_ids(given):
        return PromptInput(None, list(given))
    raise ValueError(
        f"{where} is {type(given).__name__}, must be a text, a list of token ids or a mapping with one of them"
    )


def _from_mapping(given: Mapping[str, Any], where: str) -> PromptInput:
    refuse_unknown(where, map(str, given), _KEYS)
    text, token_ids, salt = (given.get(key) for key in _KEYS)
    if text is None and token_ids is None:
        raise ValueError(f"{where} has neither prompt nor prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: prompt is {type(text).__name__}, must be a text")
    if token_ids is not None and not _is_token_ids(token_ids):
        raise ValueError(f"{where}: prompt_token_ids is {type(token_ids).__name__}, must be a list of token ids")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise ValueError(f"{where}: cache_salt is {salt!r:.50}, must be a text that is not empty")
    return PromptInput(text, None if token_ids is None else list(token_ids), salt)


def _is_token_ids(given: Any) -> bool:
    is_series = isinstance(given, Series) and not isinstance(given, str | bytes | bytearray)
    return is_series and all(isinstance(token, int) for token in given)
