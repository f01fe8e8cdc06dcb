"""A request's life in the engine."""

import enum
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Series
from dataclasses import dataclass, field

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.logits_processors import LogitsProcessors
from dispec.engine.scheduling.token_output import FinishReason, TokenLogprobs
from dispec.engine.structured_output.grammar_state import GrammarState

# Appended at once; the next steps sample and append the others. They take 0.1 s, and 3,000 a second.
_MAX_FORCED_TOKENS = 256


class Status(enum.Enum):
    """Where a sequence is. WAITING_FOR_REMOTE_KV: another engine computes its prompt."""

    WAITING_FOR_REMOTE_KV = "waiting_for_remote_kv"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class SamplingFeatures:
    """Features of sampling beyond the argmax, each a bit. A step computes those that its sequences use.

    Plain numbers: `&` of an `enum.IntFlag` takes 1.5 us.
    """

    RANDOM = 1
    TOP_K_TOP_P = 2
    PENALTIES = 4
    TOKEN_MASK = 8
    LOGPROBS = 16
    PROMPT_LOGPROBS = 32


@dataclass(slots=True)
class SequenceDraft:
    """Draft tokens of a sequence, which follow its `token_ids`.

    num_tokens: most draft tokens that the next step may verify.
    token_ids: the draft tokens; placeholders while the device computes them.
    num_computed_tokens: number of the sequence's first tokens that the draft model has computed.
    """

    num_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0


def new_block_table(blocks: Iterable[int] = ()) -> "array[int]":
    """Return a block table: int32 numbers of blocks, which are copied to a step's inputs in one piece."""
    return array("i", blocks)


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """One prompt and the tokens generated after it. It owns its block table.

    The keys and values of the first `num_computed_tokens` tokens are in the cache, or will be when the steps that
    were scheduled have run. The token that a running step samples is pending until the step is committed.

        token_ids    | prompt ........................ | generated ....... | pending |
                     | computed ................................ | uncomputed        |
        block_table  | b0 | b1 | b2 | …  covers the computed tokens

    seed: of the sequence's random numbers.
    stop_token_ids: all tokens that end the sequence, end-of-sequence tokens included.
    max_len: most tokens of prompt and output.
    arrival_time, scheduled_time: seconds on the engine's clock; the latter is the start of the sequence's first step.
    request_id: of the request that the sequence is a choice of; index: of the choice.
    slack: seconds for which the sequence can wait. The sequence with the least slack left is scheduled first.
    sampling_features: bits of `SamplingFeatures`.
    choices: all sequences of the request, this one included.
    forks: choices that share this sequence's blocks once it has computed the prompt.
    num_cached_tokens: prompt tokens found in the cache when the sequence was first admitted.
    num_forced_tokens: last tokens that the grammar added to a sampled one and that no step has computed.
    error: the error that ended the sequence, where `finish_reason` is "error".
    prompt_logprobs: of the prompt's tokens from the second one on.
    """

    id: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    max_len: int
    arrival_time: float
    request_id: str = ""
    index: int = 0
    priority: int = 0
    cache_salt: str | None = None
    slack: float = 0.0
    logits_processors: LogitsProcessors | None = None
    sampling_features: int = field(init=False)
    choices: tuple["Sequence", ...] = ()
    forks: list["Sequence"] = field(default_factory=list)
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_cached_tokens: int | None = None
    num_forced_tokens: int = 0
    block_table: "array[int]" = field(default_factory=new_block_table)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered_blocks: int = 0
    draft: SequenceDraft = field(default_factory=SequenceDraft)
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    scheduled_time: float | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        self.choices = self.choices or (self,)
        params, processors = self.params, self.logits_processors
        features = {
            SamplingFeatures.RANDOM: params.temperature > 0,
            SamplingFeatures.TOP_K_TOP_P: params.filters_tokens,
            SamplingFeatures.PENALTIES: processors is not None and processors.has_penalties,
            SamplingFeatures.TOKEN_MASK: processors is not None and processors.has_mask,
            SamplingFeatures.LOGPROBS: params.logprobs is not None,
            SamplingFeatures.PROMPT_LOGPROBS: params.prompt_logprobs is not None,
        }
        self.sampling_features = sum(feature for feature, is_needed in features.items() if is_needed)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Number of generated tokens, without a pending one."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def can_continue(self) -> bool:
        """Whether the token after a pending one can be computed before the pending token is known."""
        num_pending = self.num_pending_tokens
        return not num_pending or (
            len(self.token_ids) + num_pending < self.max_len and not self.params.needs_last_token
        )

    @property
    def grammar(self) -> GrammarState | None:
        return None if self.logits_processors is None else self.logits_processors.grammar

    @property
    def is_whole(self) -> bool:
        """Whether the output has all that its grammar demands, and nothing can follow."""
        grammar = self.grammar
        return grammar is not None and (not grammar.completion if grammar.is_closing else grammar.is_complete)

    def append(self, token_id: int) -> int:
        """Append a sampled token and those that the grammar adds, and set the finish reason if the output ends.

        The grammar adds tokens that are forced. It drops the token if too few tokens are left to complete the output
        after it; those that complete it are forced then. Returns the number of appended tokens: 0 if the token was
        dropped and the next one is sampled again, because logprobs are asked for.
        """
        grammar = self.grammar
        if grammar is None:
            self._push(token_id, None)
            return 1
        size = len(self.token_ids)
        self._append_to_grammar(grammar, token_id)
        self.append_forced()
        num_appended = len(self.token_ids) - size
        self.num_forced_tokens = max(0, num_appended - 1)
        return num_appended

    def append_forced(self) -> None:
        """Append the tokens that follow without being sampled. With logprobs there are none: masks allow one token."""
        if self.grammar is None or self.params.logprobs is not None:
            return
        for _ in range(_MAX_FORCED_TOKENS):
            if self.finish_reason is not None or (token_id := self.grammar.forced_token()) is None:
                break
            self._append_to_grammar(self.grammar, token_id)

    def restore(self, token_ids: Series[int]) -> None:
        """Append output tokens that another engine generated, and set the finish reason if the output ends."""
        for token_id in token_ids:
            if self.grammar is not None:
                self._append_to_grammar(self.grammar, token_id)
            else:
                self._push(token_id, None)

    def _append_to_grammar(self, grammar: GrammarState, token_id: int) -> None:
        """Append a token, or drop it and let the grammar force those that complete the output."""
        if grammar.accept(token_id):
            self._push(token_id, grammar)
        else:
            grammar.close()

    def _push(self, token_id: int, grammar: GrammarState | None) -> None:
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            self.finish_reason = "stop"
        elif grammar is not None and self.is_whole:
            self.finish_reason = "length" if grammar.is_closing else "stop"
        elif len(self.token_ids) >= self.max_len:
            self.finish_reason = "length"
