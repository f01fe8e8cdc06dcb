"""A request that one engine begins and another ends: its KV blocks, and its first tokens, go from one to the other.

    prefill engine    prompt, chunk by chunk ──► first token of each choice
                          │ filled blocks            │ tokens
                          ▼                          ▼
    decode engine     reserved blocks ─────────► choices run on, from their second token

Neither engine ever waits for the other inside a step. Whatever fails between them, the decode engine computes the
prompt itself: that costs time and changes nothing else.
"""

import contextlib
import hashlib
import logging
import select
from array import array
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import msgspec

from dispec.engine.scheduling.scheduler import Scheduler
from dispec.engine.scheduling.scheduler_output import TokenOutput, last_token_output
from dispec.engine.scheduling.sequence import Sequence, Status, TokenLogprobs
from dispec.engine.transfer.interface import Event, Pulled, PullFailed, Released, RemoteBlocks

log = logging.getLogger("dispec")


@runtime_checkable
class Transfers(Protocol):
    """What moves the blocks: `engine.transfer.transfers.Transfers`, which says what each of these does."""

    def publish(self, transfer_id: str, blocks: Series[int], *, payload: bytes | None = None) -> None: ...

    def withdraw(self, transfer_id: str, reason: str) -> None: ...

    def pull(self, remote_blocks: RemoteBlocks, skip: int, blocks: Series[int]) -> None: ...

    def release(self, transfer_id: str) -> None: ...

    def poll(self) -> list[Event]: ...

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class FirstToken(msgspec.Struct, array_like=True):
    """Of a choice. logprobs: where asked for."""

    token_id: int
    logprobs: TokenLogprobs | None


class Payload(msgspec.Struct, array_like=True):
    """What goes along with the blocks. prompt: digest of the tokens that they hold; tokens: of each choice."""

    prompt: bytes
    tokens: list[FirstToken]
    prompt_logprobs: list[TokenLogprobs]
    num_cached_tokens: int


@dataclass
class Totals:
    """Since the start, by the names of a `StepRecord`'s fields, which has what a step added."""

    num_received_prompts: int = 0
    num_failed_receives: int = 0
    num_received_blocks: int = 0
    num_sent_prompts: int = 0
    num_sent_blocks: int = 0


@dataclass(eq=False)
class _Departure:
    """A prompt that is computed here for another engine."""

    choices: tuple[Sequence, ...]
    pinned_blocks: list[int]
    num_published: int = 0
    has_all: bool = False


@dataclass(eq=False)
class _Arrival:
    """A request whose prompt another engine computes.

    ticket: of its blocks; None if there are none, or none any more. is_pulling: they are on their way;
        num_pulled: how many.
    outputs: the tokens that each choice has already, None for a choice that has ended; None until known.
    awaits_outputs: they will be told; otherwise they come with the blocks, and are news here.
    """

    choices: tuple[Sequence, ...]
    remote_blocks: RemoteBlocks | None
    awaits_outputs: bool
    outputs: list[list[int] | None] | None = None
    is_pulling: bool = False
    num_pulled: int = 0
    is_filled: bool = False
    payload: Payload | None = field(default=None, repr=False)

    @property
    def first(self) -> Sequence:
        return self.choices[0]

    @property
    def is_wanted(self) -> bool:
        return any(choice.status is not Status.FINISHED for choice in self.choices)

    @property
    def is_ready(self) -> bool:
        """Whether nothing more is to be waited for."""
        if self.remote_blocks is not None and not self.is_filled:
            return False
        return self.outputs is not None or not self.awaits_outputs


class KVConnector:
    """Of one engine. Call `advance` before each step and `publish` after it, and `advance` whenever `fileno` is
    readable; neither blocks."""

    def __init__(self, scheduler: Scheduler, transfers: Transfers | None) -> None:
        self.transfers = transfers
        self._scheduler = scheduler
        self._departures: dict[str, _Departure] = {}
        self._arrivals: list[_Arrival] = []
        self._outputs: list[TokenOutput] = []
        self.totals = Totals()

    @property
    def has_outputs(self) -> bool:
        """Whether `take_outputs` has something to give."""
        return bool(self._outputs)

    @property
    def num_departing(self) -> int:
        """Prompts whose blocks are kept for other engines."""
        return len(self._departures)

    def fileno(self) -> int | None:
        """Readable while `advance` has something to take; None where nothing can come."""
        return None if self.transfers is None else self.transfers.fileno()

    def wait(self, seconds: float) -> None:
        """Until there is something to take, or not longer than that."""
        if self.transfers is not None:
            select.select([self.transfers], [], [], seconds)

    def send(self, choices: tuple[Sequence, ...], transfer_id: str) -> None:
        """Publish the prompt of a request that was just queued, under that id. Raises ValueError if it is taken."""
        if transfer_id in self._departures:
            raise ValueError(f"transfer_id {transfer_id!r} is under way already")
        self._departures[transfer_id] = _Departure(choices, self._scheduler.kv_cache.pin(choices[0]))

    def expect(
        self, choices: tuple[Sequence, ...], remote_blocks: RemoteBlocks | None, *, awaits_outputs: bool
    ) -> None:
        """Take a request that is not to be queued yet. Raises ValueError as `Scheduler.add`."""
        self._scheduler.add_remote(choices)
        self._arrivals.append(_Arrival(choices, remote_blocks, awaits_outputs))

    def resume(self, first: Sequence, outputs: list[list[int] | None]) -> None:
        """Tell what each choice of an expected request has generated so far; None ends a choice."""
        arrival = next((arrival for arrival in self._arrivals if arrival.first is first), None)
        if arrival is None or arrival.outputs is not None:
            return  # it ended while the news was on its way
        for choice, tokens in zip(arrival.choices, outputs, strict=True):
            if tokens is None:
                self._scheduler.finish(choice, "abort")
        arrival.outputs = outputs

    def advance(self) -> None:
        """Take what has arrived, and ask for what there is room for."""
        if self.transfers is not None:
            for event in self.transfers.poll():
                self._take(event)
        self.forget_unwanted()
        for arrival in list(self._arrivals):
            if arrival.remote_blocks is not None and not arrival.is_pulling and not arrival.is_filled:
                self._pull(arrival, arrival.remote_blocks)
            if arrival.is_wanted and arrival.is_ready:
                self._hand_over(arrival)

    def forget_unwanted(self) -> None:
        """Ask no more for what nobody wants any more."""
        for arrival in list(self._arrivals):
            if not arrival.is_wanted:
                self._give_up(arrival)

    def take_outputs(self) -> list[TokenOutput]:
        """The first tokens of requests that came with them."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def publish(self) -> None:
        """Tell of the blocks that the last step has filled, and of the tokens once all are there."""
        for transfer_id, departure in list(self._departures.items()):
            assert self.transfers is not None
            if departure.has_all:
                continue
            if any(not choice.num_output_tokens and choice.status is Status.FINISHED for choice in departure.choices):
                departure.has_all = True
                if not departure.num_published:  # nobody knows of it, so nobody will say that it is over
                    del self._departures[transfer_id]
                    self._let_go(departure)
                self.transfers.withdraw(transfer_id, "the request was ended before its first token")
                continue
            kept = departure.pinned_blocks
            new = kept[departure.num_published :]
            departure.has_all = all(choice.num_output_tokens for choice in departure.choices)
            if departure.has_all:
                self.transfers.publish(transfer_id, new, payload=msgspec.msgpack.encode(_payload(departure.choices)))
            elif new:
                self.transfers.publish(transfer_id, new)
            departure.num_published = len(kept)
            self.totals.num_sent_prompts += departure.has_all
            self.totals.num_sent_blocks += len(new)

    def close(self) -> None:
        if self.transfers is not None:
            self.transfers.close()

    def _take(self, event: Event) -> None:
        if isinstance(event, Released):
            departure = self._departures.pop(event.transfer_id, None)
            if departure is not None:
                if event.was_expired:
                    log.warning("transfer %s: nobody asked for it any more", event.transfer_id)
                self._let_go(departure)
            return
        arrival = next(
            (
                one
                for one in self._arrivals
                if one.is_pulling and one.remote_blocks and one.remote_blocks.transfer_id == event.transfer_id
            ),
            None,
        )
        if arrival is None:
            return
        arrival.is_pulling = False
        problem = event.reason if isinstance(event, PullFailed) else self._read(arrival, event)
        if problem is None:
            arrival.is_filled = True
            self.totals.num_received_prompts += 1
            self.totals.num_received_blocks += arrival.num_pulled
        else:
            self._fail(arrival, event.transfer_id, problem)

    def _fail(self, arrival: _Arrival, transfer_id: str, problem: str) -> None:
        """Nothing comes, and nothing is written to its blocks any more."""
        self._scheduler.kv_cache.free_remote(arrival.first)
        arrival.remote_blocks = None
        arrival.is_pulling = False
        self._release(transfer_id)
        if arrival.is_wanted:
            self.totals.num_failed_receives += 1
            log.warning("transfer %s failed (%s): the prompt is computed here", transfer_id, problem)

    def _let_go(self, departure: _Departure) -> None:
        """Nobody reads its blocks, and of those that are still to be filled nobody will."""
        self._scheduler.kv_cache.unpin(departure.choices[0])

    def _read(self, arrival: _Arrival, event: Pulled) -> str | None:
        """Take the payload. What is wrong with it, if something is."""
        try:
            payload = msgspec.msgpack.decode(event.payload, type=Payload)
        except (msgspec.MsgspecError, ValueError) as error:
            return f"what came with the blocks cannot be read: {error}"
        if payload.prompt != _digest(arrival.first):
            return "the blocks are of another prompt"
        if len(payload.tokens) != len(arrival.choices):
            return f"it has {len(payload.tokens)} choices, the request {len(arrival.choices)}"
        arrival.payload = payload
        return None

    def _pull(self, arrival: _Arrival, remote_blocks: RemoteBlocks) -> None:
        reserved = self._scheduler.reserve_remote(arrival.first)
        if reserved is not None:
            assert self.transfers is not None
            num_found, table = reserved
            arrival.is_pulling, arrival.num_pulled = True, len(table) - num_found
            try:
                self.transfers.pull(remote_blocks, num_found, table[num_found:])
            except ValueError as error:  # two requests name one transfer
                self._fail(arrival, remote_blocks.transfer_id, str(error))

    def _give_up(self, arrival: _Arrival) -> None:
        """Nobody wants it any more; its blocks are free once nobody writes to them."""
        if arrival.remote_blocks is not None and self.transfers is not None:
            if not (arrival.is_pulling or arrival.is_filled):
                with contextlib.suppress(ValueError):
                    self.transfers.pull(
                        arrival.remote_blocks, 0, []
                    )  # the other side need not wait for its lease to end
            self.transfers.release(arrival.remote_blocks.transfer_id)
        if not arrival.is_pulling:
            self._scheduler.kv_cache.free_remote(arrival.first)
            self._arrivals.remove(arrival)

    def _hand_over(self, arrival: _Arrival) -> None:
        self._arrivals.remove(arrival)
        outputs, payload = arrival.outputs, arrival.payload
        if outputs is not None:
            for choice, tokens in zip(arrival.choices, outputs, strict=True):
                if choice.status is not Status.FINISHED:
                    for token_id in tokens or ():
                        choice.append(token_id)
        elif payload is not None:
            arrival.first.prompt_logprobs = payload.prompt_logprobs
            for choice, token in zip(arrival.choices, payload.tokens, strict=True):
                choice.num_cached_tokens = payload.num_cached_tokens
                if choice.status is not Status.FINISHED:
                    choice.append(token.token_id)
                    if token.logprobs is not None:
                        choice.logprobs.append(token.logprobs)
                    self._outputs.append(last_token_output(choice, token.logprobs))
        for choice in arrival.choices:
            if choice.status is not Status.FINISHED and choice.finish_reason is not None:
                self._scheduler.finish(choice, choice.finish_reason)
        going_on = [choice for choice in arrival.choices if choice.status is not Status.FINISHED]
        if arrival.remote_blocks is None:
            self._scheduler.recompute(going_on)
            return
        self._scheduler.start_remote(arrival.first, going_on)
        if payload is not None and outputs is None:
            for choice in arrival.choices:
                choice.num_cached_tokens = payload.num_cached_tokens
        self._release(arrival.remote_blocks.transfer_id)

    def _release(self, transfer_id: str) -> None:
        """Tell the other side that its blocks are not needed any more."""
        if self.transfers is not None:
            self.transfers.release(transfer_id)


def _payload(choices: tuple[Sequence, ...]) -> Payload:
    first = choices[0]
    tokens = [
        FirstToken(choice.output_token_ids[0], choice.logprobs[0] if choice.logprobs else None) for choice in choices
    ]
    return Payload(_digest(first), tokens, first.prompt_logprobs, first.num_cached_tokens or 0)


def _digest(sequence: Sequence) -> bytes:
    prompt: Series[int] = sequence.token_ids[: sequence.num_prompt_tokens]
    return hashlib.blake2b(array("i", prompt).tobytes(), digest_size=16).digest()
