"""Responses that go on without their client."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from dispec.serving.api.responses.run import ResponseRun
from dispec.serving.api.responses.store import ResponseStore, StoredResponse


class BackgroundResponse:
    """A response under way in a task of its own. It is among the store's running ones, and is stored when it ends.

    events: of its stream so far, by number; None if they are not kept.
    """

    def __init__(self, run: ResponseRun, store: ResponseStore, keeps_events: bool) -> None:
        """Begin the work of a run that the engine has accepted."""
        self.run = run
        self.events: list[bytes] | None = [] if keeps_events else None
        self.has_ended = False
        self._store = store
        self._is_deleted = False
        self._news = asyncio.Event()
        store.running[run.response.id] = self
        self._task = asyncio.create_task(self._work())

    async def cancel(self) -> None:
        """End the work with the status cancelled, and wait until it has ended."""
        self.run.cancel()
        await asyncio.wait((self._task,))

    async def delete(self) -> None:
        """End the work, and keep nothing of it."""
        self._is_deleted = True
        await self.cancel()

    async def changed(self) -> None:
        """Wait for the next events, or the end."""
        await self._news.wait()

    async def _work(self) -> None:
        try:
            async for batch in self.run.batches():
                if self.events is not None:
                    self.events += batch
                self._tell()
        finally:
            self.run.abort()
            del self._store.running[self.run.response.id]
            if not self._is_deleted:
                self._store.add(StoredResponse.of(self.run.response, self.run.items, self.events))
            self.has_ended = True
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Follower:
    """Reads the events of a response that is or was in the background. It has no hold on the work."""

    def __init__(self, events: Sequence[bytes], running: BackgroundResponse | None, first: int = 0) -> None:
        """events: of the stream so far. first: the number of the first event to read."""
        self._events = events
        self._running = running
        self._next = first

    async def accepted(self) -> None:
        """Return at once: the engine has accepted the work."""

    def abort(self) -> None:
        """Do nothing: the work goes on."""

    def log_fields(self) -> dict[str, Any]:
        return {}

    async def read(self) -> AsyncIterator[bytes]:
        """Yield the events, also those to come, until the last."""
        while True:
            data = b"".join(self._events[self._next :])
            self._next = max(self._next, len(self._events))
            if data:
                yield data
            elif self._running is None or self._running.has_ended:
                return
            else:
                await self._running.changed()
