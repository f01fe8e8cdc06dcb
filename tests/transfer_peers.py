"""Transfer engines over KV caches of noise, and the events that they give."""

import math
import select
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dispec.engine.transfer import shared_memory
from dispec.engine.transfer.interface import TRANSPORTS, Event, TransferOptions
from dispec.engine.transfer.transfer_engine import TransferEngine
from dispec.layers.types import KVCache

NUM_LAYERS, NUM_HEADS, HEAD_DIM, BLOCK_SIZE = 3, 2, 16, 8
FINGERPRINT = "a model"
SECRET = "known to all peers of the tests"
PATIENCE = 30.0  # seconds after which a test fails because no event came


class Peer:
    """A transfer engine and its KV cache of `num_blocks` blocks."""

    def __init__(
        self,
        name: str,
        num_blocks: int = 40,
        *,
        transports: Sequence[str] = TRANSPORTS,
        is_shared: bool = True,
        fingerprint: str = FINGERPRINT,
        num_layers: int = NUM_LAYERS,
        device: str = "cpu",
        seed: int = 0,
        **options: object,
    ) -> None:
        chosen = {"secret": SECRET, **options}
        self.engine = TransferEngine(TransferOptions(name, transports=tuple(transports), **chosen))
        keys = (num_layers, num_blocks, NUM_HEADS, HEAD_DIM, BLOCK_SIZE)
        values = (num_layers, num_blocks, NUM_HEADS, BLOCK_SIZE, HEAD_DIM)
        size = 2 * torch.bfloat16.itemsize * math.prod(keys)
        self.shared = shared_memory.allocate(size) if is_shared and device == "cpu" else None
        memory = self.shared.tensor if self.shared else torch.zeros(size, dtype=torch.uint8, device=device)
        noise = torch.Generator().manual_seed(seed)  # the same on every device
        memory.copy_(torch.randint(0, 256, memory.shape, dtype=torch.uint8, generator=noise))
        self.memory = memory
        halves = memory.view(torch.bfloat16).chunk(2)
        self.kv_cache = KVCache(halves[0].view(keys), halves[1].view(values))
        self.engine.register(self.kv_cache, fingerprint, self.shared)
        self._events: list[Event] = []

    def block(self, number: int) -> torch.Tensor:
        """Return all bytes of a block, gathered by torch's own indexing."""
        return torch.cat([half[:, number].flatten() for half in self.kv_cache]).view(torch.uint8).cpu()

    def next_event(self) -> Event:
        """Wait for the next event by the descriptor, as an engine does."""
        while not self._events:
            assert select.select([self.engine.fileno()], [], [], PATIENCE)[0], "no event came"
            self._events += self.engine.poll()
        return self._events.pop(0)

    def events(self, count: int) -> dict[str, Event]:
        found = [self.next_event() for _ in range(count)]
        by_id = {event.transfer_id: event for event in found}
        assert len(by_id) == count, found
        return by_id

    def transport_used(self) -> str | None:
        return next(iter(self.engine._clients.values())).transport


@contextmanager
def peers(*made: Peer) -> Iterator[tuple[Peer, ...]]:
    try:
        yield made
    finally:
        for peer in made:
            peer.engine.close()
