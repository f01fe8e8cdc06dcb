"""The events of the dashboard: once a second, the changes for each open page."""

import asyncio
import os.path
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from dispec.engine.process.messages import Inspection
from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.engine_client import EngineClient, EngineObserver, State
from dispec.serving.client.errors import EngineDied, NotReady
from dispec.serving.dashboard.dashboard_state import DashboardState

INTERVAL = 1.0  # seconds


class KVCacheInspector(EngineObserver):
    """Counts of the KV cache's blocks, requested while a page is open and only after new events.

    An inspection verifies the block pool, which takes time in a large cache: at most one runs, and one starts at most
    every other second.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._last: Inspection | None = None
        self._last_request = float("-inf")
        self._is_stale = True
        self._task: asyncio.Task[None] | None = None
        client.observers.append(self)

    def on_step(self, record: StepRecord, finished: float) -> None:
        self._is_stale = True

    def on_state(self, state: State) -> None:
        self._is_stale, self._last = True, None

    def block_counts(self) -> dict[str, int] | None:
        """Return used, cached and free blocks of the last inspection, and their size; start the next one if due."""
        now = asyncio.get_running_loop().time()
        if self._task is None and self._is_stale and now - self._last_request >= 2 * INTERVAL:
            self._last_request, self._is_stale = now, False
            self._task = asyncio.create_task(self._inspect())
        info, counts = self._client.info, self._last
        if info is None or counts is None:
            return None
        used, total = counts.num_used_blocks, counts.num_blocks
        # Used blocks are cached too, all but the one that each sequence writes to.
        cached = min(max(counts.num_cached_blocks - max(used - counts.num_running, 0), 0), total - used)
        return {
            "used": used,
            "cached": cached,
            "free": total - used - cached,
            "total": total,
            "block_size": info.block_size,
        }

    async def _inspect(self) -> None:
        try:
            with suppress(NotReady, EngineDied):
                self._last = await self._client.inspect()
        finally:
            self._task = None


async def dashboard_events(
    client: EngineClient, state: DashboardState, inspector: KVCacheInspector
) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of one page, until a server that shuts down has no requests left."""
    for view in state.views():
        server, is_idle = _server_state(client), not client.load
        yield view | server | {"pool": inspector.block_counts()}
        if server["state"] == "draining" and is_idle:
            return
        await asyncio.sleep(INTERVAL)


def _server_state(client: EngineClient) -> dict[str, Any]:
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
            "weights_format": info.weights_format,
            "max_model_len": info.max_model_len,
        },
    }
