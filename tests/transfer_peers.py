"""Engines that transfer, without the engines: pages full of noise, and what their transfers say."""

import math
import select
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from dispec.engine.transfer import Event, Pulled, PullFailed, Released, TransferOptions, shared_memory
from dispec.engine.transfer.transfers import Transfers
from dispec.layers.types import KVCache

NUM_LAYERS, NUM_HEADS, HEAD_DIM, BLOCK_SIZE = 3, 2, 16, 8
FINGERPRINT = "a model"
SECRET = b"known to all peers of the tests"
PATIENCE = 30.0  # seconds, after which a test says that nothing comes


class Peer:
    """A process's transfers and pages, [blocks] of them."""

    def __init__(
        self,
        name: str,
        num_blocks: int = 40,
        *,
        transports: Sequence[str] | str = "auto",
        is_shared: bool = True,
        fingerprint: str = FINGERPRINT,
        num_layers: int = NUM_LAYERS,
        device: str = "cpu",
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        **options: object,
    ) -> None:
        chosen = {"secret": SECRET, **options}
        self.transfers = Transfers(TransferOptions(name, transports=transports, **chosen), clock)
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
        self.transfers.register(self.kv_cache, fingerprint, self.shared)
        self._heard: list[Event] = []

    def block(self, number: int) -> torch.Tensor:
        """All bytes of a block, gathered by torch's own indexing."""
        return torch.cat([half[:, number].flatten() for half in self.kv_cache]).view(torch.uint8).cpu()

    def next_event(self) -> Event:
        """The next event, waited for as an engine would: by the descriptor."""
        while not self._heard:
            assert select.select([self.transfers.fileno()], [], [], PATIENCE)[0], "no event came"
            self._heard += self.transfers.poll()
        return self._heard.pop(0)

    def events(self, count: int) -> dict[str, Event]:
        found = [self.next_event() for _ in range(count)]
        by_id = {event.transfer_id: event for event in found}
        assert len(by_id) == count, found
        return by_id

    def transport_used(self) -> str | None:
        return next(iter(self.transfers._links.values())).transport


@contextmanager
def peers(*made: Peer) -> Iterator[tuple[Peer, ...]]:
    try:
        yield made
    finally:
        for peer in made:
            peer.transfers.close()


__all__ = ["Peer", "PullFailed", "Pulled", "Released", "peers"]
