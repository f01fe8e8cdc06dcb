"""Counts and times of a step, for metrics, tests and the profiler."""

from typing import Literal, NamedTuple

Kind = Literal["decode", "prefill", "mixed"]


class StepRecord(NamedTuple):
    """One step. Times are in seconds; where steps overlap, `wait` is what remained after the next one was launched.

    kind: whether its sequences were decoding, computing prompts, or some of each.
    num_prompt_tokens: of its tokens, those of prompts (or of what is computed again after a preemption).
    num_cached_tokens: found in the cache by the sequences that it admitted, and so not computed.
    num_used_blocks: of the KV cache, held by sequences when the step was scheduled.
    num_drafts: sequences with draft tokens; num_draft_tokens: draft tokens that were verified; num_wanted_drafts: draft
        tokens that the controller planned, before memory and the step's token budget cut them; num_stood: accepted
        draft tokens by their position in a draft.
    draft: seconds of proposing draft tokens.
    num_arrived: prompts whose keys and values came from another engine since the step before it; num_failed_arrivals:
        those that should have. num_arrived_blocks: what came for them.
    num_offered: prompts whose last blocks were published for other engines in this step; num_offered_blocks: blocks
        that were published, of these and of prompts that are not yet done.
    schedule, launch, wait, commit: seconds of choosing the work, launching it, awaiting its result and committing it.
    """

    kind: Kind
    num_sequences: int
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_preempted: int
    num_admitted: int
    num_finished: int
    num_running: int
    num_waiting: int
    num_used_blocks: int
    started: float
    schedule: float
    launch: float
    wait: float
    commit: float
    draft: float = 0.0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_wanted_drafts: int = 0
    num_stood: tuple[int, ...] = ()
    num_arrived: int = 0
    num_failed_arrivals: int = 0
    num_arrived_blocks: int = 0
    num_offered: int = 0
    num_offered_blocks: int = 0

    @property
    def seconds(self) -> float:
        """Seconds that the engine spent on the step."""
        return self.schedule + self.draft + self.launch + self.wait + self.commit

    @property
    def num_decoded_tokens(self) -> int:
        """Output tokens that it added, except first tokens; rejected draft tokens do not count."""
        return self.num_tokens - self.num_prompt_tokens - self.num_draft_tokens + sum(self.num_stood)
