"""The stream of events behind the dashboard: once a second what is new, to each page that is open."""

import asyncio
import os.path
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from dispec.engine.process.messages import Inspection
from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.engine_client import EngineClient, Listener, State
from dispec.serving.client.engine_errors import EngineDied, NotReady
from dispec.serving.cluster.worker_pool import WorkerPool
from dispec.serving.dashboard.dashboard_state import DashboardState

INTERVAL = 1.0  # seconds


class PoolWatch(Listener):
    """The books of the KV cache, asked for while somebody looks and only if something has happened since.

    Asking proves the books, which is not free in a large cache: so at most every other second, and not again before
    the answer is there.
    """

    def __init__(self, client: EngineClient | WorkerPool) -> None:
        self._client = client
        self._last: Inspection | None = None
        self._asked = float("-inf")
        self._is_stale = True
        self._asking: asyncio.Task[None] | None = None
        client.listeners.append(self)

    def on_step(self, record: StepRecord, finished: float) -> None:
        self._is_stale = True

    def on_state(self, state: State) -> None:
        self._is_stale, self._last = True, None

    def look(self) -> dict[str, int] | None:
        """Blocks used, cached and free, as last heard of, and their size; asks anew for the next look."""
        now = asyncio.get_running_loop().time()
        if self._asking is None and self._is_stale and now - self._asked >= 2 * INTERVAL:
            self._asked, self._is_stale = now, False
            self._asking = asyncio.create_task(self._ask())
        info, books = self._client.info, self._last
        if info is None or books is None:
            return None
        used, total = books.num_used_blocks, books.num_blocks
        # Blocks in use have names as well, all but the one that each sequence is writing to.
        cached = min(max(books.num_cached_blocks - max(used - books.num_running, 0), 0), total - used)
        return {
            "used": used,
            "cached": cached,
            "free": total - used - cached,
            "total": total,
            "block_size": info.block_size,
        }

    async def _ask(self) -> None:
        try:
            with suppress(NotReady, EngineDied):
                self._last = await self._client.inspect()
        finally:
            self._asking = None


async def dashboard_events(
    client: EngineClient | WorkerPool, live: DashboardState, pool: PoolWatch
) -> AsyncIterator[dict[str, Any]]:
    """What a page is told. It ends with the work of a server that shuts down, so as not to keep it."""
    for view in live.views():
        state, is_idle = _state(client), not client.load
        yield view | state | {"pool": pool.look()}
        if state["state"] == "draining" and is_idle:
            return
        await asyncio.sleep(INTERVAL)


def _state(client: EngineClient | WorkerPool) -> dict[str, Any]:
    is_ready, reason = client.is_ready()
    info = client.info
    return {
        "state": "stalled" if client.state == "ready" and not is_ready else client.state,
        "reason": "" if is_ready else reason,
        "running": client.num_running,
        "waiting": client.num_waiting,
        "info": None
        if info is None
        else {
            "model": os.path.basename(info.model) if os.path.isabs(info.model) else info.model,
            "device": info.device,
            "dtype": info.dtype,
            "max_model_len": info.max_model_len,
        },
    }
