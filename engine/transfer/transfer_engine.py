"""KV transfers of one engine process, behind calls that never wait.

One lock guards the two state machines; it is never held during network or copy operations. Their outputs go to threads:
the server's for pullers, a client's for each source, and one that computes checksums of published blocks and keeps
time. Events for the engine wait for `poll`.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence

from dispec.engine.transfer import receiver, sender, shared_memory
from dispec.engine.transfer.client import Client
from dispec.engine.transfer.handshake import Hello
from dispec.engine.transfer.interface import Event, RemoteBlocks, TransferOptions
from dispec.engine.transfer.receiver import Fetch, PeerKey, Receiver
from dispec.engine.transfer.sender import Sender
from dispec.engine.transfer.server import Server
from dispec.engine.transfer.shared_memory import SharedMemory
from dispec.engine.transfer.transports import Transports
from dispec.layers.types import KVCache

log = logging.getLogger(__name__)


class TransferEngine:
    """Publishes and pulls KV blocks. For the engine's main thread. Listens at once; raises ValueError if it cannot.

    Blocks given to `publish` must not change until `Released` is polled for the transfer; those given to `pull` must
    not be used until `Pulled` or `PullFailed` is.
    """

    def __init__(self, options: TransferOptions) -> None:
        self.options = options
        self._lock = threading.RLock()
        self._events: list[Event] = []
        self._read_fd, self._write_fd = os.pipe()
        for fd in (self._read_fd, self._write_fd):
            os.set_blocking(fd, False)
        self._sender = Sender(options.lease_seconds)
        self._receiver = Receiver(options.pull_seconds)
        self._clients: dict[PeerKey, Client] = {}
        self._to_check: queue.SimpleQueue[tuple[str, list[int]] | None] = queue.SimpleQueue()  # None: look at the time
        self._worker: threading.Thread | None = None
        self._wakes_at: float | None = None
        self._is_closed = False
        self._server = Server(options)
        self.address = self._server.address

    def remote_blocks(self, transfer_id: str) -> RemoteBlocks:
        """Return the handle that a puller needs for a transfer from here."""
        return RemoteBlocks(self.options.engine_id, transfer_id, *self.address)

    def register(self, kv_cache: KVCache, fingerprint: str, shared: SharedMemory | None) -> None:
        """Register the KV cache, once. Peers with another fingerprint or geometry are refused.

        shared: memory that holds the keys and after them the values, for processes of this host. Raises ValueError if
        it does not, or if none of the allowed transports can be used.
        """
        if self._worker is not None:
            raise ValueError("register was called already")
        self._transports = Transports(self.options, kv_cache, shared)
        self._blocks = self._transports.blocks
        self._hello = Hello(
            self.options.engine_id,
            fingerprint,
            self._blocks.num_layers,
            self._blocks.num_blocks,
            self._blocks.layer_bytes,
            self._blocks.device,
            list(self._transports.names),
            shared_memory.host_id(),
            os.getuid(),
            shared_memory.export(shared) if shared is not None and "shm" in self._transports.names else None,
            self.options.lease_seconds,
        )
        self._worker = threading.Thread(target=self._check_and_tick, name="kv-worker", daemon=True)
        self._worker.start()
        self._server.start(self._hello, self._transports, self._sender, self._apply)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers, keys and values."""
        return self._blocks.block_bytes

    def publish(self, transfer_id: str, blocks: Sequence[int], *, payload: bytes | None = None) -> None:
        """Publish further blocks of a transfer, in order. A payload completes it.

        Their contents are final: the host has waited for the steps that fill them.
        Raises ValueError for blocks that do not exist, a payload of more than 16 MiB, or a complete transfer.
        Blocks of one that has ended are not read; its `Released` covers them.
        """
        self._check_blocks(blocks)
        with self._lock:
            outputs = self._sender.publish(transfer_id, blocks, payload, time.monotonic())
            self._to_check.put((transfer_id, list(blocks)))
            self._do(outputs)

    def withdraw(self, transfer_id: str, reason: str) -> None:
        """End a transfer early and tell its puller why. `Released` follows, even if nothing was published."""
        self._apply(self._sender.withdraw, transfer_id, reason[:1024])

    def pull(self, remote_blocks: RemoteBlocks, skip: int, blocks: Sequence[int]) -> None:
        """Begin to copy a transfer's blocks from index `skip` on into own ones; its source need not know of it yet.

        Raises ValueError for blocks that do not exist or repeat, a negative skip, or a transfer that is being pulled.
        """
        self._check_blocks(blocks)
        if len(set(blocks)) != len(blocks):
            raise ValueError("blocks has a block twice")
        if skip < 0:
            raise ValueError(f"skip is {skip}, must be at least 0")
        self._blocks.wait_before_writing()
        self._apply(self._receiver.pull, remote_blocks, skip, blocks)

    def release(self, transfer_id: str) -> None:
        """Tell the source that a transfer is no longer needed here. If it is being pulled, `PullFailed` follows."""
        self._apply(self._receiver.release, transfer_id)

    def poll(self) -> list[Event]:
        """Return the events since the last call."""
        with self._lock:
            events, self._events = self._events, []
            if events and not self._is_closed:
                os.read(self._read_fd, 1)
        return events

    def fileno(self) -> int:
        """Return a descriptor that is readable while `poll` has events."""
        return self._read_fd

    def close(self) -> None:
        """Stop all transfers. Afterwards nothing reads or writes the cache, and no event comes."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            clients = list(self._clients.values())
        self._to_check.put(None)
        for client in clients:
            client.abort()
        self._server.close()
        for client in clients:
            client.join()
        if self._worker is not None:
            self._worker.join()
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _apply(self, method: Callable[..., Sequence[sender.Output | receiver.Output]], *args: object) -> None:
        """Call a state machine's method at the current time and do what it returns."""
        with self._lock:
            self._do(method(*args, time.monotonic()))

    def _start_read(self, read_id: int) -> Fetch | None:
        with self._lock:
            return None if self._is_closed else self._receiver.start_read(read_id, time.monotonic())

    def _client_ended(self, client: Client, reason: str) -> None:
        with self._lock:
            del self._clients[client.key]
            self._apply(self._receiver.disconnected, client.key, reason)

    def _do(self, outputs: Sequence[sender.Output | receiver.Output]) -> None:
        """Pass outputs of the state machines on. Nothing here waits."""
        for output in outputs:
            match output:
                case sender.Send(peer, message):
                    self._server.send(peer, message)
                case sender.SendBlocks(peer, transfer_id, read_id, blocks):
                    self._server.send_blocks(peer, transfer_id, read_id, blocks)
                case receiver.Connect(key):
                    self._connect(key)
                case receiver.Send(key, request):
                    self._clients[key].send(request)
                case receiver.Fetch():
                    self._clients[output.peer].fetch(output)
                case _:
                    if not self._events and not self._is_closed:
                        os.write(self._write_fd, b"\0")
                    self._events.append(output)
        due = self._next_deadline()
        if due is not None and (self._wakes_at is None or due < self._wakes_at):
            self._wakes_at = due
            self._to_check.put(None)

    def _connect(self, key: PeerKey) -> None:
        if not self._is_closed:
            self._clients[key] = Client(
                key,
                self.options,
                self._hello,
                self._transports,
                self._receiver,
                apply=self._apply,
                start_read=self._start_read,
                on_end=self._client_ended,
            )

    def _next_deadline(self) -> float | None:
        times = (self._sender.next_deadline, self._receiver.next_deadline)
        return min((time for time in times if time is not None), default=None)

    def _check_and_tick(self) -> None:
        """Compute checksums of published blocks in their order, and do what is due by the clock."""
        while True:
            with self._lock:
                if self._is_closed:
                    return
                self._apply(self._sender.tick)
                self._apply(self._receiver.tick)
                self._wakes_at = self._next_deadline()
                wait = None if self._wakes_at is None else max(0.001, self._wakes_at - time.monotonic())
            try:
                job = self._to_check.get(timeout=wait)
            except queue.Empty:
                continue
            if job is not None:
                self._compute_checksums(*job)

    def _compute_checksums(self, transfer_id: str, blocks: list[int]) -> None:
        size = self._blocks.num_checked_at_once(self.options.read_bytes)
        for start in range(0, len(blocks), size):
            with self._lock:
                if self._is_closed or not self._sender.start_check(transfer_id):
                    return
            checksums = None
            try:
                checksums = self._blocks.checksums(blocks[start : start + size])
            except Exception:
                log.exception("cannot read blocks to be published")
            self._apply(self._sender.checked, transfer_id, checksums)

    def _check_blocks(self, blocks: Sequence[int]) -> None:
        if self._worker is None:
            raise ValueError("register must be called first")
        if blocks and not 0 <= min(blocks) <= max(blocks) < self._blocks.num_blocks:
            raise ValueError(f"blocks has {min(blocks)} to {max(blocks)}, must be 0 to {self._blocks.num_blocks - 1}")
