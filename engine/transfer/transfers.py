"""All KV transfers of one engine process, behind calls that never wait.

The two state machines are used under one lock, which nobody holds while waiting for the network or a copy. What they
say is to be done goes to threads: of the server for those who pull from here, of a link for each source that is pulled
from, one that computes checksums of what is published, one that keeps time. What the engine shall know waits for
`poll`.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence

from dispec.engine.transfer import host
from dispec.engine.transfer import receiver as pulls
from dispec.engine.transfer import sender as offers
from dispec.engine.transfer.handshake import Hello
from dispec.engine.transfer.interface import MAX_ID_CHARACTERS, Event, RemoteBlocks, TransferOptions
from dispec.engine.transfer.memory import Memories, pages_of
from dispec.engine.transfer.messages import MAX_PLACES, Ask, Done, Gone, Read, Ready
from dispec.engine.transfer.receiver import Fetch, PeerKey
from dispec.engine.transfer.server import Server
from dispec.engine.transfer.shared_memory import SharedMemory
from dispec.engine.transfer.source_connection import SourceConnection
from dispec.layers.types import KVCache

log = logging.getLogger(__name__)


class Transfers:
    """Made in the engine's main thread, which alone calls what is public here. It listens at once; raises OSError if it
    cannot.

    Blocks given to `publish` are the transfers' until the id's `Released` is polled, those given to `pull` until its
    `Pulled` or `PullFailed` is.
    """

    def __init__(self, options: TransferOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options
        self.engine_id = options.engine_id
        self._clock = clock
        self._lock = threading.RLock()
        self._tick = threading.Condition(self._lock)
        self._events: list[Event] = []
        self._read_end, self._write_end = os.pipe()
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)
        self._offers = offers.Sender(options.lease_seconds, MAX_PLACES)
        self._pulls = pulls.Receiver(options.stall_seconds, options.pull_seconds)
        self._links: dict[PeerKey, SourceConnection] = {}
        self._ending: list[SourceConnection] = []
        self._checks: queue.SimpleQueue[tuple[str, list[int]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self._wakes_at: float | None = None
        self._server = Server(options)
        self.address = self._server.address

    def remote_blocks(self, transfer_id: str) -> RemoteBlocks:
        """What a puller needs to pull a transfer from here."""
        return RemoteBlocks(
            self.engine_id, transfer_id, self.options.advertised_host or self.address[0], self.address[1]
        )

    def register(self, kv_cache: KVCache, fingerprint: str, shared: SharedMemory | None) -> None:
        """The pages that blocks are numbers in, once. Peers with another `fingerprint` or geometry are refused.

        shared: the memory that the keys and after them the values lie in, so that processes of this machine can map
        it. Raises ValueError if they do not, or if none of the allowed transports can be used.
        """
        if self._threads:
            raise ValueError("register was called already")
        self._pages = pages_of(kv_cache, shared)
        self._memories = Memories(self.options, self._pages, shared)
        if not self._memories.transports:
            raise ValueError(f"kv_transfer allows {', '.join(self.options.allowed)}: none can be used here")
        self._check_places = max(1, self.options.read_bytes // self._pages.block_bytes)  # then they can be read at once
        self._hello = Hello(
            self.engine_id,
            fingerprint,
            self._pages.num_layers,
            self._pages.num_blocks,
            self._pages.layer_bytes,
            self._pages.device,
            list(self._memories.transports),
            host.host_id(),
            host.user_id(),
            self._server.listen_locally() if "shm" in self._memories.transports else "",
            self.options.lease_seconds,
        )
        for run, name in ((self._check_all, "kv-checksum"), (self._keep_time, "kv-clock")):
            thread = threading.Thread(target=run, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        self._server.start(self._hello, self._memories, self)

    @property
    def block_bytes(self) -> int:
        """Of a block over all the pages that were registered."""
        return self._pages.block_bytes

    def publish(self, transfer_id: str, blocks: Sequence[int], *, payload: bytes | None = None) -> None:
        """Further blocks whose contents are complete, in order; a payload says that these are the last.

        Raises ValueError for blocks that do not exist, an id that is too long, a payload of more than 16 MiB, or a
        transfer that is complete. Blocks of one that has ended are not read: its `Released` is theirs too.
        """
        _check_id(transfer_id)
        self._check_blocks(blocks)
        self._pages.follow()
        with self._lock:
            outputs = self._offers.publish(transfer_id, blocks, payload, self._clock())
            self._checks.put((transfer_id, list(blocks)))
            self._do(outputs)

    def withdraw(self, transfer_id: str, reason: str) -> None:
        """The transfer will not be completed, or shall not be read any more: its puller hears why.

        `Released` follows as for any other, though nothing was published; one that has ended is left alone.
        """
        _check_id(transfer_id)
        with self._lock:
            self._do(self._offers.withdraw(transfer_id, reason[:1024], self._clock()))

    def pull(self, remote_blocks: RemoteBlocks, skip: int, blocks: Sequence[int]) -> None:
        """Begin to get the places from `skip` on into own blocks; the source need not know of the transfer yet.

        Raises ValueError for blocks that do not exist or are given twice, a negative skip, or a transfer that is being
        pulled already.
        """
        for name in (remote_blocks.transfer_id, remote_blocks.engine_id, remote_blocks.host):
            _check_id(name)
        self._check_blocks(blocks)
        if len(set(blocks)) != len(blocks):
            raise ValueError("blocks has a block twice")
        if skip < 0:
            raise ValueError(f"skip is {skip}, must be at least 0")
        self._pages.follow()
        with self._lock:
            self._do(self._pulls.begin(remote_blocks, skip, blocks, self._clock()))

    def release(self, transfer_id: str) -> None:
        """The puller is done with a transfer, or does not want it any more: then `PullFailed` follows."""
        with self._lock:
            self._do(self._pulls.release(transfer_id))

    def poll(self) -> list[Event]:
        """What has happened since the last call."""
        with self._lock:
            events, self._events = self._events, []
            if events and not self._is_closed:
                os.read(self._read_end, 1)
        return events

    def fileno(self) -> int:
        """Readable while `poll` has something."""
        return self._read_end

    def close(self) -> None:
        """Stop all transfers. Afterwards nothing reads or writes the pages, and no further event comes."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            links = [*self._links.values(), *self._ending]
            self._tick.notify()
        self._checks.put(None)
        for link in links:
            link.abort()
        self._server.close()
        for link in links:
            link.join()
        for thread in self._threads:
            thread.join()
        os.close(self._read_end)
        os.close(self._write_end)

    def tick(self) -> None:
        """Do what is due by the clock. A thread of its own calls this; tests with a clock of theirs do too."""
        with self._lock:
            self._do([*self._offers.tick(self._clock()), *self._pulls.tick(self._clock())])

    # What the server's threads say.

    def heard(self, peer: int, message: Ask | Read | Done) -> None:
        with self._lock:
            match message:
                case Ask():
                    self._do(self._offers.ask(peer, message, self._clock()))
                case Read():
                    self._do(self._offers.read(peer, message, self._clock()))
                case Done():
                    self._do(self._offers.done(peer, message, self._clock()))

    def left(self, peer: int) -> None:
        with self._lock:
            self._offers.lost(peer)

    def sent(self, transfer_id: str) -> None:
        with self._lock:
            self._do(self._offers.sent(transfer_id, self._clock()))

    # What the links' threads say.

    def linked(self, key: PeerKey, ask_seconds: float, read_places: int) -> None:
        with self._lock:
            self._do(self._pulls.connected(key, ask_seconds, read_places, self._clock()))

    def answered(self, key: PeerKey, message: Ready | Gone, payload: bytes) -> None:
        with self._lock:
            if isinstance(message, Ready):
                self._do(self._pulls.ready(key, message, payload, self._clock()))
            else:
                self._do(self._pulls.gone(key, message, self._clock()))

    def touch(self, read_id: int) -> Fetch | None:
        with self._lock:
            return None if self._is_closed else self._pulls.touch(read_id, self._clock())

    def landed(self, read_id: int, problem: str | None) -> None:
        with self._lock:
            self._do(self._pulls.landed(read_id, problem, self._clock()))

    def unlinked(self, key: PeerKey, link: SourceConnection, reason: str) -> None:
        with self._lock:
            if self._links.get(key) is link:
                del self._links[key]
                self._do(self._pulls.lost(key, reason))
            elif link in self._ending:
                self._ending.remove(link)

    def _do(self, outputs: Sequence[offers.Output | pulls.Output]) -> None:
        """Hand on what the state machines say. Nothing here waits."""
        for output in outputs:
            match output:
                case offers.Send(peer, message, payload):
                    self._server.send(peer, message, payload)
                case offers.SendBlocks(peer, transfer_id, read_id, blocks):
                    self._server.send_blocks(peer, transfer_id, read_id, blocks)
                case pulls.Connect(key):
                    if not self._is_closed:
                        self._links[key] = SourceConnection(key, self.options, self._hello, self._memories, self)
                case pulls.Drop(key, _):
                    link = self._links.pop(key)
                    self._ending.append(link)
                    link.abort()
                case pulls.Send(key, message):
                    self._links[key].send(message)
                case pulls.Fetch():
                    self._links[output.peer].fetch(output)
                case _:
                    self._tell(output)
        due = self._next_deadline()
        if due is not None and (self._wakes_at is None or due < self._wakes_at):
            self._tick.notify()

    def _tell(self, event: Event) -> None:
        if not self._events and not self._is_closed:
            os.write(self._write_end, b"\0")
        self._events.append(event)

    def _next_deadline(self) -> float | None:
        times = (self._offers.next_deadline, self._pulls.next_deadline)
        return min((time for time in times if time is not None), default=None)

    def _keep_time(self) -> None:
        with self._lock:
            while not self._is_closed:
                self.tick()
                self._wakes_at = self._next_deadline()
                wait = None if self._wakes_at is None else max(0.001, self._wakes_at - self._clock())
                self._tick.wait(wait)

    def _check_all(self) -> None:
        """Checksums of published blocks, in their order."""
        while (job := self._checks.get()) is not None:
            transfer_id, blocks = job
            for start in range(0, len(blocks), self._check_places):
                part = blocks[start : start + self._check_places]
                with self._lock:
                    if self._is_closed or not self._offers.start_check(transfer_id):
                        break
                checksums = None
                try:
                    checksums = self._pages.checksums(part)
                except Exception:
                    log.exception("cannot read blocks to be published")
                with self._lock:
                    self._do(self._offers.checked(transfer_id, checksums, self._clock()))

    def _check_blocks(self, blocks: Sequence[int]) -> None:
        if not self._threads:
            raise ValueError("register must be called first")
        if blocks and not 0 <= min(blocks) <= max(blocks) < self._pages.num_blocks:
            raise ValueError(f"blocks has {min(blocks)} to {max(blocks)}, must be 0 to {self._pages.num_blocks - 1}")


def _check_id(name: str) -> None:
    if not 0 < len(name) <= MAX_ID_CHARACTERS:
        raise ValueError(f"an id has {len(name)} characters, must have 1 to {MAX_ID_CHARACTERS}")
