"""Errors between a request and its answer. Each message is a sentence for the client."""

RETRY_SECONDS = 5  # that clients are told to wait where the time of recovery is unknown


class EngineFailed(Exception):
    """An error in the engine ended this request and no other."""


class EngineDied(Exception):
    """The engine process could not start, or ended before the request did.

    error: the class of the engine's exception, if known; message: what happened; hint: what to do; traceback: of the
    exception, if it helps; is_bad_input: an option or a file of the user is at fault, and the message says all.
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

    def copy(self) -> "EngineDied":
        """Return the same error for another request: Python's traceback of an exception grows with every raise."""
        return EngineDied(self.message, self.hint, self.error)


class RequestTimedOut(Exception):
    """The request exceeded its timeout."""


class InvalidRequest(ValueError):
    """The engine cannot do what the request asks for. `field` is the field at fault, if it is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class Unavailable(Exception):
    """The request was not accepted. retry_after: seconds after which it may be."""

    def __init__(self, message: str, retry_after: int = RETRY_SECONDS) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    """The queue is full, or a first token cannot come within its TTFT target."""


class NotReady(Unavailable):
    """The engine is loading, restarting, draining or dead."""
