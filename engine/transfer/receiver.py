"""The puller's side of the protocol as a state machine: no threads, no sockets, no clock of its own.

A pull queries its source, fetches what is ready in reads of bounded size while the source may still compute the rest,
and ends with exactly one event. While a read is written to the pull's blocks it is *active*; a pull that fails waits
for its active reads, so that nothing is written after its event.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dispec.engine.transfer.interface import Pulled, PullFailed, RemoteBlocks
from dispec.engine.transfer.messages import BlocksReady, PullDone, QueryBlocks, TransferEnded

MAX_READS = 3  # of one pull: one on the wire, one being verified, one waiting
MAX_UNRELEASED = 65536  # transfers pulled and not yet released

PeerKey = tuple[str, int, str]  # host, port, engine_id


@dataclass(frozen=True)
class Connect:
    """Connect to a source; `Receiver.connected` or `Receiver.disconnected` must follow."""

    peer: PeerKey


@dataclass(frozen=True)
class Send:
    """Send a message to a source."""

    peer: PeerKey
    message: QueryBlocks | PullDone


@dataclass(frozen=True)
class Fetch:
    """Copy blocks into own ones: `Receiver.start_read` before the first byte is written, `Receiver.end_read` after all.

    first: index in the transfer. source_blocks: block numbers in the source's cache. own_blocks: those in this engine's
        cache. checksums: of the contents.
    """

    peer: PeerKey
    read_id: int
    transfer_id: str
    first: int
    source_blocks: list[int]
    own_blocks: list[int]
    checksums: list[bytes]


Output = Connect | Send | Fetch | Pulled | PullFailed


@dataclass
class _Pull:
    """num_ready: blocks known to be ready, from the transfer's first; num_fetched, num_done: from index `skip` on.

    progress_at: time of the last message or read that brought something new; query_at: time of the next query.
    """

    peer: PeerKey
    skip: int
    blocks: list[int]
    progress_at: float
    num_ready: int
    source_blocks: list[int] = field(default_factory=list)
    checksums: list[bytes] = field(default_factory=list)
    total: int | None = None
    payload: bytes | None = None
    num_fetched: int = 0
    num_done: int = 0
    reads: dict[int, Fetch] = field(default_factory=dict)
    active: set[int] = field(default_factory=set)
    failure: str | None = None
    query_at: float = 0.0


@dataclass
class _Peer:
    """query_seconds: between two queries. max_read_blocks: of one read; 0 until connected."""

    query_seconds: float = 0.0
    max_read_blocks: int = 0


class Receiver:
    """All transfers that this process pulls. Times are seconds of any monotonic clock."""

    def __init__(self, pull_seconds: float) -> None:
        self._pull_seconds = pull_seconds
        self._pulls: dict[str, _Pull] = {}
        self._peers: dict[PeerKey, _Peer] = {}
        self._pull_of_read: dict[int, _Pull] = {}
        self._read_ids = itertools.count()
        self._unreleased: OrderedDict[str, PeerKey] = OrderedDict()

    def pull(self, remote_blocks: RemoteBlocks, skip: int, blocks: Sequence[int], now: float) -> list[Output]:
        """Begin a pull. Raises ValueError if one of this transfer is under way or not released yet."""
        transfer_id = remote_blocks.transfer_id
        if transfer_id in self._pulls or transfer_id in self._unreleased:
            raise ValueError(f"transfer {transfer_id!r} is being pulled already")
        key = (remote_blocks.host, remote_blocks.port, remote_blocks.engine_id)
        pull = self._pulls[transfer_id] = _Pull(key, skip, list(blocks), now, skip)
        if key not in self._peers:
            self._peers[key] = _Peer()
            return [Connect(key)]
        return self._query(transfer_id, pull, now) if self._peers[key].max_read_blocks else []

    def connected(self, key: PeerKey, query_seconds: float, max_read_blocks: int, now: float) -> list[Output]:
        """Note that a source answers."""
        self._peers[key] = _Peer(query_seconds, max_read_blocks)
        return [output for name, pull in self._pulls_from(key) for output in self._query(name, pull, now)]

    def disconnected(self, key: PeerKey, reason: str, now: float) -> list[Output]:
        """Fail the pulls of a source without a connection, over which no read can become active any more."""
        self._peers.pop(key, None)
        return [output for name, pull in self._pulls_from(key) for output in self._fail(name, pull, reason)]

    def receive(self, key: PeerKey, message: BlocksReady | TransferEnded, now: float) -> list[Output]:
        """Handle a source's message."""
        pull = self._pulls.get(message.transfer_id)
        if pull is None or pull.peer != key or pull.failure is not None:
            return []
        if isinstance(message, TransferEnded):
            return self._fail(message.transfer_id, pull, f"the source ended it: {message.reason}")
        end = message.first + len(message.blocks)
        has_blocks = message.first <= pull.num_ready < end
        has_payload = message.payload is not None and pull.payload is None
        if not has_blocks and not has_payload:
            return []
        if has_blocks:
            start = pull.num_ready - message.first
            stop = start + max(0, len(pull.blocks) - len(pull.source_blocks))
            pull.source_blocks += message.blocks[start:stop]
            pull.checksums += message.checksums[start:stop]
            pull.num_ready = end
        if has_payload:
            pull.payload, pull.total = message.payload, message.total
        pull.progress_at = now
        outputs = self._advance(message.transfer_id, pull)
        if message.transfer_id in self._pulls and pull.failure is None:
            outputs += self._query(message.transfer_id, pull, now)
        return outputs

    def start_read(self, read_id: int, now: float) -> Fetch | None:
        """Mark a read active before its first byte is written; None if it was cancelled and must not be written."""
        pull = self._pull_of_read.get(read_id)
        if pull is None or read_id in pull.active:
            return None
        pull.active.add(read_id)
        return pull.reads[read_id]

    def end_read(self, read_id: int, problem: str | None, now: float) -> list[Output]:
        """End an active read. problem: None if all its blocks are in place and their checksums match."""
        pull = self._pull_of_read.pop(read_id)
        fetch = pull.reads.pop(read_id)
        pull.active.discard(read_id)
        if pull.failure is not None:
            return self._finish(fetch.transfer_id, pull)
        if problem is not None:
            return self._fail(fetch.transfer_id, pull, problem)
        pull.num_done += len(fetch.own_blocks)
        pull.progress_at = now
        return self._advance(fetch.transfer_id, pull)

    def release(self, transfer_id: str, now: float) -> list[Output]:
        """Tell the source that a transfer is no longer needed, and cancel its pull. Does nothing for unknown ones."""
        key = self._unreleased.pop(transfer_id, None)
        if key is not None:
            return self._send_done(transfer_id, key)
        pull = self._pulls.get(transfer_id)
        return self._fail(transfer_id, pull, "it was cancelled") if pull is not None else []

    def tick(self, now: float) -> list[Output]:
        """Repeat queries that are due, and fail pulls that make no progress."""
        outputs: list[Output] = []
        for transfer_id, pull in list(self._pulls.items()):
            if pull.failure is not None:
                continue
            if now >= pull.progress_at + self._pull_seconds:
                outputs += self._fail(transfer_id, pull, f"nothing came for {self._pull_seconds:g} s")
            elif self._peers[pull.peer].max_read_blocks and now >= pull.query_at:
                outputs += self._query(transfer_id, pull, now)
        return outputs

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do."""
        times = []
        for pull in self._pulls.values():
            if pull.failure is None:
                times.append(pull.progress_at + self._pull_seconds)
                if self._peers[pull.peer].max_read_blocks:
                    times.append(pull.query_at)
        return min(times, default=None)

    def is_waiting_for(self, key: PeerKey) -> bool:
        """Return whether a source has to send something: there are pulls, and no read is active."""
        pulls = [pull for pull in list(self._pulls.values()) if pull.peer == key]  # a copy: threads call this unlocked
        return bool(pulls) and not any(pull.active for pull in pulls)

    @property
    def num_pulls(self) -> int:
        return len(self._pulls)

    def _pulls_from(self, key: PeerKey) -> list[tuple[str, _Pull]]:
        return [(name, pull) for name, pull in self._pulls.items() if pull.peer == key]

    def _query(self, transfer_id: str, pull: _Pull, now: float) -> list[Output]:
        """Query the source, which renews the lease."""
        pull.query_at = now + self._peers[pull.peer].query_seconds
        return [Send(pull.peer, QueryBlocks(transfer_id, pull.num_ready, pull.payload is not None))]

    def _advance(self, transfer_id: str, pull: _Pull) -> list[Output]:
        """Fetch blocks that are ready, or end the pull."""
        expected = pull.skip + len(pull.blocks)
        if pull.total is not None and pull.total < expected:
            return self._fail(transfer_id, pull, f"the transfer has {pull.total} blocks, {expected} were expected")
        if pull.payload is not None and pull.num_done == len(pull.blocks):
            del self._pulls[transfer_id]
            self._unreleased[transfer_id] = pull.peer
            while len(self._unreleased) > MAX_UNRELEASED:
                self._unreleased.popitem(last=False)
            return [Pulled(transfer_id, pull.payload)]
        outputs: list[Output] = []
        while pull.num_fetched < len(pull.source_blocks) and len(pull.reads) < MAX_READS:
            start, stop = pull.num_fetched, pull.num_fetched + self._peers[pull.peer].max_read_blocks
            fetch = Fetch(
                pull.peer,
                next(self._read_ids),
                transfer_id,
                pull.skip + start,
                pull.source_blocks[start:stop],
                pull.blocks[start : min(stop, len(pull.source_blocks))],
                pull.checksums[start:stop],
            )
            pull.num_fetched = start + len(fetch.source_blocks)
            pull.reads[fetch.read_id] = fetch
            self._pull_of_read[fetch.read_id] = pull
            outputs.append(fetch)
        return outputs

    def _fail(self, transfer_id: str, pull: _Pull, reason: str) -> list[Output]:
        if pull.failure is None:
            pull.failure = reason
            for read_id in pull.reads.keys() - pull.active:
                del pull.reads[read_id]
                del self._pull_of_read[read_id]
        return self._finish(transfer_id, pull)

    def _finish(self, transfer_id: str, pull: _Pull) -> list[Output]:
        """End a failed pull, unless a read is active."""
        if pull.failure is None or pull.active:
            return []
        del self._pulls[transfer_id]
        return [*self._send_done(transfer_id, pull.peer), PullFailed(transfer_id, pull.failure)]

    def _send_done(self, transfer_id: str, key: PeerKey) -> list[Output]:
        is_connected = key in self._peers and self._peers[key].max_read_blocks
        return [Send(key, PullDone(transfer_id))] if is_connected else []
