"""Counts and times of a step, for metrics, tests and the profiler."""

from typing import Literal, NamedTuple

Kind = Literal["decode", "prefill", "mixed"]


class StepRecord(NamedTuple):
    """One step. Times are in seconds; where steps overlap, `wait` begins after the next step was launched.

    kind: whether its sequences decode, compute prompts (prefill), or both (mixed).
    num_prompt_tokens: tokens of prompts, and tokens that are computed again after a preemption. Tokens that a grammar
        adds to a sampled one are decoded, not prompt tokens.
    num_cached_tokens: tokens of admitted sequences that were found in the cache.
    num_used_blocks: KV blocks in use when the step was scheduled.
    num_drafts: sequences with draft tokens, as in vLLM's metrics.
    num_draft_tokens: draft tokens that were verified.
    num_planned_draft_tokens: draft tokens that the controller planned, before blocks and the token budget limited them.
    num_accepted_per_position: accepted draft tokens, by their position in a draft.
    num_received_prompts, num_failed_receives: prompts for which another engine's keys and values came, or failed to
        come, since the previous step. num_received_blocks: blocks of the former.
    num_sent_prompts: prompts with their last blocks published for other engines in this step.
    num_sent_blocks: blocks that were published, those of unfinished prompts included.
    schedule, draft, launch, wait, commit: seconds of scheduling the step, proposing its draft tokens, launching it,
        waiting for its result and committing it.
    """

    kind: Kind
    num_sequences: int
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_preempted: int
    num_admitted: int
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_finished: int = 0
    started: float = 0.0
    schedule: float = 0.0
    draft: float = 0.0
    launch: float = 0.0
    wait: float = 0.0
    commit: float = 0.0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_planned_draft_tokens: int = 0
    num_accepted_per_position: tuple[int, ...] = ()
    num_received_prompts: int = 0
    num_failed_receives: int = 0
    num_received_blocks: int = 0
    num_sent_prompts: int = 0
    num_sent_blocks: int = 0

    @property
    def seconds(self) -> float:
        """Seconds that the engine spent on the step."""
        return self.schedule + self.draft + self.launch + self.wait + self.commit

    @property
    def num_decoded_tokens(self) -> int:
        """Number of output tokens without first tokens and rejected draft tokens."""
        return self.num_tokens - self.num_prompt_tokens - self.num_draft_tokens + sum(self.num_accepted_per_position)
