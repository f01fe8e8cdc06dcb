"""Outputs that a grammar allows, drawn at random without a model."""

import random
from pathlib import Path

import numpy as np
import tokenizers

from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.engine.structured_output.grammar_compiler import Grammar, GrammarCompiler

# Tokens that bring most documents to their end.
_CLOSING = ('"', "}", "]", ",", ":", "0", "5", "-", ".", "@", "T", "Z", "a", '"}', "}}")


class RandomOutputs:
    """Draws outputs in the vocabulary of a model. Load it once: it builds the tokenizer's tables."""

    def __init__(self, model: str = "smollm2") -> None:
        checkpoint = find_checkpoint(model)
        text = (Path(checkpoint.directory) / "tokenizer.json").read_text(encoding="utf-8")
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._eos_token_ids = np.array(checkpoint.eos_token_ids)
        self._num_words = -(-checkpoint.config.vocab_size // 32)
        self._closing = np.array([self._tokenizer.token_to_id(token) for token in _CLOSING])
        # White space may stand between any two tokens of JSON: most draws leave it out. Ġ and others are its bytes.
        vocabulary = self._tokenizer.get_vocab()
        self._blank = np.array([id for token, id in vocabulary.items() if not token.strip("ĠĊĉč")])
        self.compiler = GrammarCompiler(text, checkpoint.config.vocab_size, checkpoint.eos_token_ids)

    def draw(self, grammar: Grammar, rng: random.Random, max_tokens: int = 80) -> str | None:
        """Return the text of a whole output; None if it is not whole after `max_tokens`.

        Closing tokens become more likely with every token. Every other forced token is taken without a choice.
        """
        state = grammar.start(max_tokens)
        words = np.zeros(self._num_words, np.int32)
        output: list[int] = []
        while len(output) < max_tokens:
            if state.is_complete:
                return self._text(output)
            state.write_mask(words)
            allowed = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
            forced = state.forced_token()
            if forced is not None and rng.random() < 0.5:
                assert allowed[forced], f"token {forced} is forced and not allowed after {self._text(output)!r}"
                allowed[:] = False
                allowed[forced] = True
            ends = allowed[self._eos_token_ids].any()
            allowed[self._eos_token_ids] = False
            closing = self._closing[allowed[self._closing]]
            if ends and (rng.random() < 0.3 or not allowed.any()):
                return self._text(output)
            assert allowed.any(), f"no token may follow {self._text(output)!r}"
            if rng.random() < 0.8:
                text = allowed.copy()
                text[self._blank] = False
                allowed = text if text.any() else allowed
            is_closing = len(closing) and rng.random() < 0.5 + len(output) / max_tokens
            token = int(rng.choice(closing if is_closing else np.flatnonzero(allowed)))
            assert state.accept(token)
            output.append(token)
        return None

    def _text(self, output: list[int]) -> str:
        text: str = self._tokenizer.decode(output, skip_special_tokens=False)
        return text
