"""Reads of remote KV blocks by NIXL (https://github.com/ai-dynamo/nixl), over what UCX finds between two machines.

Each process registers its keys and values. A puller's READ goes straight into its own cache.
"""

import importlib
import importlib.util
import logging
import threading
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from jaxtyping import UInt64

from dispec.engine.transfer.handshake import Hello
from dispec.engine.transfer.interface import TransferOptions
from dispec.engine.transfer.kv_blocks import CopyBlocks, KVBlocks

POLL_SECONDS = 50e-6
RELEASE_AGAIN_SECONDS = 0.1


class _Exported(msgspec.Struct):
    """agent: NIXL's description of it. addresses: of the keys and of the values in the source. device: their GPU."""

    agent: bytes
    addresses: tuple[int, int]
    device: int


def find_library() -> str | None:
    """Return the name of an installed NIXL package, the one for torch's CUDA first; None without any."""
    major = (torch.version.cuda or "12").split(".")[0]
    names = sorted(("nixl_cu12", "nixl_cu13"), key=lambda name: not name.endswith(major))
    return next((name for name in names if importlib.util.find_spec(name) is not None), None)


class NixlTransport:
    """This process's NIXL agent. Its calls are serialised: the agent is not safe for several threads."""

    def __init__(self, options: TransferOptions, blocks: KVBlocks) -> None:
        """Register the cache. Raises ImportError if NIXL is not installed, or NIXL's error."""
        name = find_library()
        if name is None:
            raise ImportError("NIXL is not installed: pip install 'dispec[nixl]'")
        nixl = importlib.import_module(name)
        logging.getLogger(name).setLevel(logging.WARNING)
        self._blocks = blocks
        self._memory, self._device = ("DRAM", 0) if blocks.device == "cpu" else ("VRAM", blocks.device_index)
        self._timeout = options.stall_seconds
        self._lock = threading.Lock()
        config = nixl.nixl_agent_config(
            enable_prog_thread=True, sync_mode=nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        self._agent = nixl.nixl_agent(options.engine_id, config)
        num_bytes = blocks.num_layers * blocks.num_blocks * blocks.layer_bytes
        regions = [(address, num_bytes, self._device, "") for address in blocks.addresses]
        self._registered = self._agent.register_memory(regions, self._memory)
        self._layers = _layer_addresses(blocks.addresses, blocks.num_layers, blocks.num_blocks, blocks.layer_bytes)

    def export(self) -> bytes:
        """Return what a puller needs."""
        with self._lock:
            return msgspec.msgpack.encode(
                _Exported(self._agent.get_agent_metadata(), self._blocks.addresses, self._device)
            )

    def open(self, metadata: bytes, peer: Hello) -> CopyBlocks:
        """Return a copy from a peer's blocks into own ones. Raises ValueError, or NIXL's error, for bad metadata."""
        exported = msgspec.msgpack.decode(metadata, type=_Exported)
        with self._lock:
            name = self._agent.add_remote_agent(exported.agent)
        remote = name.decode() if isinstance(name, bytes) else name
        layers = _layer_addresses(exported.addresses, peer.num_layers, peer.num_blocks, peer.layer_bytes)

        def copy(source_blocks: Sequence[int], own_blocks: Sequence[int]) -> list[bytes]:
            source = _descriptors(layers, peer.layer_bytes, source_blocks, exported.device)
            target = _descriptors(self._layers, peer.layer_bytes, own_blocks, self._device)
            self._blocks.wait_until_writable()
            self._read(remote, source, target)
            return self._blocks.checksums(own_blocks)

        return copy

    def _read(self, remote: str, source: UInt64[np.ndarray, "n 3"], target: UInt64[np.ndarray, "n 3"]) -> None:
        """Read regions of a peer. Raises ConnectionError if that fails.

        After a timeout it still waits for the end where NIXL cannot cancel: by then nothing may write to the blocks.
        """
        with self._lock:
            target_list, source_list = (self._agent.get_xfer_descs(rows, self._memory) for rows in (target, source))
            handle = self._agent.initialize_xfer("READ", target_list, source_list, remote)
            state = self._agent.transfer(handle)
        deadline = time.monotonic() + self._timeout
        while state == "PROC" and time.monotonic() <= deadline:
            time.sleep(POLL_SECONDS)
            with self._lock:
                state = self._agent.check_xfer_state(handle)
        while True:
            try:
                with self._lock:
                    self._agent.release_xfer_handle(handle)
                break
            except Exception:  # still under way
                time.sleep(RELEASE_AGAIN_SECONDS)
        if state != "DONE":
            raise ConnectionError("the read timed out" if state == "PROC" else f"the read failed: {state}")


def _layer_addresses(
    starts: Sequence[int], num_layers: int, num_blocks: int, layer_bytes: int
) -> UInt64[np.ndarray, " layers"]:
    """Return where each layer's keys, then each layer's values begin."""
    stride = np.arange(num_layers, dtype=np.uint64) * np.uint64(num_blocks * layer_bytes)
    return (np.asarray(starts, dtype=np.uint64)[:, None] + stride).reshape(-1)


def _descriptors(
    layers: UInt64[np.ndarray, " layers"], layer_bytes: int, blocks: Sequence[int], device: int
) -> UInt64[np.ndarray, "n 3"]:
    """Return (address, bytes, device) of each block in each layer."""
    starts = layers[:, None] + np.uint64(layer_bytes) * np.asarray(blocks, dtype=np.uint64)
    rows = np.zeros((starts.size, 3), dtype=np.uint64)
    rows[:, 0] = starts.reshape(-1)
    rows[:, 1] = layer_bytes
    rows[:, 2] = device
    return rows
