"""A transfer engine within one process: it copies blocks between KV caches at random times, and fails at random.

Blocks are read when they are copied, not when they are published, so that a block reused too early shows.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from dispec.engine.transfer.interface import Event, Pulled, PullFailed, Released, RemoteBlocks
from dispec.layers.types import KVCache


@dataclass
class _Published:
    blocks: list[int] = field(default_factory=list)
    payload: bytes | None = None
    problem: str | None = None
    is_released: bool = False


@dataclass
class _Pull:
    remote_blocks: RemoteBlocks
    skip: int
    blocks: list[int]
    is_cancelled: bool = False
    num_copied: int = 0


class Network:
    """The engines of a test. failure, delay: probability at each poll that a pull fails, or makes no progress."""

    def __init__(self, seed: int = 0, *, delay: float = 0.5, failure: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.delay = delay
        self.failure = failure
        self.engines: dict[str, FakeTransferEngine] = {}
        self.num_pulled = self.num_blocks = 0


class FakeTransferEngine:
    def __init__(self, network: Network, engine_id: str, kv_cache: KVCache) -> None:
        self.engine_id = engine_id
        self.address = ("127.0.0.1", 1)
        self._network = network
        self._kv_cache = kv_cache
        self._published: dict[str, _Published] = {}
        self._pulls: dict[str, _Pull] = {}
        self._withdrawn: dict[str, _Published] = {}
        self._events: list[Event] = []
        self._event_fd = os.eventfd(0)
        network.engines[engine_id] = self

    def publish(self, transfer_id: str, blocks: Sequence[int], *, payload: bytes | None = None) -> None:
        published = self._published.setdefault(transfer_id, _Published())
        assert published.payload is None, "something was published after the end"
        published.blocks += blocks
        published.payload = payload

    def withdraw(self, transfer_id: str, reason: str) -> None:
        published = self._published.setdefault(transfer_id, _Published())
        published.problem, published.is_released = reason, True
        self._withdrawn[transfer_id] = published

    def pull(self, remote_blocks: RemoteBlocks, skip: int, blocks: Sequence[int]) -> None:
        self._pulls[remote_blocks.transfer_id] = _Pull(remote_blocks, skip, list(blocks))

    def release(self, transfer_id: str) -> None:
        if transfer_id in self._pulls:
            self._pulls[transfer_id].is_cancelled = True
        for engine in self._network.engines.values():
            if transfer_id in engine._published:
                engine._published[transfer_id].is_released = True

    def poll(self) -> list[Event]:
        for pull in list(self._pulls.values()):
            self._advance(pull)
        for transfer_id, published in list(self._published.items()):
            if published.is_released and (published.payload is not None or published.problem is not None):
                del self._published[transfer_id]
                self._events.append(Released(transfer_id, False))
        events, self._events = self._events, []
        return events

    def fileno(self) -> int:
        return self._event_fd

    def close(self) -> None:
        os.close(self._event_fd)

    def _advance(self, pull: _Pull) -> None:
        network, transfer_id = self._network, pull.remote_blocks.transfer_id
        if network.random.random() < network.delay:
            return
        source = network.engines[pull.remote_blocks.engine_id]
        published = source._withdrawn.get(transfer_id) or source._published.get(transfer_id)
        problem = "cancelled" if pull.is_cancelled else published.problem if published is not None else None
        if problem is None and network.random.random() < network.failure:
            problem = "the link failed"
        if problem is not None:
            self._finish(PullFailed(transfer_id, problem))
            return
        if published is None:
            return
        ready = published.blocks[pull.skip + pull.num_copied :]
        for block in ready[: network.random.randint(1, 4)]:
            target = pull.blocks[pull.num_copied]
            for mine, theirs in zip(self._kv_cache, source._kv_cache, strict=True):
                mine[:, target].copy_(theirs[:, block])
            pull.num_copied += 1
            network.num_blocks += 1
        if published.payload is not None and pull.num_copied >= len(pull.blocks):
            network.num_pulled += 1
            self._finish(Pulled(transfer_id, published.payload))

    def _finish(self, event: Pulled | PullFailed) -> None:
        del self._pulls[event.transfer_id]
        self._events.append(event)
