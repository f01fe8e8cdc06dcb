"""The puller's side of the protocol, as a state machine: no threads, no sockets, no clock of its own.

A pull asks its source what is ready, fetches it in reads of bounded size while the source may still be computing what
follows, and ends with exactly one event. A read that is being written into the pull's blocks is *touched*: a pull that
fails waits for these, so that nothing is written after its event.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dispec.engine.transfer.interface import Pulled, PullFailed, RemoteBlocks
from dispec.engine.transfer.messages import Ask, Done, Gone, Ready, checksums_of, contradiction

MAX_READS = 3  # of one pull under way: one on the wire, one being verified, one that waits
MAX_HELD = 65536  # transfers pulled and not yet released

PeerKey = tuple[str, int, str]  # host, port, engine_id


@dataclass(frozen=True)
class Connect:
    """Connect to a source; `Receiver.connected` or `Receiver.lost` must follow."""

    peer: PeerKey


@dataclass(frozen=True)
class Drop:
    """A source that is silent: close what leads there."""

    peer: PeerKey
    reason: str


@dataclass(frozen=True)
class Send:
    """A message to a source."""

    peer: PeerKey
    message: Ask | Done


@dataclass(frozen=True)
class Fetch:
    """Get blocks into own ones. `Receiver.touch` comes before the first byte is written, then `Receiver.landed`.

    first: place in the transfer; source_blocks: the source's own numbers; checksums: what must be found afterwards.
    """

    peer: PeerKey
    read_id: int
    transfer_id: str
    first: int
    source_blocks: list[int]
    own_blocks: list[int]
    checksums: list[bytes]


Output = Connect | Drop | Send | Fetch | Pulled | PullFailed


@dataclass
class _Pull:
    """seen: places known to be ready, counted from the transfer's first; fetched and landed count from `skip`."""

    peer: PeerKey
    skip: int
    blocks: list[int]
    progress: float
    seen: int
    source_blocks: list[int] = field(default_factory=list)
    checksums: list[bytes] = field(default_factory=list)
    total: int | None = None
    payload: bytes | None = None
    fetched: int = 0
    landed: int = 0
    reads: dict[int, Fetch] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)
    failure: str | None = None
    ask_at: float = 0.0


@dataclass
class _Peer:
    """ask_seconds: after which a question is asked again; read_places: that one read may have. 0: not connected yet."""

    ask_seconds: float = 0.0
    read_places: int = 0
    heard: float = 0.0


class Receiver:
    """All transfers that this process pulls. Times are seconds of any monotonic clock."""

    def __init__(self, stall_seconds: float, pull_seconds: float) -> None:
        self._stall = stall_seconds
        self._patience = pull_seconds
        self._pulls: dict[str, _Pull] = {}
        self._peers: dict[PeerKey, _Peer] = {}
        self._reads: dict[int, _Pull] = {}
        self._names = itertools.count()
        self._held: OrderedDict[str, PeerKey] = OrderedDict()

    def begin(self, remote_blocks: RemoteBlocks, skip: int, blocks: Sequence[int], now: float) -> list[Output]:
        """Raises ValueError if a pull of this transfer is under way or not released yet."""
        transfer_id = remote_blocks.transfer_id
        if transfer_id in self._pulls or transfer_id in self._held:
            raise ValueError(f"transfer {transfer_id!r} is being pulled already")
        key = (remote_blocks.host, remote_blocks.port, remote_blocks.engine_id)
        pull = self._pulls[transfer_id] = _Pull(key, skip, list(blocks), now, skip)
        if key not in self._peers:
            self._peers[key] = _Peer()
            return [Connect(key)]
        return self._ask(transfer_id, pull, now) if self._peers[key].read_places else []

    def connected(self, key: PeerKey, ask_seconds: float, read_places: int, now: float) -> list[Output]:
        """Questions may be asked, again every `ask_seconds`; a read may have `read_places`."""
        self._peers[key] = _Peer(ask_seconds, read_places, now)
        return [output for name, pull in self._of(key) for output in self._ask(name, pull, now)]

    def lost(self, key: PeerKey, reason: str) -> list[Output]:
        """No connection to a source could be made, or it has ended: nothing can be touched over it any more."""
        self._peers.pop(key, None)
        return [output for name, pull in self._of(key) for output in self._fail(name, pull, reason)]

    def ready(self, key: PeerKey, message: Ready, payload: bytes, now: float) -> list[Output]:
        """An answer."""
        self._hear(key, now)
        pull = self._pulls.get(message.transfer_id)
        if pull is None or pull.peer != key or pull.failure is not None:
            return []
        problem = contradiction(message)
        if problem is not None:
            return self._fail(message.transfer_id, pull, problem)
        has_news = False
        if message.first <= pull.seen < message.first + len(message.blocks):
            has_news = True
            start = pull.seen - message.first
            wanted = max(0, len(pull.blocks) - len(pull.source_blocks))
            pull.source_blocks += message.blocks[start : start + wanted]
            pull.checksums += checksums_of(message)[start : start + wanted]
            pull.seen = message.first + len(message.blocks)
        if message.payload_bytes is not None and pull.payload is None:
            has_news = True
            pull.payload, pull.total = payload, message.total
        if not has_news:
            return []
        pull.progress = now
        outputs = self._advance(message.transfer_id, pull)
        if message.transfer_id in self._pulls and pull.failure is None:
            outputs += self._ask(message.transfer_id, pull, now)
        return outputs

    def gone(self, key: PeerKey, message: Gone, now: float) -> list[Output]:
        """The source has ended the transfer."""
        self._hear(key, now)
        pull = self._pulls.get(message.transfer_id)
        if pull is None or pull.peer != key:
            return []
        return self._fail(message.transfer_id, pull, f"the source ended it: {message.reason}")

    def touch(self, read_id: int, now: float) -> Fetch | None:
        """The read's first byte is about to be written; None if it is not wanted (any more) and must not be."""
        pull = self._reads.get(read_id)
        if pull is None or read_id in pull.touched:
            return None
        self._hear(pull.peer, now)
        pull.touched.add(read_id)
        return pull.reads[read_id]

    def landed(self, read_id: int, problem: str | None, now: float) -> list[Output]:
        """A touched read is over: all its blocks are in place and their checksums right, or `problem` says what is."""
        pull = self._reads.pop(read_id)
        fetch = pull.reads.pop(read_id)
        pull.touched.discard(read_id)
        self._hear(pull.peer, now)
        if pull.failure is not None:
            return self._finish(fetch.transfer_id, pull)
        if problem is not None:
            return self._fail(fetch.transfer_id, pull, problem)
        pull.landed += len(fetch.own_blocks)
        pull.progress = now
        return self._advance(fetch.transfer_id, pull)

    def release(self, transfer_id: str) -> list[Output]:
        """Done with a transfer, or not wanted any more. Unknown ones are left alone."""
        key = self._held.pop(transfer_id, None)
        if key is not None:
            return self._say_done(transfer_id, key)
        pull = self._pulls.get(transfer_id)
        return self._fail(transfer_id, pull, "it was cancelled") if pull is not None else []

    def tick(self, now: float) -> list[Output]:
        """Ask again, and give up what takes too long."""
        outputs: list[Output] = []
        for transfer_id, pull in list(self._pulls.items()):
            if pull.failure is not None:
                continue
            peer = self._peers[pull.peer]
            if now >= pull.progress + self._patience:
                reason = f"nothing came for {self._patience:g} s"
                outputs += self._fail(transfer_id, pull, reason)
            elif peer.read_places and now >= pull.ask_at:
                outputs += self._ask(transfer_id, pull, now)
        for key, peer in list(self._peers.items()):
            if self._is_silent(key, peer, now):
                reason = f"the source said nothing for {self._stall:g} s"
                outputs += [Drop(key, reason), *self.lost(key, reason)]
        return outputs

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do."""
        times = []
        for pull in self._pulls.values():
            if pull.failure is None:
                peer = self._peers[pull.peer]
                times.append(pull.progress + self._patience)
                if peer.read_places:
                    times.append(pull.ask_at)
                    if not any(other.touched for _, other in self._of(pull.peer)):
                        times.append(peer.heard + self._stall)
        return min(times, default=None)

    @property
    def num_pulls(self) -> int:
        return len(self._pulls)

    def _of(self, key: PeerKey) -> list[tuple[str, _Pull]]:
        return [(name, pull) for name, pull in self._pulls.items() if pull.peer == key]

    def _is_silent(self, key: PeerKey, peer: _Peer, now: float) -> bool:
        """Who writes into pages watches its connection itself, so a long read is no silence."""
        waiting = [pull for _, pull in self._of(key)]
        if not peer.read_places or not waiting or any(pull.touched for pull in waiting):
            return False
        return now >= peer.heard + self._stall

    def _hear(self, key: PeerKey, now: float) -> None:
        if key in self._peers:
            self._peers[key].heard = now

    def _ask(self, transfer_id: str, pull: _Pull, now: float) -> list[Output]:
        """A question, which also renews the lease. Silence counts from the first one after a pause."""
        peer = self._peers[pull.peer]
        if all(other is pull for _, other in self._of(pull.peer)) and pull.ask_at == 0.0:
            peer.heard = now
        pull.ask_at = now + peer.ask_seconds
        return [Send(pull.peer, Ask(transfer_id, pull.seen, pull.payload is not None))]

    def _advance(self, transfer_id: str, pull: _Pull) -> list[Output]:
        """Fetch what is known and not fetched, or end."""
        if pull.total is not None and pull.total < pull.skip + len(pull.blocks):
            wanted = pull.skip + len(pull.blocks)
            return self._fail(transfer_id, pull, f"the transfer has {pull.total} blocks, {wanted} were expected")
        if pull.payload is not None and pull.landed == len(pull.blocks):
            del self._pulls[transfer_id]
            self._held[transfer_id] = pull.peer
            while len(self._held) > MAX_HELD:
                self._held.popitem(last=False)
            return [Pulled(transfer_id, pull.payload)]
        outputs: list[Output] = []
        while pull.fetched < len(pull.source_blocks) and len(pull.reads) < MAX_READS:
            start = pull.fetched
            stop = min(len(pull.source_blocks), start + self._peers[pull.peer].read_places)
            fetch = Fetch(
                pull.peer,
                next(self._names),
                transfer_id,
                pull.skip + start,
                pull.source_blocks[start:stop],
                pull.blocks[start:stop],
                pull.checksums[start:stop],
            )
            pull.fetched = stop
            pull.reads[fetch.read_id] = fetch
            self._reads[fetch.read_id] = pull
            outputs.append(fetch)
        return outputs

    def _fail(self, transfer_id: str, pull: _Pull, reason: str) -> list[Output]:
        if pull.failure is None:
            pull.failure = reason
            for read_id in [read_id for read_id in pull.reads if read_id not in pull.touched]:
                del pull.reads[read_id]
                del self._reads[read_id]
        return self._finish(transfer_id, pull)

    def _finish(self, transfer_id: str, pull: _Pull) -> list[Output]:
        if pull.failure is None or pull.touched:
            return []
        del self._pulls[transfer_id]
        return [*self._say_done(transfer_id, pull.peer), PullFailed(transfer_id, pull.failure)]

    def _say_done(self, transfer_id: str, key: PeerKey) -> list[Output]:
        return [Send(key, Done(transfer_id))] if key in self._peers and self._peers[key].read_places else []
