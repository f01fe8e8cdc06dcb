"""Grammars for tests of a tiny model, each with a check of the text by other means."""

import json
import re

import jsonschema

from dispec import LLM, SamplingParams
from tests.checkpoints import EOS_TOKEN_ID

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
        "colours": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}
# Free text between literal texts, which are forced; texts that may end at many places; and a choice of long texts.
FORM = r"Name: [A-Za-z ]{1,9}\nAge: [0-9]{1,3}\nQuestion: (yes|no|perhaps not)\n"
CHOICES = ("everyone knows", "everyone jumps over the lazy dog", "continuous batching")
WORDS = "(ab|cd|[0-9]+ )+"
LARK = 'start: item ("," item)* "."\nitem: /[a-z]{1,4}/ | "(" item ")"\n'

_STRUCTURES: tuple[dict, ...] = (
    {"json": PERSON},
    {"regex": FORM},
    {"choice": CHOICES},
    {"regex": WORDS},
    {"grammar": LARK},
)
_SAMPLING = (
    {"temperature": 0.0},
    {"temperature": 1.3},
    {"temperature": 1.0, "top_k": 7, "top_p": 0.8},
    {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"temperature": 0.9, "min_p": 0.05, "presence_penalty": 0.7, "logit_bias": {5: 3.0, 9: -100.0}},
    {"temperature": 1.0, "bad_words_token_ids": ((68,), (70, 71)), "min_tokens": 9},
    {"temperature": 0.8, "logprobs": 3},
    {"temperature": 0.0, "ignore_eos": True},
)


def grammar_params(count: int, max_tokens: int = 60, **others) -> list[SamplingParams]:
    """Every grammar with every kind of sampling, in rotation, each sequence with its own."""
    return [
        SamplingParams(
            max_tokens=max_tokens,
            seed=index,
            structured_outputs=_STRUCTURES[index % len(_STRUCTURES)],
            **_SAMPLING[index % len(_SAMPLING)] | others,
        )
        for index in range(count)
    ]


def check_text(index: int, text: str) -> None:
    """Raise AssertionError unless the text follows the grammar of entry `index` of `grammar_params`."""
    kind = index % len(_STRUCTURES)
    if kind == 0:
        jsonschema.validate(json.loads(text), PERSON)
    elif kind == 2:
        assert text in CHOICES
    else:
        assert re.fullmatch({1: FORM, 3: WORDS, 4: r"\(*[a-z]{1,4}\)*(,\(*[a-z]{1,4}\)*)*\."}[kind], text), repr(text)


def text_of(llm: LLM, token_ids: list[int]) -> str:
    """Return the text of an output, without the token that ends it."""
    assert llm.tokenizer is not None
    return llm.tokenizer.decode([token for token in token_ids if token != EOS_TOKEN_ID])
