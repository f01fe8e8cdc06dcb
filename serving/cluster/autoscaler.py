"""Starts and drains the engines of a pool as `serving.cluster.autoscaling` decides from the pool's observations."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine

from dispec.serving.client.errors import EngineDied, NotReady
from dispec.serving.cluster.autoscaling import Observation, Scaling, ScalingLimits, scale
from dispec.serving.cluster.worker import ROLES, Role, Worker
from dispec.serving.cluster.worker_pool import WorkerPool

log = logging.getLogger("dispec")

_PERIOD = 1.0  # seconds between observations


class Autoscaler:
    """Scales one pool, in the pool's event loop. limits: of the engines of each role."""

    def __init__(self, pool: WorkerPool, limits: ScalingLimits) -> None:
        self._pool = pool
        self._limits = limits
        self._scaling = {role: Scaling(pool.num_desired(role)) for role in ROLES}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Observe and scale until the task is cancelled."""
        try:
            while True:
                await asyncio.sleep(_PERIOD)
                for role in ROLES:
                    self.act(role, self._pool.observe(role), time.monotonic())
        finally:
            for task in self._tasks:
                task.cancel()

    def act(self, role: Role, seen: Observation, now: float) -> None:
        """Start or drain engines as an observation requires."""
        before = self._scaling[role]
        after = self._scaling[role] = scale(before, seen, self._limits, now)
        if after.desired == before.desired:
            return
        log.info("%s engines: %d wanted, there were %d (%s)", role, after.desired, before.desired, seen)
        workers = [worker for worker in self._pool.workers if worker.role == role and not worker.is_leaving]
        for _ in range(after.desired - len(workers)):
            self._begin(self._start(self._pool.add_worker(role)))
        for worker in sorted(workers, key=lambda worker: worker.client.load)[: len(workers) - after.desired]:
            worker.is_leaving = True
            self._begin(self._drain(worker))

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self, worker: Worker) -> None:
        try:
            await worker.client.start()
            log.info("%s engine %d serves", worker.role, worker.number)
        except EngineDied as error:
            log.error("%s engine %d could not be started: %s", worker.role, worker.number, error)
            await self._pool.remove_worker(worker)

    async def _drain(self, worker: Worker) -> None:
        """Remove an engine when its requests have ended and other engines have read the blocks that it published."""
        with contextlib.suppress(EngineDied, NotReady):
            while worker.client.load or (await worker.client.inspect()).num_used_blocks:
                await asyncio.sleep(0.05)
        await self._pool.remove_worker(worker)
        log.info("%s engine %d has left", worker.role, worker.number)
