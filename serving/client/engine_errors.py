"""What can go wrong between a request and its answer. Each error is a sentence that a client may read."""


class EngineFailed(Exception):
    """An error in the engine ended this request and no other."""


class EngineDied(Exception):
    """The engine process could not start, or ended before the request did.

    error: the class of the engine's exception, if it could name one; message: what happened; hint: what to do;
    traceback: where it came from, if that is of use; is_bad_input: what the user gave is at fault, and the message says
    all there is to say.
    """

    def __init__(
        self, message: str, hint: str = "", error: str = "", traceback: str = "", *, is_bad_input: bool = False
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.error = error
        self.traceback = traceback
        self.is_bad_input = is_bad_input

    def __str__(self) -> str:
        sentence = f"{self.error}: {self.message}" if self.error else self.message
        return f"{sentence} (hint: {self.hint})" if self.hint else sentence


class RequestTimedOut(Exception):
    """The request took longer than it may."""


class RequestRefused(ValueError):
    """The request asks for what the engine cannot do. `field` is the one of its fields that does, if it is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class TryLater(Exception):
    """The request was not taken. retry_after: seconds after which it may be."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(TryLater):
    """The queue is full."""


class NotReady(TryLater):
    """The engine is loading, being restarted, draining or dead."""
