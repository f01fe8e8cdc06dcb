"""The source's side of the protocol, as a state machine: no threads, no sockets, no clock of its own.

An offer is one transfer's blocks. They may be read from the moment their checksum is known until the offer ends:
because its puller is done, because the engine withdrew it, or because its lease ran out. It is released when it has
ended and nobody reads any more: a read over a connection is counted until it is sent, as is a checksum being computed;
who reads by itself, from memory that it maps, counts from the first answer that named blocks until it is done or the
lease ends.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dispec.engine.transfer.interface import MAX_PAYLOAD_BYTES, Released
from dispec.engine.transfer.messages import MAX_PLACES, Ask, Done, Gone, Read, Ready

MAX_PARKED = 4096  # questions of one puller that wait for news
MAX_REMEMBERED = 65536  # ended transfers, so that a late question gets a reason


@dataclass(frozen=True)
class Send:
    """A message to a puller, with the payload that follows it."""

    peer: int
    message: Ready | Gone
    payload: bytes = b""


@dataclass(frozen=True)
class SendBlocks:
    """Bytes of blocks to a puller. `Sender.sent` must be told when they are sent or cannot be."""

    peer: int
    transfer_id: str
    read_id: int
    blocks: list[int]


Output = Send | SendBlocks | Released


@dataclass
class _Offer:
    """deadline: when the lease ends; None while the engine may still publish."""

    is_known: bool = False
    blocks: list[int] = field(default_factory=list)
    checksums: list[bytes] = field(default_factory=list)
    payload: bytes | None = None
    deadline: float | None = None
    ending: str | None = None
    was_expired: bool = False
    num_reads: int = 0
    readers: set[int] = field(default_factory=set)
    parked: dict[int, Ask] = field(default_factory=dict)


class Sender:
    """All transfers that this process is the source of. Times are seconds of any monotonic clock."""

    def __init__(self, lease_seconds: float, max_read_places: int) -> None:
        self._lease = lease_seconds
        self._max_read_places = max_read_places
        self._offers: dict[str, _Offer] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._unwanted: set[str] = set()  # of the ended ones, those that their puller cancelled before we knew them

    def publish(self, transfer_id: str, blocks: Sequence[int], payload: bytes | None, now: float) -> list[Output]:
        """Take over further blocks; a payload completes the transfer. Each block's checksum is due by `checked`.

        Raises ValueError for an id that is complete already or a payload that is too long. Blocks of a transfer that
        has ended are not read; its `Released`, due or polled already, is theirs too.
        """
        if payload is not None and len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"payload has {len(payload)} bytes, must have at most {MAX_PAYLOAD_BYTES}")
        if transfer_id in self._unwanted:
            self._unwanted.discard(transfer_id)
            return [Released(transfer_id, was_expired=False)]
        if transfer_id in self._ended:
            return []
        offer = self._offers.setdefault(transfer_id, _Offer())
        if offer.payload is not None:
            raise ValueError(f"transfer {transfer_id!r} is complete, nothing can be published any more")
        offer.is_known = True
        offer.deadline = None
        if payload is not None:
            offer.payload = bytes(payload)
            offer.deadline = now + self._lease
        offer.blocks.extend(blocks)
        if offer.ending is not None:
            offer.deadline = now + self._lease
            return self._finish(transfer_id, offer)
        return self._news(transfer_id, offer)

    def start_check(self, transfer_id: str) -> bool:
        """Whether the next blocks' checksums are still wanted. If so, `checked` must follow."""
        offer = self._offers.get(transfer_id)
        if offer is None or offer.ending is not None:
            return False
        offer.num_reads += 1
        return True

    def checked(self, transfer_id: str, checksums: Sequence[bytes] | None, now: float) -> list[Output]:
        """The checksums of the first blocks that have none; None if they could not be computed."""
        offer = self._offers[transfer_id]
        offer.num_reads -= 1
        if offer.ending is not None:
            return self._finish(transfer_id, offer)
        if checksums is None:
            return self._end(transfer_id, offer, "the source could not read its blocks", now)
        offer.checksums += checksums
        return self._news(transfer_id, offer)

    def withdraw(self, transfer_id: str, reason: str, now: float) -> list[Output]:
        """End a transfer from this side, one of which nothing was published as well: its puller may be waiting.

        `Released` follows, once for each transfer; one that has ended is left as it is.
        """
        if transfer_id in self._ended:
            return self.publish(transfer_id, (), None, now)
        offer = self._offers.setdefault(transfer_id, _Offer())
        if offer.ending is not None:
            return []
        offer.is_known = True
        return self._end(transfer_id, offer, reason, now)

    def ask(self, peer: int, message: Ask, now: float) -> list[Output]:
        """A puller asks, or says again what it waits for, which renews the lease."""
        transfer_id = message.transfer_id
        if transfer_id in self._ended:
            return [Send(peer, Gone(transfer_id, self._ended[transfer_id]))]
        offer = self._offers.get(transfer_id)
        if offer is None:
            if sum(peer in other.parked for other in self._offers.values()) >= MAX_PARKED:
                return [Send(peer, Gone(transfer_id, f"more than {MAX_PARKED} questions are open"))]
            offer = self._offers[transfer_id] = _Offer()
        if offer.ending is not None:
            return [Send(peer, Gone(transfer_id, offer.ending))]
        self._renew(offer, now)
        previous = offer.parked.pop(peer, None)
        if answer := self._answer(peer, offer, message):
            return [answer]
        offer.parked[peer] = message
        return [Send(peer, Ready(transfer_id, message.beyond, [], b""))] if previous is not None else []

    def read(self, peer: int, message: Read, now: float) -> list[Output]:
        """A puller wants bytes."""
        transfer_id = message.transfer_id
        offer = self._offers.get(transfer_id)
        last = message.first + message.count
        if offer is None or offer.ending is not None:
            ended = offer.ending if offer is not None else self._ended.get(transfer_id)
            return [Send(peer, Gone(transfer_id, ended or "there is no such transfer"))]
        if message.count > self._max_read_places or last > len(offer.checksums):
            return [Send(peer, Gone(transfer_id, f"places {message.first} to {last} cannot be read at once"))]
        self._renew(offer, now)
        offer.num_reads += 1
        offer.readers.add(peer)
        return [SendBlocks(peer, transfer_id, message.read_id, offer.blocks[message.first : last])]

    def sent(self, transfer_id: str, now: float) -> list[Output]:
        """A `SendBlocks` is over, however it ended."""
        offer = self._offers[transfer_id]
        offer.num_reads -= 1
        if offer.ending is None:
            self._renew(offer, now)
        return self._finish(transfer_id, offer)

    def done(self, peer: int, message: Done, now: float) -> list[Output]:
        """A puller reads nothing more. That ends the transfer."""
        offer = self._offers.get(message.transfer_id)
        if offer is None:
            return []
        offer.parked.pop(peer, None)
        offer.readers.discard(peer)
        if not offer.is_known:
            del self._offers[message.transfer_id]
            self._unwanted.add(message.transfer_id)
            self._remember(message.transfer_id, "its puller does not want it any more")
            return []
        if offer.ending is not None:
            return self._finish(message.transfer_id, offer)
        return self._end(message.transfer_id, offer, "its puller released it", now)

    def lost(self, peer: int) -> None:
        """A connection has ended. Who read over it may still read what it maps: the lease decides."""
        for transfer_id, offer in list(self._offers.items()):
            if offer.parked.pop(peer, None) and not offer.is_known and not offer.parked:
                del self._offers[transfer_id]

    def tick(self, now: float) -> list[Output]:
        """End leases that have run out."""
        outputs: list[Output] = []
        for transfer_id, offer in list(self._offers.items()):
            if offer.deadline is None or now < offer.deadline:
                continue
            if not offer.is_known:
                del self._offers[transfer_id]
            elif offer.ending is not None:
                offer.was_expired = offer.was_expired or bool(offer.readers)
                offer.readers.clear()
                offer.deadline = None  # what is left are reads of ours, and they end
                outputs += self._finish(transfer_id, offer)
            elif offer.num_reads:  # a read of ours is under way: that is a contact
                self._renew(offer, now)
            else:
                offer.was_expired = True
                offer.readers.clear()
                outputs += self._end(transfer_id, offer, f"nobody asked for {self._lease:g} s: its lease is over", now)
        return outputs

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do."""
        return min((offer.deadline for offer in self._offers.values() if offer.deadline is not None), default=None)

    @property
    def num_offers(self) -> int:
        return len(self._offers)

    def _renew(self, offer: _Offer, now: float) -> None:
        if offer.payload is not None or not offer.is_known:
            offer.deadline = now + self._lease

    def _answer(self, peer: int, offer: _Offer, ask: Ask) -> Send | None:
        """What is news to the asker; None if nothing is."""
        last = min(len(offer.checksums), ask.beyond + MAX_PLACES)
        is_end = offer.payload is not None and last == len(offer.checksums) == len(offer.blocks)
        if last <= ask.beyond and (not is_end or ask.has_end):
            return None
        blocks = offer.blocks[ask.beyond : last]
        if blocks:
            offer.readers.add(peer)
        payload = offer.payload if is_end and not ask.has_end else None
        ready = Ready(
            ask.transfer_id,
            ask.beyond,
            blocks,
            b"".join(offer.checksums[ask.beyond : last]),
            len(offer.blocks) if is_end else None,
            len(payload) if payload is not None else None,
        )
        return Send(peer, ready, payload or b"")

    def _news(self, transfer_id: str, offer: _Offer) -> list[Output]:
        """Answers to those who waited for what is there now."""
        outputs: list[Output] = []
        for peer, ask in list(offer.parked.items()):
            if answer := self._answer(peer, offer, ask):
                del offer.parked[peer]
                outputs.append(answer)
        return outputs

    def _end(self, transfer_id: str, offer: _Offer, reason: str, now: float) -> list[Output]:
        offer.ending = reason
        offer.deadline = now + self._lease
        peers = dict.fromkeys([*offer.parked, *sorted(offer.readers)])
        offer.parked.clear()
        outputs: list[Output] = [Send(peer, Gone(transfer_id, reason)) for peer in peers]
        return outputs + self._finish(transfer_id, offer)

    def _finish(self, transfer_id: str, offer: _Offer) -> list[Output]:
        if offer.ending is None or offer.num_reads or offer.readers:
            return []
        del self._offers[transfer_id]
        self._remember(transfer_id, offer.ending)
        return [Released(transfer_id, offer.was_expired)]

    def _remember(self, transfer_id: str, reason: str) -> None:
        self._ended[transfer_id] = reason
        while len(self._ended) > MAX_REMEMBERED:
            self._unwanted.discard(self._ended.popitem(last=False)[0])
