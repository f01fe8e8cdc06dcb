"""What a sequence's parameters do to its next logits: which are changed and by how much, and which are ruled out.

This is the host's half, without torch: one `LogitsProcessors` for each sequence that needs one. The device's half is
`layers.logit_processing`. State is updated token by token, so a step costs the same for sequences of any length.
"""

from collections.abc import Iterator, Sequence, Set

import numpy as np

from dispec.engine.sampling_params import SamplingParams


class LogitsProcessors:
    """The edits and the mask of one sequence.

    vocab_size: of the logits, padding included. stop_token_ids: all tokens that end the sequence; they are withheld
    until there are `min_tokens`.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        stop_token_ids: frozenset[int],
    ) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self._num_seen = len(prompt_token_ids)
        # Entry i is of token _tokens[i], and _slots knows i by the token. The arrays have room to grow.
        seen = np.unique(np.asarray(prompt_token_ids if params.repetition_penalty != 1 else (), np.int64))
        biased = np.array(list(params.logit_bias), np.int64)
        self._tokens = np.union1d(seen, biased)
        self._scale = np.where(np.isin(self._tokens, seen), params.repetition_penalty, 1).astype(np.float32)
        self._addend = np.zeros(len(self._tokens), np.float32)
        self._addend[np.searchsorted(self._tokens, biased)] = list(params.logit_bias.values())
        self._slots = {token: slot for slot, token in enumerate(self._tokens.tolist())}
        self._output_counts: dict[int, int] = {}

        # Bad words of several tokens, by the last but one, and for each the tokens before its last one and the last.
        self._endings: dict[int, list[tuple[list[int], int]]] = {}
        for words in params.bad_words_token_ids:
            if len(words) > 1:
                self._endings.setdefault(words[-2], []).append((list(words[:-1]), words[-1]))
        banned = {words[0] for words in params.bad_words_token_ids if len(words) == 1}
        self._withholds_stops = params.min_tokens > 0 and bool(stop_token_ids)
        self._mask = self._mask_at_first = _mask(params.allowed_token_ids, banned, vocab_size)
        if self._withholds_stops:
            self._mask_at_first = _mask(params.allowed_token_ids, banned | stop_token_ids, vocab_size)
        self._last_mask: tuple[tuple[bool, set[int]], np.ndarray] | None = None

    @property
    def edits(self) -> bool:
        """Whether `entries` can ever hold anything."""
        return self._params.penalizes or bool(self._params.logit_bias)

    @property
    def masks(self) -> bool:
        """Whether `allowed_mask` can ever rule out a token."""
        return self._mask is not None or self._withholds_stops or bool(self._endings)

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take note of the tokens that are new since the last call. `token_ids`: all of the prompt and the output."""
        params = self._params
        if not params.penalizes:
            return
        for token in token_ids[self._num_seen :]:
            slot = self._slot(token)
            count = self._output_counts[token] = self._output_counts.get(token, 0) + 1
            bias = params.logit_bias.get(token, 0.0)
            self._scale[slot] = params.repetition_penalty
            self._addend[slot] = bias - params.presence_penalty - params.frequency_penalty * count
        self._num_seen = len(token_ids)

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens int64, scale float32, addend float32) of the logits to change, each token once, as in `Penalties`.

        The arrays belong to this object and change with the next `advance`.
        """
        size = len(self._slots)
        return self._tokens[:size], self._scale[:size], self._addend[:size]

    def entries_ahead(
        self, token_ids: Sequence[int], drafts: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """`entries` after `token_ids`, and after each of the drafts that may follow; copies. No draft is remembered."""
        self.advance(token_ids)
        kept = [(token, self._output_counts.get(token)) for token in dict.fromkeys(drafts)]
        known = [
            (slot, self._scale[slot], self._addend[slot])
            for token in drafts
            if (slot := self._slots.get(token)) is not None
        ]
        size = len(self._slots)
        yield tuple(array.copy() for array in self.entries())  # type: ignore[misc]
        for count in range(1, len(drafts) + 1):
            self.advance([*token_ids, *drafts[:count]])
            yield tuple(array.copy() for array in self.entries())  # type: ignore[misc]
        if not drafts or not self._params.penalizes:
            return
        self._num_seen = len(token_ids)
        for token in [token for token, slot in self._slots.items() if slot >= size]:
            del self._slots[token]
        for slot, scale, addend in known:
            self._scale[slot], self._addend[slot] = scale, addend
        for token, number in kept:
            if number is None:
                self._output_counts.pop(token, None)
            else:
                self._output_counts[token] = number

    def allowed_mask(self, num_output_tokens: int, last_token_ids: Sequence[int]) -> np.ndarray | None:
        """Return the tokens that may come next, in the layout of `apply_token_mask`; None if all may.

        last_token_ids: the sequence's tokens, or as many of the last of them as bad words are long. Bad words match
        the output only, not the prompt. The array is kept for later calls: it must not be written to.
        """
        is_early = num_output_tokens < self._params.min_tokens
        mask = self._mask_at_first if is_early else self._mask
        known = min(num_output_tokens, len(last_token_ids))
        if not self._endings or not known:
            return mask
        banned = {
            last
            for start, last in self._endings.get(last_token_ids[-1], ())
            if len(start) <= known and list(last_token_ids[-len(start) :]) == start
        }
        if not banned:
            return mask
        if self._last_mask is None or self._last_mask[0] != (is_early, banned):
            copy = _mask(None, banned, self._vocab_size)
            assert copy is not None
            self._last_mask = (is_early, banned), copy if mask is None else copy & mask
        return self._last_mask[1]

    def _slot(self, token: int) -> int:
        """Where the token's entry is; makes one if there is none."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._tokens):
            room = max(16, slot)
            self._tokens = np.concatenate([self._tokens, np.zeros(room, np.int64)])
            self._scale = np.concatenate([self._scale, np.ones(room, np.float32)])
            self._addend = np.concatenate([self._addend, np.zeros(room, np.float32)])
        self._tokens[slot] = token
        return slot


def _mask(allowed: Sequence[int] | None, banned: Set[int], vocab_size: int) -> np.ndarray | None:
    """One bit for each token that is allowed and not banned, in int32 words; None if that is all of them."""
    if allowed is None and not banned:
        return None
    # Whole words; what is past the vocabulary is nobody's token.
    bits = np.full(-(-vocab_size // 32) * 32, allowed is None)
    if allowed is not None:
        bits[list(allowed)] = True
    bits[[token for token in banned if token < vocab_size]] = False
    return np.packbits(bits, bitorder="little").view("<i4")
