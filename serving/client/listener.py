"""What metrics and pages hear of the engine."""

from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.engine_supervisor import State
from dispec.serving.client.request_stream import FirstToken, RequestSummary
from dispec.serving.client.slo import Slo


class Listener:
    """Called in the event loop, so it must be quick. Override what is of use; an exception is logged and forgotten."""

    def on_step(self, record: StepRecord, finished: float) -> None:
        """A step has ended, at `finished`."""

    def on_first_token(self, first: FirstToken) -> None:
        """A request has its first token."""

    def on_request_finished(self, summary: RequestSummary) -> None:
        """A request has ended, in whatever way."""

    def on_shed(self, slo: Slo) -> None:
        """A request of this class was turned away: its first token would have come too late."""

    def on_state(self, state: State) -> None:
        """The engine's state has changed."""
