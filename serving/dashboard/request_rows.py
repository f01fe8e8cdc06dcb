"""The dashboard's table of requests: the unfinished ones, and the last that ended."""

from collections import deque
from collections.abc import Callable, Collection
from itertools import islice
from typing import Any

from dispec.serving.client.request_stream import RequestStream

MOST_ROWS = 50  # of unfinished requests, and of those that ended


def phase(stream: RequestStream) -> str:
    """Return waiting, prefill, decode, finished or error."""
    if stream.has_ended:
        return "error" if stream.error is not None or "error" in stream.finish_reasons else "finished"
    if stream.timing.first_token is not None:
        return "decode"
    return "prefill" if stream.has_started else "waiting"


def _row(stream: RequestStream, epoch: float, worker: str | None) -> dict[str, Any]:
    """Return a request as the page gets it: times in seconds, `arrival` as Unix time. epoch: of the request's clock."""
    timing = stream.timing
    return {
        "key": stream.key,
        "id": stream.request.request_id,
        "state": phase(stream),
        "worker": worker,
        "arrival": epoch + timing.arrival,
        "prompt": stream.num_prompt_tokens,
        "cached": stream.num_cached_tokens,
        "output": stream.num_output_tokens,
        "queue": timing.queue,
        "prefill": timing.prefill,
        "decode": timing.decode,
        "reason": " ".join(dict.fromkeys(reason for reason in stream.finish_reasons if reason)),
        "error": None if stream.error is None else str(stream.error),
    }


class RequestRows:
    """Rows of requests, at most MOST_ROWS of each kind. num_ended: requests that have ended since the start."""

    def __init__(self, epoch: float, worker_of: Callable[[RequestStream], str | None]) -> None:
        self.num_ended = 0
        self.num_errors = 0
        self._epoch = epoch
        self._worker_of = worker_of
        self._ended: deque[tuple[int, dict[str, Any]]] = deque(maxlen=MOST_ROWS)

    def add_ended(self, stream: RequestStream) -> bool:
        """Add a request that has ended; return whether it did with an error."""
        self.num_ended += 1
        row = self._of(stream)
        is_error = row["state"] == "error"
        self.num_errors += is_error
        self._ended.append((self.num_ended, row))
        return is_error

    def ended_after(self, number: int) -> list[dict[str, Any]]:
        """Return the kept rows of requests that ended after the first `number` did, the newest last."""
        return [row for ended, row in self._ended if ended > number]

    def unfinished(self, streams: Collection[RequestStream]) -> list[dict[str, Any]]:
        """Return the rows of the running requests and then of the waiting ones, each in the order of arrival."""
        chosen = list(islice((stream for stream in streams if stream.has_started), MOST_ROWS))
        chosen += islice((stream for stream in streams if not stream.has_started), MOST_ROWS - len(chosen))
        return [self._of(stream) for stream in chosen]

    def _of(self, stream: RequestStream) -> dict[str, Any]:
        return _row(stream, self._epoch, self._worker_of(stream))
