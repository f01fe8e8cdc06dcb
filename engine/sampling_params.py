"""What a request can ask of its continuation, checked in one place."""

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import MappingProxyType

from dispec.engine.errors import InvalidField
from dispec.engine.unknown_names import with_checked_names

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_LOGIT_BIAS = 1024

_OPTIONAL = ("seed", "logprobs", "prompt_logprobs")


@with_checked_names
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt. Raises InvalidField, a ValueError, with the field, its value and the limit.

    n: independent continuations of the prompt, which is computed once. Continuation i is what the seed + i gives
        alone.
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: draw from the k likeliest tokens; 0 or -1 is off. Tokens as likely as the last of them stay as well, here
        and in top_p.
    top_p: draw from the fewest likeliest tokens that have this probability together.
    min_p: draw from tokens at least this many times as probable as the likeliest.
    repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output.
    presence_penalty, frequency_penalty: subtracted from logits of tokens in the output, once and once for each time.
    logit_bias: added to the logits of the tokens named.
    allowed_token_ids: nothing else is ever generated.
    bad_words: texts that are never generated, as tokenised with and without a space before them.
    bad_words_token_ids: the same as token ids: the last of each is never chosen after those before it.
    min_tokens: no end-of-sequence token, stop token or stop string ends the output before this many tokens.
    max_tokens: most tokens to generate. The end of the context ends a sequence as well, so that a value beyond
        max_model_len asks for all that fits (the HTTP API refuses such a value: clients rely on that).
    seed: 64-bit; None draws one. The same seed gives the same tokens whatever else is in the batch, up to the
        order in which floating-point sums are taken.
    ignore_eos: do not stop at the model's end-of-sequence tokens.
    stop_token_ids: further tokens that end the sequence; the one that did is the last of `token_ids`.
    stop: texts that end the output where they begin, or where they end if `include_stop_str_in_output`.
    logprobs: log-probabilities of each chosen token and of this many likeliest ones, before any of the above.
    prompt_logprobs: the same for the tokens of the prompt.
    skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Series[int] | None = None
    bad_words: Series[str] = ()
    bad_words_token_ids: Series[Series[int]] = ()
    min_tokens: int = 0
    max_tokens: int = 256
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: Series[int] = ()
    stop: Series[str] = ()
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_kinds()
        self._freeze()
        self._check_token_kinds()
        for name, low, high in (
            ("n", 1, MAX_CHOICES),
            ("top_k", -1, 2**31 - 1),
            ("min_tokens", 0, 2**31 - 1),
            ("max_tokens", 1, 2**31 - 1),
            ("seed", -(2**63), 2**63 - 1),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidField(name, f"{name} is {value}, must be between {low} and {high}")
        for name, lowest, highest in (
            ("temperature", 0.0, 100.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            if not lowest <= getattr(self, name) <= highest:  # false for NaN
                value = getattr(self, name)
                raise InvalidField(name, f"{name} is {value}, must be between {lowest:g} and {highest:g}")
        if not 0 < self.top_p <= 1:
            raise InvalidField("top_p", f"top_p is {self.top_p}, must be above 0 and at most 1")
        if not 0 < self.repetition_penalty <= 100:
            raise InvalidField(
                "repetition_penalty",
                f"repetition_penalty is {self.repetition_penalty}, must be above 0 and at most 100",
            )
        if self.min_tokens > self.max_tokens:
            raise InvalidField(
                "min_tokens", f"min_tokens is {self.min_tokens}, must be at most max_tokens ({self.max_tokens})"
            )
        self._check_tokens()
        self._check_texts("stop", self.stop)
        self._check_texts("bad_words", self.bad_words)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidField("stop", f"stop holds {len(self.stop)} texts, must be at most {MAX_STOP_STRINGS}")

    @property
    def restricts(self) -> bool:
        """Whether draws are from a part of the vocabulary that depends on the probabilities."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_last_token(self) -> bool:
        """Whether a token can only be chosen by who knows the one before it, and not from the model's logits alone."""
        return self.penalizes or any(len(words) > 1 for words in self.bad_words_token_ids)

    def token_fields(self) -> dict[str, Series[int]]:
        """Every field that holds token ids, to be checked against a vocabulary."""
        return {
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": tuple(self.logit_bias),
            "bad_words_token_ids": tuple(token for words in self.bad_words_token_ids for token in words),
        }

    def _check_kinds(self) -> None:
        """Raise InvalidField for a value of another type than its field's. A list that is None is empty."""
        for name in ("n", "top_k", "min_tokens", "max_tokens", "seed", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if not isinstance(value, Integral) and (value is not None or name not in _OPTIONAL):
                raise InvalidField(name, f"{name} is {value!r:.50}, must be an integer")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            if not isinstance(getattr(self, name), Real):
                raise InvalidField(name, f"{name} is {getattr(self, name)!r:.50}, must be a number")
        for name in ("stop", "stop_token_ids", "bad_words", "bad_words_token_ids"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, ())
        if self.logit_bias is None:
            object.__setattr__(self, "logit_bias", {})
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "bad_words_token_ids"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Iterable):
                raise InvalidField(name, f"{name} is {value!r:.50}, must be a list")
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidField(
                "logit_bias", f"logit_bias is {self.logit_bias!r:.50}, must be a mapping of token ids to numbers"
            )
        for words in self.bad_words_token_ids:
            if not isinstance(words, Iterable):
                raise InvalidField(
                    "bad_words_token_ids", f"bad_words_token_ids holds {words!r:.50}, must be lists of token ids"
                )

    def _check_token_kinds(self) -> None:
        for name, tokens in self.token_fields().items():
            for token in tokens:
                if not isinstance(token, Integral):
                    raise InvalidField(name, f"{name} holds {token!r:.50}, must be token ids")
        for token, bias in self.logit_bias.items():
            if not isinstance(bias, Real):
                raise InvalidField("logit_bias", f"logit_bias of token {token} is {bias!r:.50}, must be a number")

    def _freeze(self) -> None:
        for name in ("stop", "bad_words"):
            if isinstance(getattr(self, name), str):
                raise InvalidField(name, f"{name} is one text, must be a list of texts")
        for name in ("stop_token_ids", "stop", "bad_words"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        object.__setattr__(self, "bad_words_token_ids", tuple(tuple(words) for words in self.bad_words_token_ids))
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    def _check_tokens(self) -> None:
        for name, tokens in self.token_fields().items():
            for token in tokens:
                if not 0 <= token < 2**31:
                    raise InvalidField(name, f"{name} holds {token}, must be token ids between 0 and {2**31 - 1}")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidField(
                "logit_bias", f"logit_bias holds {len(self.logit_bias)} tokens, must be at most {MAX_LOGIT_BIAS}"
            )
        for token, bias in self.logit_bias.items():
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise InvalidField("logit_bias", f"logit_bias of token {token} is {bias}, must be between -100 and 100")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidField("allowed_token_ids", "allowed_token_ids is empty: nothing could be generated")
        if not all(self.bad_words_token_ids):
            raise InvalidField("bad_words_token_ids", "bad_words_token_ids holds an empty list")

    @staticmethod
    def _check_texts(name: str, texts: Series[str]) -> None:
        for text in texts:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise InvalidField(
                    name, f"{name} holds {text!r:.50}, must be texts of 1 to {MAX_STOP_LENGTH} characters"
                )
