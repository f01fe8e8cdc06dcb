"""Reads of remote pages by NIXL (https://github.com/ai-dynamo/nixl), over whatever UCX finds between two machines.

Keys and values are registered, or the one memory that holds both; the puller's READ goes straight into its own pages.
"""

import logging
import threading
import time
from collections.abc import Sequence

import msgspec
import nixl_cu12
import numpy as np

from dispec.engine.transfer.handshake import Hello
from dispec.engine.transfer.interface import TransferOptions
from dispec.engine.transfer.pages import HostPages
from dispec.engine.transfer.shared_memory import SharedMemory

POLL_SECONDS = 50e-6


class _Exported(msgspec.Struct):
    """agent: NIXL's own description; addresses: of the keys and of the values, in the source."""

    agent: bytes
    addresses: list[int]


_decode = msgspec.msgpack.Decoder(_Exported).decode


class NixlMemory:
    """This process's agent. Its calls come one at a time."""

    def __init__(self, options: TransferOptions, pages: HostPages, shared: SharedMemory | None) -> None:
        logging.getLogger("nixl_cu12").setLevel(logging.WARNING)
        self._pages = pages
        self._timeout = options.stall_seconds
        self._lock = threading.Lock()
        config = nixl_cu12.nixl_agent_config(
            enable_prog_thread=True, sync_mode=nixl_cu12.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        self._agent = nixl_cu12.nixl_agent(options.engine_id, config)
        if shared is not None:
            regions = [(shared.tensor.data_ptr(), shared.tensor.numel(), 0, "")]
        else:
            regions = [(half.ctypes.data, half.nbytes, 0, "") for half in pages.halves]
        self._registered = self._agent.register_memory(regions, "DRAM")
        self._addresses = [half.ctypes.data for half in pages.halves]

    def export(self) -> bytes:
        """What a puller needs."""
        with self._lock:
            return msgspec.msgpack.encode(_Exported(self._agent.get_agent_metadata(), self._addresses))

    def open(self, metadata: bytes, peer: Hello) -> "_Remote":
        """Raises ValueError or what NIXL raises for metadata that is of no use."""
        exported = _decode(metadata)
        with self._lock:
            name = self._agent.add_remote_agent(exported.agent)
        layers = _layer_addresses(exported.addresses, (peer.num_layers, peer.num_blocks, peer.layer_bytes))
        return _Remote(self, name.decode() if isinstance(name, bytes) else name, layers)

    def read(self, remote: str, layers: np.ndarray, theirs: Sequence[int], own: Sequence[int]) -> None:
        """Blocks of a peer, whose keys and values of each layer are at `layers`, into own ones. Raises ConnectionError
        if that fails.

        After a timeout it waits for the end nevertheless where NIXL cannot cancel: nothing may write into pages that
        are somebody else's by then.
        """
        size = self._pages.layer_bytes
        own_layers = _layer_addresses(self._addresses, self._pages.halves[0].shape)
        with self._lock:
            source = self._agent.get_xfer_descs(_rows(layers, size, theirs), "DRAM")
            target = self._agent.get_xfer_descs(_rows(own_layers, size, own), "DRAM")
            handle = self._agent.initialize_xfer("READ", target, source, remote)
            state = self._agent.transfer(handle)
        deadline = time.monotonic() + self._timeout
        while state == "PROC":
            if time.monotonic() > deadline:
                state = "timed out"
                break
            time.sleep(POLL_SECONDS)
            with self._lock:
                state = self._agent.check_xfer_state(handle)
        while True:
            try:
                with self._lock:
                    self._agent.release_xfer_handle(handle)
                break
            except Exception:  # still under way
                time.sleep(0.1)
        if state != "DONE":
            raise ConnectionError(f"the read failed: {state}")


class _Remote:
    """A source's pages."""

    def __init__(self, memory: NixlMemory, name: str, layers: np.ndarray) -> None:
        self._memory, self._name, self._layers = memory, name, layers

    def __call__(self, source_blocks: Sequence[int], own_blocks: Sequence[int]) -> None:
        self._memory.read(self._name, self._layers, source_blocks, own_blocks)


def _layer_addresses(starts: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Where each layer's keys, then each layer's values begin. shape: of either, layers, blocks and bytes."""
    num_layers, num_blocks, size = shape
    stride = np.arange(num_layers, dtype=np.uint64) * np.uint64(num_blocks * size)
    return (np.asarray(starts, dtype=np.uint64)[:, None] + stride).reshape(-1)


def _rows(layers: np.ndarray, size: int, blocks: Sequence[int]) -> np.ndarray:
    """(address, bytes, device) of each block in each of `layers`, `size` bytes each."""
    starts = layers[:, None] + np.uint64(size) * np.asarray(blocks, dtype=np.uint64)
    rows = np.zeros((starts.size, 3), dtype=np.uint64)
    rows[:, 0] = starts.reshape(-1)
    rows[:, 1] = size
    return rows
