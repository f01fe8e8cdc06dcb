"""CPU time, memory and KV blocks of the server's process and its engines, read while a page is open."""

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import psutil

from dispec.engine.process.messages import Inspection
from dispec.serving.client.engine_client import EngineClient
from dispec.serving.client.errors import EngineDied, NotReady
from dispec.serving.dashboard.engine_list import NamedEngine, engines_of

MIN_SECONDS = 0.9  # between two readings: pages that are open at the same time share one


class EngineUsage:
    """The last readings of a client's engines. An idle engine is not woken: it is asked again after new steps.

    clock: in seconds.
    """

    def __init__(self, client: EngineClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._last_reading = float("-inf")
        self._rows: list[dict[str, Any]] = []
        self._processes: dict[int, psutil.Process] = {}
        self._inspections: dict[int, Inspection] = {}  # by process, as `_processes`
        self._num_steps = 0
        self._task: asyncio.Task[None] | None = None

    def rows(self, num_steps: int) -> list[dict[str, Any]]:
        """Return the server's process and each engine. num_steps: of all engines since the server's start.

        cpu: percent of one core since the last reading, None at the first. memory: resident bytes. gpu_used, gpu_total:
        bytes; used, cached, free, total: KV blocks; None until the engine has told them.
        """
        now = self._clock()
        if now - self._last_reading >= MIN_SECONDS:
            self._last_reading = now
            engines = [(one, one.client.info.pid if one.client.info else 0) for one in engines_of(self._client)]
            pids = {os.getpid(), *(pid for _, pid in engines)}
            self._processes = {pid: process for pid, process in self._processes.items() if pid in pids}
            self._inspections = {pid: counts for pid, counts in self._inspections.items() if pid in pids}
            if self._task is None and (num_steps > self._num_steps or not self._are_idle(pid for _, pid in engines)):
                self._num_steps = num_steps
                self._task = asyncio.create_task(self._inspect(engines))
            server = {"name": "server", "role": None, "state": None, "pid": os.getpid()} | self._process(os.getpid())
            self._rows = [server, *(self._engine(one, pid) for one, pid in engines)]
        return self._rows

    def _are_idle(self, pids: Iterable[int]) -> bool:
        """Return whether all engines have told that they have no requests."""
        return all(pid in self._inspections and not self._inspections[pid].num_requests for pid in pids)

    def _engine(self, engine: NamedEngine, pid: int) -> dict[str, Any]:
        client = engine.client
        row: dict[str, Any] = {
            "name": engine.name,
            "role": engine.role,
            "state": client.state,
            "pid": pid or None,
            "running": client.num_running,
            "waiting": client.num_waiting,
            "pool": None,
            "gpu_used": None,
            "gpu_total": None,
        }
        counts = self._inspections.get(pid)
        if counts is not None:
            used, total = counts.num_used_blocks, counts.num_blocks
            # Used blocks are cached too, all but the one that each sequence writes to.
            cached = min(max(counts.num_cached_blocks - max(used - counts.num_running, 0), 0), total - used)
            row["pool"] = {"used": used, "cached": cached, "free": total - used - cached, "total": total}
            if counts.device_memory_total:
                row |= {"gpu_used": counts.device_memory_used, "gpu_total": counts.device_memory_total}
        return row | self._process(pid)

    def _process(self, pid: int) -> dict[str, Any]:
        is_new = pid not in self._processes
        try:
            process = self._processes.setdefault(pid, psutil.Process(pid)) if pid else None
            if process is not None:
                cpu = process.cpu_percent()  # of a new one it is 0, and starts the interval
                return {"cpu": None if is_new else cpu, "memory": process.memory_info().rss}
        except psutil.Error:  # it has just ended
            self._processes.pop(pid, None)
        return {"cpu": None, "memory": None}

    async def _inspect(self, engines: list[tuple[NamedEngine, int]]) -> None:
        try:
            for engine, pid in engines:
                with suppress(NotReady, EngineDied):
                    self._inspections[pid] = await engine.client.inspect(verify=False)
        finally:
            self._task = None


def pool_of(rows: list[dict[str, Any]]) -> dict[str, int] | None:
    """Return the blocks of all engines together; None until each has told its own."""
    pools = [row["pool"] for row in rows if "pool" in row]
    if not pools or None in pools:
        return None
    return {name: sum(pool[name] for pool in pools) for name in ("used", "cached", "free", "total")}
