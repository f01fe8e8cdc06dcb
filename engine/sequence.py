"""A request's parameters and its life in the engine."""

import enum
import math
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt. Raises ValueError with the field, its value and the limit.

    temperature: 0 is greedy; otherwise logits are divided by it.
    max_tokens: most tokens to generate; the context length ends a sequence as well.
    seed: 64-bit; None draws one. The same seed gives the same tokens whatever else is in the batch, up to the
        order in which floating-point sums are taken.
    ignore_eos: do not stop at the model's end-of-sequence tokens.
    stop_token_ids: further tokens that end the sequence; the one that did is the last of `token_ids`.
    """

    temperature: float = 1.0
    max_tokens: int = 256
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise ValueError(f"temperature is {self.temperature}, must be between 0 and 100")
        if not 1 <= self.max_tokens <= 2**31 - 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, must be between 1 and 2147483647")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, must fit in 64 bits")
        for token in self.stop_token_ids:
            if token < 0:
                raise ValueError(f"stop_token_ids holds {token}, token ids are at least 0")


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One prompt and what was generated after it. It owns its block table.

    The first `num_computed_tokens` of `token_ids` have their keys and values in the cache; a sequence whose
    computed tokens are all but the last one is decoding.

        token_ids    | prompt ........................ | generated ....... |
                     | computed ............................... | to come  |
        block_table  | b0 | b1 | b2 | …  covers the computed tokens and those of the running step
    """

    id: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    max_len: int
    arrival_time: float
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token_id: int) -> None:
        """Take a sampled token, and note if it ends the sequence."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            self.finish_reason = "stop"
        elif self.num_output_tokens >= self.params.max_tokens or len(self.token_ids) >= self.max_len:
            self.finish_reason = "length"
