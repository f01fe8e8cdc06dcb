"""The interface of proposers, which supply draft tokens."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from dispec.engine.execution.pending_step import DeviceDrafts
from dispec.engine.execution.sampler import SamplerFunctions
from dispec.engine.scheduling.scheduler_output import SchedulerOutput
from dispec.engine.scheduling.sequence import Sequence


class Proposal(NamedTuple):
    """The cost of a proposal, and its draft tokens on the device.

    num_draft_steps: steps of the draft model, one for each draft token of a sequence; 0 without a draft model.
    device_drafts: draft tokens that the device has yet to compute.
    num_catch_up_tokens, catch_up_seconds: tokens that the draft model computed before its draft tokens.
    """

    num_draft_steps: int = 0
    device_drafts: DeviceDrafts | None = None
    num_catch_up_tokens: int = 0
    catch_up_seconds: float = 0.0


@runtime_checkable
class Proposer(Protocol):
    """Proposes draft tokens for sequences whose blocks are allocated up to their last draft token."""

    def prepare(self, sequence: Sequence, max_drafts: int) -> int:
        """Return the number of draft tokens that the sequence can have in the next step, at most `max_drafts`."""
        ...

    def num_missing_tokens(self, sequence: Sequence) -> int:
        """Return the number of tokens to compute before the sequence can have draft tokens."""
        ...

    def propose(self, step: SchedulerOutput) -> Proposal:
        """Fill `draft.token_ids` of the step's sequences that have draft tokens."""
        ...

    def compile_pieces(self, sampler: SamplerFunctions) -> Iterator[None]:
        """Compile one function at each `next`. sampler: the target's compiled functions."""
        ...
