"""The source's side of the protocol as a state machine: no threads, no sockets, no clock of its own.

A transfer's blocks may be read from when their checksum is known until the transfer ends: its puller is done, the
engine withdraws it, or its lease runs out. It is released once it has ended and nothing reads it any more. A read over
a connection counts until it is sent, a checksum until it is computed. A puller that reads by itself, from memory that
it maps, counts from the first answer that names blocks until it is done or the lease ends.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dispec.engine.transfer.interface import MAX_PAYLOAD_BYTES, Released
from dispec.engine.transfer.messages import MAX_BLOCKS, BlocksReady, PullDone, QueryBlocks, ReadBlocks, TransferEnded

MAX_REMEMBERED = 65536  # ended transfers, so that a late query gets the reason


@dataclass(frozen=True)
class Send:
    """Send a message to a puller."""

    peer: int
    message: BlocksReady | TransferEnded


@dataclass(frozen=True)
class SendBlocks:
    """Send the bytes of blocks to a puller. `Sender.sent` must be called when they are sent or cannot be."""

    peer: int
    transfer_id: str
    read_id: int
    blocks: list[int]


Output = Send | SendBlocks | Released


@dataclass
class _Transfer:
    """deadline: end of the lease; None while the engine may still publish. queries: those that wait for blocks."""

    is_published: bool = False
    blocks: list[int] = field(default_factory=list)
    checksums: list[bytes] = field(default_factory=list)
    payload: bytes | None = None
    deadline: float | None = None
    end_reason: str | None = None
    was_expired: bool = False
    num_reads: int = 0
    readers: set[int] = field(default_factory=set)
    queries: dict[int, QueryBlocks] = field(default_factory=dict)


class Sender:
    """All transfers that this process is the source of. Times are seconds of any monotonic clock."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease = lease_seconds
        self._transfers: dict[str, _Transfer] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._cancelled: set[str] = set()  # those of `_ended` that their puller cancelled before anything was published

    def publish(self, transfer_id: str, blocks: Sequence[int], payload: bytes | None, now: float) -> list[Output]:
        """Add blocks; a payload completes the transfer. The checksum of each block must follow by `checked`.

        Raises ValueError if the transfer is complete or the payload too long. Blocks of a transfer that has ended are
        not read; its `Released`, due or polled already, covers them.
        """
        if payload is not None and len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"payload has {len(payload)} bytes, must have at most {MAX_PAYLOAD_BYTES}")
        if transfer_id in self._cancelled:
            self._cancelled.discard(transfer_id)
            return [Released(transfer_id, was_expired=False)]
        if transfer_id in self._ended:
            return []
        transfer = self._transfers.setdefault(transfer_id, _Transfer())
        if transfer.payload is not None:
            raise ValueError(f"transfer {transfer_id!r} is complete, nothing more can be published")
        transfer.is_published = True
        transfer.payload = payload
        transfer.blocks.extend(blocks)
        is_over = payload is not None or transfer.end_reason is not None
        transfer.deadline = now + self._lease if is_over else None
        if transfer.end_reason is not None:
            return self._release(transfer_id, transfer)
        return self._answer_queries(transfer)

    def start_check(self, transfer_id: str) -> bool:
        """Return whether the next blocks' checksums are still needed. If so, `checked` must follow."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.end_reason is not None:
            return False
        transfer.num_reads += 1
        return True

    def checked(self, transfer_id: str, checksums: Sequence[bytes] | None, now: float) -> list[Output]:
        """Take the checksums of the first blocks that have none; None if they could not be computed."""
        transfer = self._transfers[transfer_id]
        transfer.num_reads -= 1
        if transfer.end_reason is not None:
            return self._release(transfer_id, transfer)
        if checksums is None:
            return self._end(transfer_id, transfer, "the source could not read its blocks", now)
        transfer.checksums += checksums
        return self._answer_queries(transfer)

    def withdraw(self, transfer_id: str, reason: str, now: float) -> list[Output]:
        """End a transfer from this side, also one without blocks: its puller may be waiting.

        `Released` follows once for each transfer; one that has ended stays as it is.
        """
        if transfer_id in self._ended:
            return self.publish(transfer_id, (), None, now)
        transfer = self._transfers.setdefault(transfer_id, _Transfer())
        if transfer.end_reason is not None:
            return []
        transfer.is_published = True
        return self._end(transfer_id, transfer, reason, now)

    def receive(self, peer: int, message: QueryBlocks | ReadBlocks | PullDone, now: float) -> list[Output]:
        """Handle a puller's message. A query or a read renews the lease."""
        match message:
            case QueryBlocks():
                return self._query(peer, message, now)
            case ReadBlocks():
                return self._read(peer, message, now)
            case PullDone(transfer_id):
                return self._pull_done(peer, transfer_id, now)

    def sent(self, transfer_id: str, now: float) -> list[Output]:
        """Note that a `SendBlocks` is over, sent or not."""
        transfer = self._transfers[transfer_id]
        transfer.num_reads -= 1
        if transfer.end_reason is None:
            self._renew(transfer, now)
        return self._release(transfer_id, transfer)

    def disconnected(self, peer: int, now: float) -> list[Output]:
        """Drop a connection's queries. Its puller may still read mapped memory, until the lease ends."""
        for transfer_id, transfer in list(self._transfers.items()):
            if transfer.queries.pop(peer, None) and not transfer.is_published and not transfer.queries:
                del self._transfers[transfer_id]
        return []

    def tick(self, now: float) -> list[Output]:
        """End leases that have run out."""
        outputs: list[Output] = []
        for transfer_id, transfer in list(self._transfers.items()):
            if transfer.deadline is None or now < transfer.deadline:
                continue
            if not transfer.is_published:
                del self._transfers[transfer_id]
            elif transfer.end_reason is not None:
                transfer.was_expired = transfer.was_expired or bool(transfer.readers)
                transfer.readers.clear()
                transfer.deadline = None  # only reads of this process are left, and they end
                outputs += self._release(transfer_id, transfer)
            elif transfer.num_reads:  # its puller is being served
                self._renew(transfer, now)
            else:
                transfer.was_expired = True
                transfer.readers.clear()
                reason = f"its lease of {self._lease:g} s ran out without a message from its puller"
                outputs += self._end(transfer_id, transfer, reason, now)
        return outputs

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do."""
        return min((one.deadline for one in self._transfers.values() if one.deadline is not None), default=None)

    @property
    def num_transfers(self) -> int:
        return len(self._transfers)

    def _query(self, peer: int, query: QueryBlocks, now: float) -> list[Output]:
        transfer_id = query.transfer_id
        if transfer_id in self._ended:
            return [Send(peer, TransferEnded(transfer_id, self._ended[transfer_id]))]
        transfer = self._transfers.setdefault(transfer_id, _Transfer())
        if transfer.end_reason is not None:
            return [Send(peer, TransferEnded(transfer_id, transfer.end_reason))]
        self._renew(transfer, now)
        was_waiting = transfer.queries.pop(peer, None) is not None
        if answer := self._answer(peer, transfer, query):
            return [answer]
        transfer.queries[peer] = query
        return [Send(peer, BlocksReady(transfer_id, query.first))] if was_waiting else []

    def _read(self, peer: int, read: ReadBlocks, now: float) -> list[Output]:
        transfer = self._transfers.get(read.transfer_id)
        last = read.first + read.count
        if transfer is None:
            problem = self._ended.get(read.transfer_id, "there is no such transfer")
        elif transfer.end_reason is not None:
            problem = transfer.end_reason
        elif last > len(transfer.checksums):
            problem = f"blocks {read.first} to {last} are not ready"
        else:
            self._renew(transfer, now)
            transfer.num_reads += 1
            transfer.readers.add(peer)
            return [SendBlocks(peer, read.transfer_id, read.read_id, transfer.blocks[read.first : last])]
        return [Send(peer, TransferEnded(read.transfer_id, problem))]

    def _pull_done(self, peer: int, transfer_id: str, now: float) -> list[Output]:
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return []
        transfer.queries.pop(peer, None)
        transfer.readers.discard(peer)
        if not transfer.is_published:
            del self._transfers[transfer_id]
            self._cancelled.add(transfer_id)
            self._remember(transfer_id, "its puller cancelled it")
            return []
        if transfer.end_reason is not None:
            return self._release(transfer_id, transfer)
        return self._end(transfer_id, transfer, "its puller released it", now)

    def _renew(self, transfer: _Transfer, now: float) -> None:
        if transfer.payload is not None or not transfer.is_published:
            transfer.deadline = now + self._lease

    def _answer(self, peer: int, transfer: _Transfer, query: QueryBlocks) -> Send | None:
        """Answer a query; None if nothing is ready that its puller does not know."""
        last = min(len(transfer.checksums), query.first + MAX_BLOCKS)
        is_end = transfer.payload is not None and last == len(transfer.checksums) == len(transfer.blocks)
        if last <= query.first and (not is_end or query.has_payload):
            return None
        blocks = transfer.blocks[query.first : last]
        if blocks:
            transfer.readers.add(peer)
        payload = transfer.payload if is_end and not query.has_payload else None
        ready = BlocksReady(
            query.transfer_id,
            query.first,
            blocks,
            transfer.checksums[query.first : last],
            len(transfer.blocks) if is_end else None,
            payload,
        )
        return Send(peer, ready)

    def _answer_queries(self, transfer: _Transfer) -> list[Output]:
        outputs: list[Output] = []
        for peer, query in list(transfer.queries.items()):
            if answer := self._answer(peer, transfer, query):
                del transfer.queries[peer]
                outputs.append(answer)
        return outputs

    def _end(self, transfer_id: str, transfer: _Transfer, reason: str, now: float) -> list[Output]:
        transfer.end_reason = reason
        transfer.deadline = now + self._lease
        peers = dict.fromkeys([*transfer.queries, *sorted(transfer.readers)])
        transfer.queries.clear()
        outputs: list[Output] = [Send(peer, TransferEnded(transfer_id, reason)) for peer in peers]
        return outputs + self._release(transfer_id, transfer)

    def _release(self, transfer_id: str, transfer: _Transfer) -> list[Output]:
        """Release a transfer that has ended, unless something still reads it."""
        if transfer.end_reason is None or transfer.num_reads or transfer.readers:
            return []
        del self._transfers[transfer_id]
        self._remember(transfer_id, transfer.end_reason)
        return [Released(transfer_id, transfer.was_expired)]

    def _remember(self, transfer_id: str, reason: str) -> None:
        self._ended[transfer_id] = reason
        while len(self._ended) > MAX_REMEMBERED:
            self._cancelled.discard(self._ended.popitem(last=False)[0])
