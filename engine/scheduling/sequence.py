"""A request's life in the engine."""

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from dispec.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from dispec.engine.scheduling.logits_processors import LogitsProcessors
    from dispec.engine.speculation.speculator import SpeculationState

FinishReason = Literal["stop", "length", "abort", "error"]


class Status(enum.Enum):
    """WAITING_FOR_REMOTE_KV: another engine computes the prompt, and its KV blocks are not all here yet."""

    WAITING_FOR_REMOTE_KV = "waiting_for_remote_kv"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class SamplingFeatures(enum.IntFlag):
    """What choosing a sequence's tokens takes beyond the likeliest one. A step computes only what somebody needs."""

    DRAW = 1
    RESTRICT = 2
    EDIT = 4
    MASK = 8
    LOGPROBS = 16
    PROMPT_LOGPROBS = 32


class TokenLogprobs(NamedTuple):
    """How probable a token was: natural log-probabilities of the model itself, before penalties and temperature.

    rank: 1 for the likeliest token. top: the likeliest tokens and theirs, in falling order.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False, slots=True)
class Sequence:
    """One prompt and what was generated after it. It owns its block table.

    The keys and values of the first `num_computed_tokens` tokens are in the cache, or will be when the steps that
    were scheduled have run. A step that is still running may be about to give a token: it counts as pending.

        token_ids    | prompt ........................ | generated ....... | pending |
                     | computed ................................ | to come           |
        block_table  | b0 | b1 | b2 | …  covers the computed tokens

    seed: of this sequence's random numbers.
    stop_token_ids: all tokens that end it, end-of-sequence tokens included.
    max_len: most tokens of prompt and output.
    arrival_time: seconds on the engine's clock.
    needs: of its choices, `SamplingFeatures` as a plain number.
    choices: the sequences of the same request, this one among them, where it asked for several.
    forks: those that wait for this one to compute the prompt, and then share its blocks.
    scheduled_time: when it first was given work, on the same clock.
    error: what went wrong in the engine, where the finish reason is "error".
    num_cached_tokens: prompt tokens that were found in the cache when the sequence first ran.
    num_draft_tokens: how many tokens are to be guessed in the next step, at most.
    draft_token_ids: guesses of the tokens after `token_ids`, for a step to verify.
    drafting: what speculation keeps for it.
    num_draft_computed_tokens: the first tokens whose keys and values a draft model has computed.
    slack: seconds after its arrival for which it is in time: whoever has less left goes first.
    """

    id: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    max_len: int
    arrival_time: float
    priority: int = 0
    cache_salt: str | None = None
    slack: float = 0.0
    logits_processors: "LogitsProcessors | None" = None
    sampling_features: int = field(init=False)
    choices: tuple["Sequence", ...] = ()
    forks: list["Sequence"] = field(default_factory=list)
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_cached_tokens: int | None = None
    num_draft_tokens: int = 0
    draft_token_ids: list[int] = field(default_factory=list)
    num_draft_computed_tokens: int = 0
    speculation: "SpeculationState | None" = None
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered_blocks: int = 0
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    scheduled_time: float | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the second token on

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        self.choices = self.choices or (self,)
        params, edits = self.params, self.logits_processors
        sampling_features = {
            SamplingFeatures.DRAW: params.temperature > 0,
            SamplingFeatures.RESTRICT: params.restricts,
            SamplingFeatures.EDIT: edits is not None and edits.edits,
            SamplingFeatures.MASK: edits is not None and edits.masks,
            SamplingFeatures.LOGPROBS: params.logprobs is not None,
            SamplingFeatures.PROMPT_LOGPROBS: params.prompt_logprobs is not None,
        }
        self.sampling_features = sum(int(need) for need, is_needed in sampling_features.items() if is_needed)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, without a pending one."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def can_continue(self) -> bool:
        """Whether another token can be computed now: not at the end, nor where the pending one must be known first."""
        if self.num_pending_tokens == 0:
            return True
        at_end = len(self.token_ids) + self.num_pending_tokens >= self.max_len
        return not (at_end or self.params.needs_last_token)

    def append(self, token_id: int) -> None:
        """Take a sampled token, and note if it ends the sequence."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_len:
            self.finish_reason = "length"
