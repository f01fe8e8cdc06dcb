"""The sampling parameters of a request, declared and checked in one place."""

import enum
import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from types import MappingProxyType
from typing import Annotated, Any

from dispec.engine.option_fields import Option, check_fields, invalid_field, with_declared_fields
from dispec.engine.structured_output.structured_outputs import StructuredOutputs

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_LOGIT_BIAS = 1024
_MAX_INT = 2**31 - 1


class RequestOutputKind(enum.Enum):
    """What each `RequestOutput` of a request holds.

    CUMULATIVE: all tokens so far. DELTA: the tokens since the output before. FINAL_ONLY: one output, all tokens.
    """

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


_LISTS = ("stop", "stop_token_ids", "bad_words", "bad_words_token_ids", "allowed_token_ids")


@with_declared_fields
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt. Raises InvalidField, a ValueError, with the field, its value and the limit.

    A list or mapping that is None is empty. max_tokens None generates until the end of the context.

    output_kind: What each output of a stream holds. Default: DELTA in LLM.stream, CUMULATIVE in AsyncLLM.
    """

    n: Annotated[
        int,
        Option(
            "Independent continuations of the prompt, which is computed once; continuation i is what seed + i gives.",
            ge=1,
            le=MAX_CHOICES,
        ),
    ] = 1
    temperature: Annotated[
        float, Option("Divides the logits: higher is more varied, 0 takes the likeliest token.", ge=0, le=100)
    ] = 1.0
    top_k: Annotated[
        int,
        Option(
            "Sample from this many likeliest tokens, and from those as likely as the last of them; 0 and -1 are off.",
            ge=-1,
            le=_MAX_INT,
        ),
    ] = 0
    top_p: Annotated[
        float, Option("Sample from the fewest likeliest tokens of this probability together.", gt=0, le=1)
    ] = 1.0
    min_p: Annotated[
        float, Option("Sample from tokens at least this many times as probable as the likeliest.", ge=0, le=1)
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Option(
            "Above 1, tokens of the prompt and the output are less likely: it divides positive and multiplies negative"
            " logits.",
            gt=0,
            le=100,
        ),
    ] = 1.0
    presence_penalty: Annotated[
        float, Option("Subtracted once from the logits of tokens in the output.", ge=-2, le=2)
    ] = 0.0
    frequency_penalty: Annotated[
        float, Option("Subtracted from the logits of tokens in the output, for each occurrence.", ge=-2, le=2)
    ] = 0.0
    logit_bias: Annotated[Mapping[int, float], Option("Numbers to add to the logits of tokens.")] = field(
        default_factory=dict
    )
    allowed_token_ids: Annotated[Series[int] | None, Option("The only tokens to generate.", default="all")] = None
    bad_words: Annotated[
        Series[str], Option("Texts never to generate, as tokenised with and without a space before them.")
    ] = ()
    bad_words_token_ids: Annotated[
        Series[Series[int]], Option("Lists of token ids; the last of each is never generated after the others.")
    ] = ()
    min_tokens: Annotated[
        int, Option("No stop string or token, end of sequence included, ends the output earlier.", ge=0, le=_MAX_INT)
    ] = 0
    # The HTTP API refuses a value beyond max_model_len, because clients rely on that; here it asks for all that fits.
    max_tokens: Annotated[
        int | None,
        Option("Most tokens to generate; the end of the context ends the output too.", ge=1, le=_MAX_INT),
    ] = 256
    seed: Annotated[
        int | None,
        Option(
            "Makes sampling repeatable in any batch, up to the order of floating-point sums.",
            ge=-(2**63),
            le=2**63 - 1,
            default="random",
        ),
    ] = None
    ignore_eos: Annotated[bool, Option("Continue past end-of-sequence tokens.")] = False
    stop_token_ids: Annotated[
        Series[int], Option("Further tokens that end the output; the one that did is its last.")
    ] = ()
    stop: Annotated[Series[str], Option("Texts, or one text, before which the output ends.")] = ()
    include_stop_str_in_output: Annotated[bool, Option("End the output after the stop string.")] = False
    logprobs: Annotated[
        int | None,
        Option(
            "Return log-probabilities of each token and of this many likeliest, before any change to the logits.",
            ge=0,
            le=MAX_LOGPROBS,
            default="none",
        ),
    ] = None
    prompt_logprobs: Annotated[
        int | None, Option("The same for the tokens of the prompt.", ge=0, le=MAX_LOGPROBS, default="none")
    ] = None
    skip_special_tokens: Annotated[bool, Option("Leave special tokens out of the text.")] = True
    structured_outputs: Annotated[
        StructuredOutputs | Mapping[str, Any] | None,
        Option("The grammar that the output follows: json, json_object, regex, choice, grammar or structural_tag."),
    ] = None
    # No option of the command line: it is about what a call of the Python API returns.
    output_kind: RequestOutputKind | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.output_kind, RequestOutputKind | None):
            raise invalid_field("output_kind", f"is {self.output_kind!r:.50}, must be a RequestOutputKind")
        self._freeze()
        if self.min_tokens > self.token_limit:
            raise invalid_field("min_tokens", f"is {self.min_tokens}, must be at most max_tokens ({self.max_tokens})")
        for name, tokens in self.token_fields().items():
            for token in tokens:
                if not isinstance(token, Integral):
                    raise invalid_field(name, f"holds {token!r:.50}, must be token ids")
                if not 0 <= token <= _MAX_INT:
                    raise invalid_field(name, f"holds {token}, must be token ids between 0 and {_MAX_INT}")
        self._check_logit_bias()
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise invalid_field("allowed_token_ids", "is empty: nothing could be generated")
        if not all(self.bad_words_token_ids):
            raise invalid_field("bad_words_token_ids", "holds an empty list")
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                    raise invalid_field(name, f"holds {text!r:.50}, must be texts of 1 to {MAX_STOP_LENGTH} characters")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise invalid_field("stop", f"holds {len(self.stop)} texts, must be at most {MAX_STOP_STRINGS}")
        structure = self.structure
        if structure is not None and structure.kind is not None:
            for name in ("stop", "stop_token_ids"):
                if getattr(self, name):
                    said = f"could end an output before it follows {structure.label}: leave one of them out"
                    raise invalid_field(name, said)

    @property
    def token_limit(self) -> int:
        """`max_tokens` as a number."""
        return _MAX_INT if self.max_tokens is None else self.max_tokens

    @property
    def structure(self) -> StructuredOutputs | None:
        """`structured_outputs`, which a mapping has become when the parameters were made."""
        assert not isinstance(self.structured_outputs, Mapping)
        return self.structured_outputs

    @property
    def filters_tokens(self) -> bool:
        """Whether top-k, top-p or min-p filter the tokens that are sampled from."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def needs_last_token(self) -> bool:
        """Whether sampling a token needs the token before it, besides the model's logits."""
        has_long_bad_words = any(len(words) > 1 for words in self.bad_words_token_ids)
        return self.penalizes or has_long_bad_words or self.structured_outputs is not None

    def token_fields(self) -> dict[str, Series[int]]:
        """Return the token ids of every field that holds some, to be checked against a vocabulary."""
        return {
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": tuple(self.logit_bias),
            "bad_words_token_ids": tuple(token for words in self.bad_words_token_ids for token in words),
        }

    def _freeze(self) -> None:
        """Replace lists by tuples, and None by an empty one. Raises InvalidField for values that are no lists."""
        for name in _LISTS:
            value = getattr(self, name)
            if isinstance(value, str) and name == "stop":
                value = (value,)
            elif isinstance(value, str):
                raise invalid_field(name, "is one text, must be a list")
            if value is not None and not isinstance(value, Iterable):
                raise invalid_field(name, f"is {value!r:.50}, must be a list")
            if value is not None or name != "allowed_token_ids":
                object.__setattr__(self, name, tuple(value or ()))
        for words in self.bad_words_token_ids:
            if not isinstance(words, Iterable):
                raise invalid_field("bad_words_token_ids", f"holds {words!r:.50}, must be lists of token ids")
        object.__setattr__(self, "bad_words_token_ids", tuple(tuple(words) for words in self.bad_words_token_ids))
        if not isinstance(self.logit_bias, Mapping | None):
            raise invalid_field("logit_bias", f"is {self.logit_bias!r:.50}, must be a mapping of token ids to numbers")
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias or {})))
        if isinstance(self.structured_outputs, Mapping):
            structure = StructuredOutputs.from_mapping(self.structured_outputs)
            object.__setattr__(self, "structured_outputs", structure)
        elif not isinstance(self.structured_outputs, StructuredOutputs | None):
            said = f"is {type(self.structured_outputs).__name__}, must be a mapping such as {{'json': …}}"
            raise invalid_field("structured_outputs", said)

    def _check_logit_bias(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise invalid_field("logit_bias", f"holds {len(self.logit_bias)} tokens, must be at most {MAX_LOGIT_BIAS}")
        for token, bias in self.logit_bias.items():
            if not isinstance(bias, Real):
                raise invalid_field("logit_bias", f"of token {token} is {bias!r:.50}, must be a number")
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise invalid_field("logit_bias", f"of token {token} is {bias}, must be between -100 and 100")
