"""The changes of a sequence's next logits by penalties and biases, and its mask of allowed tokens.

This is the host's half, without torch. The device's half is `layers.logit_processing`. State is updated token by token,
so a step costs the same for sequences of any length.
"""

from collections.abc import Iterator, Sequence, Set
from copy import copy

import numpy as np

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.structured_output.grammar_state import GrammarState


class LogitsProcessors:
    """The penalties, biases and token mask of one sequence.

    vocab_size: of the logits, padding included.
    stop_token_ids: all tokens that end the sequence; they are masked before `min_tokens` tokens and while a grammar's
        reasoning lasts. With a grammar and `ignore_eos`, those that the request does not name are masked as long as
        the grammar allows others.
    grammar: of the sequence's output, if any.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        stop_token_ids: frozenset[int],
        grammar: GrammarState | None = None,
    ) -> None:
        self.grammar = grammar
        self._params = params
        self._vocab_size = vocab_size
        self._num_seen = len(prompt_token_ids)
        # Entry i of the arrays is for token _tokens[i], and _slots[token] is i. The arrays have room to grow.
        seen = np.unique(np.asarray(prompt_token_ids if params.repetition_penalty != 1 else (), np.int64))
        biased = np.array(list(params.logit_bias), np.int64)
        self._tokens = np.union1d(seen, biased)
        self._scale = np.where(np.isin(self._tokens, seen), params.repetition_penalty, 1).astype(np.float32)
        self._addend = np.zeros(len(self._tokens), np.float32)
        self._addend[np.searchsorted(self._tokens, biased)] = list(params.logit_bias.values())
        self._slots = {token: slot for slot, token in enumerate(self._tokens.tolist())}
        self._output_counts: dict[int, int] = {}

        # Bad words of several tokens by their last but one, each as the tokens before its last one, and its last.
        self._endings: dict[int, list[tuple[list[int], int]]] = {}
        for words in params.bad_words_token_ids:
            if len(words) > 1:
                self._endings.setdefault(words[-2], []).append((list(words[:-1]), words[-1]))
        banned = {words[0] for words in params.bad_words_token_ids if len(words) == 1}
        if grammar is not None and params.ignore_eos:
            banned |= stop_token_ids - {*params.stop_token_ids}
        can_withhold = params.min_tokens > 0 or (grammar is not None and grammar.is_reasoning)
        self._withholds_stops = can_withhold and bool(stop_token_ids)
        self._mask = self._mask_at_first = _mask(params.allowed_token_ids, banned, vocab_size)
        if self._withholds_stops:
            self._mask_at_first = _mask(params.allowed_token_ids, banned | stop_token_ids, vocab_size)
        self._last_mask: tuple[tuple[bool, set[int]], np.ndarray] | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether `entries` can hold an entry: penalties or biases change logits."""
        return self._params.penalizes or bool(self._params.logit_bias)

    @property
    def has_mask(self) -> bool:
        """Whether `allowed_mask` ever masks a token."""
        return self._mask is not None or self._withholds_stops or bool(self._endings) or self.grammar is not None

    def advance(self, token_ids: Sequence[int]) -> None:
        """Count the tokens that are new since the last call. token_ids: all of the prompt and the output."""
        if self._params.penalizes:
            for token in token_ids[self._num_seen :]:
                self._count(token)
            self._num_seen = len(token_ids)

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (tokens int64, scale float32, addend float32) of the logits to change: `Penalties`.

        The arrays belong to this object and change with the next `advance`.
        """
        size = len(self._slots)
        return self._tokens[:size], self._scale[:size], self._addend[:size]

    def entries_ahead(
        self, token_ids: Sequence[int], draft_token_ids: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield `entries` after `token_ids` and after each draft token that follows. Draft tokens are not counted."""
        self.advance(token_ids)
        yield self.entries()
        if not draft_token_ids:
            return
        ahead = copy(self)
        ahead._slots, ahead._output_counts = dict(self._slots), dict(self._output_counts)
        ahead._tokens, ahead._scale, ahead._addend = self._tokens.copy(), self._scale.copy(), self._addend.copy()
        for token in draft_token_ids:
            if self._params.penalizes:
                ahead._count(token)
            tokens, scale, addend = ahead.entries()
            yield tokens.copy(), scale.copy(), addend.copy()

    def write_masks(
        self, rows: np.ndarray, token_ids: Sequence[int], num_output_tokens: int, draft_token_ids: Sequence[int]
    ) -> None:
        """Write masks of the next token, in the layout of `ops.mask_tokens`, into `rows`, [N, W], whose bits are set.

        They are the last N of those after `token_ids` and after each draft token that follows; `num_output_tokens` is
        the number of output tokens before the first one's token. A row allows all tokens after a draft token that the
        grammar rejects, because the sample before it differs from that draft token. Where the grammar and the other
        parameters have no token in common, the grammar's mask alone holds.
        """
        skipped = len(draft_token_ids) + 1 - len(rows)
        num_consumed = 0
        for ahead in range(len(draft_token_ids) + 1):
            if ahead and self.grammar is not None:
                if not self.grammar.try_consume(draft_token_ids[ahead - 1]):
                    break
                num_consumed += 1
            if ahead >= skipped:
                known = [*token_ids, *draft_token_ids[:ahead]] if ahead and self._endings else token_ids
                self._write_mask(rows[ahead - skipped], num_output_tokens + ahead, known)
        if num_consumed and self.grammar is not None:
            self.grammar.undo(num_consumed)

    def allowed_mask(self, num_output_tokens: int, last_token_ids: Sequence[int]) -> np.ndarray | None:
        """Return the mask of tokens that may come next, in the layout of `ops.mask_tokens`; None if all may.

        last_token_ids: the sequence's tokens, or at least as many of the last ones as the longest bad word has. Bad
        words match the output only, not the prompt. The array is cached: it must not be written to.
        """
        is_reasoning = self.grammar is not None and self.grammar.is_reasoning
        is_early = is_reasoning or num_output_tokens < self._params.min_tokens
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
            own = _mask(None, banned, self._vocab_size)
            assert own is not None
            self._last_mask = (is_early, banned), own if mask is None else own & mask
        return self._last_mask[1]

    def _write_mask(self, words: np.ndarray, num_output_tokens: int, last_token_ids: Sequence[int]) -> None:
        mask = self.allowed_mask(num_output_tokens, last_token_ids)
        if self.grammar is None or not self.grammar.write_mask(words):
            if mask is not None:
                words[:] = mask
        elif mask is not None and (both := words & mask).any():
            words[:] = both

    def _count(self, token: int) -> None:
        """Count an output token."""
        params, slot = self._params, self._slot(token)
        count = self._output_counts[token] = self._output_counts.get(token, 0) + 1
        bias = params.logit_bias.get(token, 0.0)
        self._scale[slot] = params.repetition_penalty
        self._addend[slot] = bias - params.presence_penalty - params.frequency_penalty * count

    def _slot(self, token: int) -> int:
        """Return the index of the token's entry, a new one if it has none."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._tokens):
            room = max(16, slot)
            self._tokens = np.concatenate([self._tokens, np.zeros(room, np.int64)])
            self._scale = np.concatenate([self._scale, np.ones(room, np.float32)])
            self._addend = np.concatenate([self._addend, np.zeros(room, np.float32)])
        self._tokens[slot] = token
        return slot


def _mask(allowed: Sequence[int] | None, banned: Set[int], vocab_size: int) -> np.ndarray | None:
    """Return one bit for each token, set if it is allowed and not banned, in int32 words; None if all are set."""
    if allowed is None and not banned:
        return None
    # Whole words: the bits past the vocabulary are of no token.
    bits = np.full(-(-vocab_size // 32) * 32, allowed is None)
    if allowed is not None:
        bits[list(allowed)] = True
    bits[[token for token in banned if token < vocab_size]] = False
    return np.packbits(bits, bitorder="little").view("<i4")
