"""Ways to read a source's KV cache: which ones this process offers, and how a puller opens them.

"tcp" needs nothing opened: the source sends. "shm" maps the source's memory, "cuda_ipc" that of a GPU of this host,
"nixl" reads remote memory through that library.
"""

from collections.abc import Sequence

from dispec.engine.transfer.connection import Connection
from dispec.engine.transfer.device_blocks import DeviceBlocks
from dispec.engine.transfer.handshake import Hello
from dispec.engine.transfer.interface import TRANSPORTS, TransferOptions, Transport
from dispec.engine.transfer.kv_blocks import CopyBlocks, HostBlocks, KVBlocks
from dispec.engine.transfer.messages import MemoryHandle, OpenMemory, decode_from_source
from dispec.engine.transfer.nixl_transport import NixlTransport, find_library
from dispec.engine.transfer.shared_memory import SharedMemory, map_read_only
from dispec.layers.types import KVCache


class Transports:
    """This process's blocks and the transports that can carry them. Raises ValueError if none of those allowed can."""

    def __init__(self, options: TransferOptions, kv_cache: KVCache, shared: SharedMemory | None) -> None:
        self._options = options
        self._nixl: NixlTransport | None = None
        self.blocks = blocks_of(kv_cache, shared)
        on_cpu = self.blocks.device == "cpu"
        possible: dict[Transport, bool] = {
            "shm": shared is not None and on_cpu,
            "cuda_ipc": not on_cpu,
            "nixl": find_library() is not None,
            "tcp": True,
        }
        self.names: list[Transport] = [name for name in options.transports if possible[name]]
        if not self.names:
            raise ValueError(f"kv_transfer allows {', '.join(options.transports)}: none can be used here")

    def export(self, message: OpenMemory) -> MemoryHandle:
        """Answer a puller that asks to read this cache."""
        try:
            if message.transport not in self.names:
                raise ValueError(f"{message.transport} is not offered here")
            if message.transport == "nixl":
                return MemoryHandle(self._nixl_transport().export())
            if isinstance(self.blocks, DeviceBlocks) and message.transport == "cuda_ipc":
                return MemoryHandle(self.blocks.export())
            raise ValueError(f"{message.transport} has no handle")
        except Exception as error:  # of a library too: the puller takes its next transport
            return MemoryHandle(problem=f"{type(error).__name__}: {error}"[:2000])

    def open(self, transport: Transport, peer: Hello, connection: Connection) -> CopyBlocks:
        """Open a peer's cache over the connection to it. Raises OSError, ValueError or a library's error."""
        if transport == "shm":
            return self._map(peer)
        connection.send(OpenMemory(transport))
        handle = connection.receive(decode_from_source)
        if not isinstance(handle, MemoryHandle):
            raise ConnectionError(f"{type(handle).__name__} came instead of a memory handle")
        if handle.problem is not None:
            raise ConnectionError(f"the source cannot export its memory: {handle.problem}")
        if isinstance(self.blocks, DeviceBlocks) and transport == "cuda_ipc":
            return self.blocks.open(handle.metadata, peer)
        return self._nixl_transport().open(handle.metadata, peer)

    def _nixl_transport(self) -> NixlTransport:
        """Made at the first use: it starts threads."""
        if self._nixl is None:
            self._nixl = NixlTransport(self._options, self.blocks)
        return self._nixl

    def _map(self, peer: Hello) -> CopyBlocks:
        own_cache = self.blocks
        assert peer.shared_memory is not None
        assert isinstance(own_cache, HostBlocks)
        region = map_read_only(peer.shared_memory)
        cache = HostBlocks.of_region(region, peer.num_layers, peer.num_blocks, peer.layer_bytes)

        def copy(source_blocks: Sequence[int], own_blocks: Sequence[int]) -> list[bytes]:
            checksums = []
            for source_block, own_block in zip(source_blocks, own_blocks, strict=True):
                own_cache.copy_block(cache, source_block, own_block)
                checksums += own_cache.checksums([own_block])  # which finds the block in the CPU's cache
            return checksums

        return copy


def blocks_of(kv_cache: KVCache, shared: SharedMemory | None) -> KVBlocks:
    """Wrap a KV cache. Raises ValueError if it does not fit; shared: as in `HostBlocks.of_cache`."""
    on_cpu = kv_cache.keys.device.type == "cpu"
    return HostBlocks.of_cache(kv_cache, shared) if on_cpu else DeviceBlocks(kv_cache)


def usable_transports(own: Hello, peer: Hello) -> list[Transport]:
    """Return the transports that both sides have, in the puller's order; "shm" and "cuda_ipc" on the same host only."""
    same_host = bool(own.host_id) and (own.host_id, own.user_id) == (peer.host_id, peer.user_id)
    possible: dict[Transport, bool] = {
        "shm": same_host and peer.shared_memory is not None,
        "cuda_ipc": same_host and own.device == peer.device != "cpu",
        "nixl": own.device == peer.device,
        "tcp": True,
    }
    shared = (name for name in TRANSPORTS if possible[name] and name in own.transports and name in peer.transports)
    return sorted(shared, key=own.transports.index)
