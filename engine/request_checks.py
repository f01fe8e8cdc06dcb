"""Checks of a request against the limits of a model, for the engine and for the server. Loads no torch."""

from collections.abc import Collection, Set

from dispec.engine.errors import ContextOverflow, InvalidField
from dispec.engine.sampling_params import SamplingParams

MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1


def check_prompt_length(num_tokens: int, max_model_len: int, field: str = "prompt", name: str | None = None) -> None:
    """Raise InvalidField for an empty prompt, and ContextOverflow for one that leaves no room for an answer.

    name: of the prompt in the message, where the field holds several.
    """
    name = name or field
    if num_tokens == 0:
        raise InvalidField(field, f"{name} is empty, must have at least 1 token")
    if num_tokens >= max_model_len:
        raise ContextOverflow(field, f"{name} has {num_tokens} tokens", max_model_len)


def check_token_ids(token_ids: Collection[int], vocab_size: int, field: str, name: str | None = None) -> None:
    """Raise InvalidField for the first token id that is not in the vocabulary. name: as in `check_prompt_length`."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        token_id = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidField(field, f"{name or field} holds token id {token_id}, must be between 0 and {vocab_size - 1}")


def check_priority(priority: int) -> None:
    """Raise InvalidField for a priority that does not fit in 32 bits."""
    if not MIN_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidField("priority", f"priority is {priority}, must be between {MIN_PRIORITY} and {MAX_PRIORITY}")


def check_params(params: SamplingParams, stop_token_ids: Set[int], vocab_size: int) -> None:
    """Raise InvalidField for texts, for token ids that are not in the vocabulary, and for a mask of all tokens.

    stop_token_ids: all tokens that end the sequence.
    """
    for field, texts in (("stop", params.stop), ("bad_words", params.bad_words)):
        if texts:
            raise InvalidField(field, f"{field} is a text, which the engine does not see: use LLM, or token ids")
    for field, token_ids in params.token_fields().items():
        check_token_ids(token_ids, vocab_size, field)
    _check_some_token_is_allowed(params, stop_token_ids, vocab_size)


def _check_some_token_is_allowed(params: SamplingParams, stop_token_ids: Set[int], vocab_size: int) -> None:
    """Raise InvalidField if every token may be masked in a step: bad words count by their last tokens."""
    banned = {words[-1] for words in params.bad_words_token_ids}
    withholds_stops = params.min_tokens > 0 and bool(stop_token_ids)
    if withholds_stops:
        banned |= stop_token_ids
    allowed = range(vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
    if not all(token_id in banned for token_id in allowed):
        return
    is_set = {
        "allowed_token_ids": params.allowed_token_ids is not None,
        "bad_words": bool(params.bad_words_token_ids),
        "min_tokens": withholds_stops,
    }
    fields = [field for field, value in is_set.items() if value]
    reason = f" (min_tokens is {params.min_tokens}, which withholds stop tokens)" if withholds_stops else ""
    raise InvalidField(
        fields[0], f"{' and '.join(fields)} rule out every token of the vocabulary, at least one must remain{reason}"
    )
