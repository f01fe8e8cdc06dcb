"""The new tokens of a request, as the scheduler commits them and the server receives them. Imports no numpy."""

from typing import Literal, NamedTuple

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class TokenLogprobs(NamedTuple):
    """How probable a token was: natural log-probabilities of the model itself, before penalties and temperature.

    rank: 1 for the likeliest token. top: the likeliest tokens with their log-probabilities, in descending order.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class TokenOutput(msgspec.Struct, array_like=True):
    """A new token of one choice of a request.

    index: of the choice. logprobs: of the token, where asked for.
    num_cached_tokens, prompt_logprobs: of the prompt, with the choice's first token; the latter without the first
        prompt token's.
    num_accepted, num_rejected: draft tokens of the choice in this step, with the step's first token.
    completes_grammar: the output ends because its grammar is complete, and the token is a part of the text.
    """

    request_id: str
    index: int
    token_id: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_accepted: int = 0
    num_rejected: int = 0
    completes_grammar: bool = False
