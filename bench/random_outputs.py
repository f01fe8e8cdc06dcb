"""Outputs that a grammar allows, drawn at random without a model."""

import random
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

# Tokens that bring most JSON documents to their end.
_CLOSING = ('"', "}", "]", ",", ":", "0", "5", "-", ".", "@", "T", "Z", "a", '"}', "}}")


class Follower(Protocol):
    """Follows an output in its grammar, as `GrammarState` does."""

    @property
    def is_complete(self) -> bool: ...
    def write_mask(self, words: np.ndarray) -> object: ...
    def accept(self, token_id: int) -> bool: ...
    def forced_token(self) -> int | None: ...
    def close(self) -> None: ...


class RandomOutputs:
    """Draws outputs in the vocabulary of a tokenizer.

    directory: of `tokenizer.json`. vocab_size: of the logits, padding included.
    """

    def __init__(self, directory: str | Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
        vocabulary = self.tokenizer.get_vocab()
        self._num_words = -(-vocab_size // 32)
        self._eos_token_ids = np.array(eos_token_ids)
        self._closing = np.array([vocabulary[token] for token in _CLOSING if token in vocabulary])
        # White space may stand between any two tokens of JSON: most draws leave it out. Ġ and others are its bytes.
        self._blank = np.array([id for token, id in vocabulary.items() if not token.strip("ĠĊĉč")])

    def draw(self, follower: Follower, rng: random.Random, max_tokens: int = 80) -> str | None:
        """Return the text of a whole output; None if it is not whole after `max_tokens`.

        Closing tokens become more likely with every token. Every other forced token is taken without a choice. A token
        that the follower drops, which it may do among the last 100, lets it close the output.
        """
        words = np.zeros(self._num_words, np.int32)
        output: list[int] = []
        while len(output) < max_tokens:
            if follower.is_complete:
                return self._text(output)
            follower.write_mask(words)
            allowed = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
            forced = follower.forced_token()
            if forced is not None and rng.random() < 0.5:
                assert allowed[forced], f"token {forced} is forced and not allowed after {self._text(output)!r}"
                allowed[:] = False
                allowed[forced] = True
            ends = allowed[self._eos_token_ids].any()
            allowed[self._eos_token_ids] = False
            if ends and (rng.random() < 0.3 or not allowed.any()):
                return self._text(output)
            assert allowed.any(), f"no token may follow {self._text(output)!r}"
            if rng.random() < 0.8:
                text = allowed.copy()
                text[self._blank] = False
                allowed = text if text.any() else allowed
            closing = self._closing[allowed[self._closing]]
            is_closing = len(closing) and rng.random() < 0.5 + len(output) / max_tokens
            token = int(rng.choice(closing if is_closing else np.flatnonzero(allowed)))
            if not follower.accept(token):
                assert max_tokens - len(output) < 100, f"token {token} is dropped after {self._text(output)!r}"
                return self._text(output + self._completion(follower))
            output.append(token)
        if not follower.is_complete:
            follower.write_mask(words)
            if not any(words[token >> 5] >> (token & 31) & 1 for token in self._eos_token_ids):
                return None
        return self._text(output)

    def _completion(self, follower: Follower) -> list[int]:
        """Close an output and return the tokens that complete it."""
        follower.close()
        completion: list[int] = []
        while (token := follower.forced_token()) is not None and token not in self._eos_token_ids:
            assert follower.accept(token)
            completion.append(token)
        return completion

    def _text(self, output: list[int]) -> str:
        text: str = self.tokenizer.decode(output, skip_special_tokens=False)
        return text
