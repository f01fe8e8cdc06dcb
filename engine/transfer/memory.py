"""Pages that a puller reads by itself: what their source says of them, and how the puller opens them.

Over plain connections nothing is opened; "shm" maps the source's memory, "cuda_ipc" opens its allocations on the same
device, "nixl" has an existing library read remote memory.
"""

import importlib.util
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dispec.engine.transfer import host, shared_memory
from dispec.engine.transfer.handshake import Hello, Refused, greet
from dispec.engine.transfer.interface import TransferOptions, Transport
from dispec.engine.transfer.messages import Memory, OpenMemory
from dispec.engine.transfer.pages import HostPages
from dispec.engine.transfer.shared_memory import SharedMemory
from dispec.engine.transfer.wire import Connection
from dispec.layers.types import KVCache

if TYPE_CHECKING:
    from dispec.engine.transfer.device_pages import DevicePages
    from dispec.engine.transfer.nixl_memory import NixlMemory

CopyBlocks = Callable[[Sequence[int], Sequence[int]], None]  # the source's blocks into own ones
Exchange = Callable[[OpenMemory], Memory]  # over the connection that is there already


class Memories:
    """This process's pages, for itself and for its peers."""

    def __init__(self, options: TransferOptions, pages: "HostPages | DevicePages", shared: SharedMemory | None) -> None:
        self.pages = pages
        self._shared = shared
        self._options = options
        self._nixl: NixlMemory | None = None
        on_cpu = pages.device == "cpu"
        possible: dict[Transport, bool] = {
            "shm": shared is not None and on_cpu,
            "cuda_ipc": not on_cpu,
            "nixl": on_cpu and importlib.util.find_spec("nixl_cu12") is not None,
            "tcp": True,
        }
        self.transports: list[Transport] = [name for name in options.allowed if possible[name]]

    @property
    def fd(self) -> int:
        if self._shared is None:
            raise ConnectionError("there is no shared memory here")
        return self._shared.fd

    def export(self, message: OpenMemory) -> Memory:
        """The source's answer to a puller that wants to read by itself."""
        try:
            if message.transport == "nixl" and "nixl" in self.transports:
                return Memory(self._agent().export())
            if message.transport == "cuda_ipc" and "cuda_ipc" in self.transports:
                pages: Any = self.pages
                return Memory(pages.export())
        except Exception as error:  # of a library: the puller takes the next transport
            return Memory(b"", f"{type(error).__name__}: {error}"[:2000])
        return Memory(b"", f"{message.transport} is not offered here"[:2000])

    def open(self, transport: Transport, peer: Hello, own: Hello, exchange: Exchange) -> CopyBlocks:
        """The puller's way into its peer's pages. Raises OSError, ValueError or what a library raises."""
        if transport == "shm":
            return self._open_shared(peer, own)
        answer = exchange(OpenMemory(transport, b""))
        if answer.problem is not None:
            raise ConnectionError(f"the source cannot export its pages: {answer.problem}")
        if transport == "nixl":
            return self._agent().open(answer.metadata, peer)
        pages: Any = self.pages
        copy: CopyBlocks = pages.open(answer.metadata, peer)
        return copy

    def _agent(self) -> "NixlMemory":
        """Made when first asked for: it starts threads of its own."""
        if self._nixl is None:
            from dispec.engine.transfer.nixl_memory import NixlMemory

            assert isinstance(self.pages, HostPages)
            self._nixl = NixlMemory(self._options, self.pages, self._shared)
        return self._nixl

    def _open_shared(self, peer: Hello, own: Hello) -> CopyBlocks:
        seconds = self._options.connect_seconds
        connection = Connection(host.connect_locally(peer.unix_name, seconds), seconds)
        try:
            if greet(connection, self._options.secret or b"", own).engine_id != peer.engine_id:
                raise Refused("another engine has this name")
            _, descriptors, _, _ = socket.recv_fds(connection.socket, 1, 1)
        finally:
            connection.close()
        if not descriptors:
            raise ConnectionError("the source sent no descriptor")
        try:
            region = shared_memory.map_read_only(descriptors[0])
        finally:
            os.close(descriptors[0])
        theirs = HostPages.within(region, peer.num_layers, peer.num_blocks, peer.layer_bytes)
        mine = self.pages
        assert isinstance(mine, HostPages)

        def copy(source_blocks: Sequence[int], own_blocks: Sequence[int]) -> None:
            for source, own_block in zip(source_blocks, own_blocks, strict=True):
                mine.copy_block(theirs, source, own_block)

        return copy


def pages_of(kv_cache: KVCache, shared: SharedMemory | None) -> "HostPages | DevicePages":
    """A cache's pages, wherever they are."""
    if kv_cache.keys.device.type == "cpu":
        return HostPages.of(kv_cache, shared)
    from dispec.engine.transfer.device_pages import DevicePages

    return DevicePages(kv_cache)


def on_same_host(one: Hello, other: Hello) -> bool:
    """Whether two processes run on the same kernel, as the same user."""
    return bool(one.host_id) and (one.host_id, one.user_id) == (other.host_id, other.user_id)


def candidates(own: Hello, peer: Hello) -> list[Transport]:
    """The transports that both have, as the puller prefers them; those for one machine only on one machine."""
    shared = [name for name in own.transports if name in peer.transports]
    near = on_same_host(own, peer)
    is_possible = {
        "shm": near and bool(peer.unix_name),
        "cuda_ipc": near and own.device == peer.device != "cpu",
        "nixl": own.device == peer.device == "cpu",
        "tcp": True,
    }
    names: list[Any] = [name for name in shared if is_possible.get(name, False)]
    return names
