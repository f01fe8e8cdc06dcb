"""llguidance's tables of a tokenizer, and grammars compiled with them, within limits."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_UNTYPED = "\U0010ffff"  # a code point that Unicode reserves: no text has it

# The first two count items of the parser: a row of 5,000 holds 1,000 optional properties, and 20,000 in a step take
# 50 ms. Fuel is spent by the lexer: 200,000 in a step take 15 ms. All end the sequence of the grammar, alone.
_LIMITS = {
    "max_items_in_row": 5_000,
    "step_max_items": 20_000,
    "step_lexer_fuel": 200_000,
    "initial_lexer_fuel": 1_000_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
}


class Vocabulary(NamedTuple):
    """The tokens that masks are computed for.

    tokenizer_path: of `tokenizer.json`, which is read when tables are made.
    size: of the logits, padding included.
    eos_token_ids: tokens that end an output where the grammar lets it end.
    """

    tokenizer_path: str
    size: int
    eos_token_ids: tuple[int, ...]

    def tables(self) -> LLTokenizer:
        """Return the tables: 0.6 s for 151,936 tokens. Raises ValueError for a tokenizer that llguidance cannot read.

        llguidance takes added tokens of the form `<…>` for special ones, which are no text, but tokenizes forced text
        to them. They get names here that no text spells.
        """
        tokenizer = json.loads(Path(self.tokenizer_path).read_text(encoding="utf-8"))
        for token in tokenizer.get("added_tokens") or ():
            name = token.get("content", "")
            if token.get("special") or (name.startswith("<") and name.endswith(">")):
                token["content"], token["special"] = _hidden(name), True
                _rename(tokenizer["model"], name, token["id"])
        return LLTokenizer(json.dumps(tokenizer), n_vocab=self.size, eos_token=list(self.eos_token_ids) or None)


def _hidden(name: str) -> str:
    """Return the name of a special token that no text spells."""
    return f"<{_UNTYPED}{name}>"


def _rename(model: dict[str, Any], name: str, token_id: int) -> None:
    """Rename a token in the vocabulary of a model that has it there too."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict) and name in vocabulary:
        vocabulary[_hidden(name)] = vocabulary.pop(name)
    elif isinstance(vocabulary, list) and token_id < len(vocabulary):
        vocabulary[token_id][0] = _hidden(name)
    if model.get("unk_token") == name:
        model["unk_token"] = _hidden(name)


def new_matcher(tables: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile a grammar in llguidance's form, and compute its first mask. Errors are those of the matcher."""
    limits = LLParserLimits(**_LIMITS, verbose_errors=False)  # type: ignore[arg-type]
    matcher = LLMatcher(tables, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        matcher.compute_ff_tokens()
    return matcher
