"""KV connector of an engine: it sends prompts that are computed here and receives those that other engines compute.

    prefill engine    prompt, chunk by chunk ──► first token of each choice
                          │ filled blocks            │ tokens
                          ▼                          ▼
    decode engine     reserved blocks ─────────► choices go on from their second token

Neither engine waits for the other inside a step. If anything between them fails, the decode engine computes the prompt
itself, which costs time and changes nothing else.
"""

import contextlib
import hashlib
import logging
import select
from array import array
from collections.abc import Sequence as Series
from dataclasses import dataclass

import msgspec

from dispec.engine.scheduling.scheduler import Scheduler
from dispec.engine.scheduling.scheduler_output import append_sampled, restore
from dispec.engine.scheduling.sequence import Sequence, Status
from dispec.engine.scheduling.token_output import TokenLogprobs, TokenOutput
from dispec.engine.transfer.interface import Event, Pulled, PullFailed, Released, RemoteBlocks
from dispec.engine.transfer.transfer_engine import TransferEngine

log = logging.getLogger("dispec")


class Payload(msgspec.Struct, array_like=True):
    """Sent after a prompt's blocks. prompt: digest of its tokens. tokens: the first one of each choice."""

    prompt: bytes
    tokens: list[tuple[int, TokenLogprobs | None]]
    prompt_logprobs: list[TokenLogprobs]
    num_cached_tokens: int


@dataclass
class TransferTotals:
    """Counts since the start, under the names of the `StepRecord` fields that hold a step's share."""

    num_received_prompts: int = 0
    num_failed_receives: int = 0
    num_received_blocks: int = 0
    num_sent_prompts: int = 0
    num_sent_blocks: int = 0


@dataclass(eq=False)
class _SendState:
    """A prompt that is computed here for another engine. pinned_blocks: grows as the prompt is computed."""

    choices: tuple[Sequence, ...]
    pinned_blocks: list[int]
    num_published: int = 0
    is_complete: bool = False


@dataclass(eq=False)
class _ReceiveState:
    """A request with a prompt that another engine computes.

    remote_blocks: None without a transfer, or after it failed. num_pulled: blocks that the pull brings.
    awaits_outputs: `resume` tells the tokens generated so far; otherwise they come with the blocks and are new here.
    outputs: those tokens of each choice, None for a choice that has ended; None until told.
    """

    choices: tuple[Sequence, ...]
    remote_blocks: RemoteBlocks | None
    awaits_outputs: bool
    outputs: list[list[int] | None] | None = None
    is_pulling: bool = False
    num_pulled: int = 0
    payload: Payload | None = None

    @property
    def first(self) -> Sequence:
        return self.choices[0]

    @property
    def running(self) -> list[Sequence]:
        """Choices that have not ended."""
        return [choice for choice in self.choices if choice.status is not Status.FINISHED]

    @property
    def needs_blocks(self) -> bool:
        return self.remote_blocks is not None and self.payload is None

    @property
    def is_ready(self) -> bool:
        return not self.needs_blocks and (self.outputs is not None or not self.awaits_outputs)


class KVConnector:
    """Moves the KV blocks of one engine's requests.

    Call `poll` before each step and whenever `fileno` is readable, `publish` after each step and `request_finished`
    when a request ends. None of them blocks.
    """

    def __init__(self, scheduler: Scheduler, transfer_engine: TransferEngine | None) -> None:
        self.transfer_engine = transfer_engine
        self.totals = TransferTotals()
        self._scheduler = scheduler
        self._sends: dict[str, _SendState] = {}
        self._receives: list[_ReceiveState] = []
        self._outputs: list[TokenOutput] = []

    @property
    def has_outputs(self) -> bool:
        """Whether `take_outputs` has something to return."""
        return bool(self._outputs)

    @property
    def num_sends(self) -> int:
        """Number of prompts with blocks pinned for other engines."""
        return len(self._sends)

    def fileno(self) -> int | None:
        """Return a descriptor that is readable while `poll` has work; None without KV transfer."""
        return None if self.transfer_engine is None else self.transfer_engine.fileno()

    def wait(self, seconds: float) -> None:
        """Wait until `poll` has work, at most `seconds`."""
        if self.transfer_engine is not None:
            select.select([self.transfer_engine], [], [], seconds)

    def start_send(self, choices: tuple[Sequence, ...], transfer_id: str) -> None:
        """Publish the prompt of a request that was just queued. Raises ValueError if the id is in use."""
        if transfer_id in self._sends:
            raise ValueError(f"transfer_id {transfer_id!r} is in use")
        self._sends[transfer_id] = _SendState(choices, self._scheduler.kv_cache.pin(choices[0]))

    def start_receive(
        self, choices: tuple[Sequence, ...], remote_blocks: RemoteBlocks | None, *, awaits_outputs: bool
    ) -> None:
        """Take a request that waits for its blocks, its outputs, or both. Raises ValueError as `Scheduler.add`."""
        self._scheduler.add_remote(choices)
        self._receives.append(_ReceiveState(choices, remote_blocks, awaits_outputs))

    def resume(self, first: Sequence, outputs: list[list[int] | None]) -> None:
        """Set the tokens of each choice of a request with `awaits_outputs`, generated elsewhere; None ends a choice."""
        state = next((state for state in self._receives if state.first is first), None)
        if state is None or state.outputs is not None:
            return  # the request has ended meanwhile
        for choice, tokens in zip(state.choices, outputs, strict=True):
            if tokens is None:
                self._scheduler.finish(choice, "abort")
        state.outputs = outputs

    def poll(self) -> None:
        """Handle events of the transfer engine, begin pulls for which there is room, and start requests."""
        if self.transfer_engine is not None:
            for event in self.transfer_engine.poll():
                self._handle(event)
        self._cancel_finished()
        for state in list(self._receives):
            if state.needs_blocks and not state.is_pulling:
                self._pull(state)
            if state.running and state.is_ready:
                self._start(state)

    def request_finished(self) -> None:
        """Cancel transfers of requests that have ended."""
        self._cancel_finished()
        self.publish()

    def take_outputs(self) -> list[TokenOutput]:
        """Return the first tokens that came with blocks since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def publish(self) -> None:
        """Publish the blocks that the last step has filled, and with the last ones the first tokens."""
        for transfer_id, state in list(self._sends.items()):
            if state.is_complete:
                continue
            assert self.transfer_engine is not None
            if any(not choice.num_output_tokens and choice.status is Status.FINISHED for choice in state.choices):
                state.is_complete = True
                if not state.num_published:  # no reader can hold the blocks
                    self._finish_send(transfer_id)
                self.transfer_engine.withdraw(transfer_id, "the request was ended before its first token")
                continue
            new = state.pinned_blocks[state.num_published :]
            state.is_complete = all(choice.num_output_tokens for choice in state.choices)
            if new or state.is_complete:
                payload = _payload(state.choices) if state.is_complete else None
                self.transfer_engine.publish(transfer_id, new, payload=payload)
            state.num_published += len(new)
            self.totals.num_sent_prompts += state.is_complete
            self.totals.num_sent_blocks += len(new)

    def close(self) -> None:
        if self.transfer_engine is not None:
            self.transfer_engine.close()

    def _handle(self, event: Event) -> None:
        if isinstance(event, Released):
            if event.transfer_id in self._sends:
                if event.was_expired:
                    log.warning("transfer %s: its lease ran out before it was pulled", event.transfer_id)
                self._finish_send(event.transfer_id)
            return
        for state in self._receives:
            if state.is_pulling and state.remote_blocks and state.remote_blocks.transfer_id == event.transfer_id:
                self._end_pull(state, event)
                return

    def _finish_send(self, transfer_id: str) -> None:
        """Unpin a prompt's blocks: nothing reads them any more."""
        self._scheduler.kv_cache.unpin(self._sends.pop(transfer_id).choices[0])

    def _pull(self, state: _ReceiveState) -> None:
        """Begin a pull if there are enough free blocks."""
        reserved = self._scheduler.reserve_remote(state.first)
        if reserved is None:
            return
        assert self.transfer_engine is not None
        assert state.remote_blocks is not None
        num_cached, table = reserved
        state.is_pulling, state.num_pulled = True, len(table) - num_cached
        try:
            self.transfer_engine.pull(state.remote_blocks, num_cached, table[num_cached:])
        except ValueError as error:  # two requests name one transfer
            self._end_pull(state, PullFailed(state.remote_blocks.transfer_id, str(error)))

    def _end_pull(self, state: _ReceiveState, event: Pulled | PullFailed) -> None:
        state.is_pulling = False
        if isinstance(event, PullFailed):
            self._fail(state, event.transfer_id, event.reason)
            return
        try:
            state.payload = _decode_payload(event.payload, state.choices)
        except ValueError as error:
            self._fail(state, event.transfer_id, str(error))
            return
        self.totals.num_received_prompts += 1
        self.totals.num_received_blocks += state.num_pulled

    def _fail(self, state: _ReceiveState, transfer_id: str, reason: str) -> None:
        """Give up a request's transfer. Nothing writes to its blocks any more."""
        self._scheduler.kv_cache.free_remote(state.first)
        state.remote_blocks = None
        self._release(transfer_id)
        if state.running:
            self.totals.num_failed_receives += 1
            log.warning("transfer %s failed (%s): the prompt is computed here", transfer_id, reason)

    def _cancel_finished(self) -> None:
        for state in list(self._receives):
            if not state.running:
                self._cancel(state)

    def _cancel(self, state: _ReceiveState) -> None:
        """Cancel the pull of a request that has ended. Its blocks are freed once nothing writes to them."""
        if state.remote_blocks is not None and self.transfer_engine is not None:
            if state.needs_blocks and not state.is_pulling:
                with contextlib.suppress(ValueError):  # pulled and cancelled, so that the source need not wait
                    self.transfer_engine.pull(state.remote_blocks, 0, [])
            self._release(state.remote_blocks.transfer_id)
        if not state.is_pulling:
            self._scheduler.kv_cache.free_remote(state.first)
            self._receives.remove(state)

    def _start(self, state: _ReceiveState) -> None:
        """Let a request's choices run, from the received blocks or by computing the prompt here."""
        self._receives.remove(state)
        outputs, payload = state.outputs, state.payload
        if outputs is not None:
            for choice, tokens in zip(state.choices, outputs, strict=True):
                if choice.status is not Status.FINISHED:
                    self._outputs += restore(choice, tokens or ())
        elif payload is not None:
            state.first.prompt_logprobs = payload.prompt_logprobs
            for choice, (token_id, logprobs) in zip(state.choices, payload.tokens, strict=True):
                choice.num_cached_tokens = payload.num_cached_tokens
                if choice.status is not Status.FINISHED:
                    self._outputs += append_sampled(choice, token_id, logprobs)
        for choice in state.running:
            if choice.finish_reason is not None:
                self._scheduler.finish(choice, choice.finish_reason)
        if state.remote_blocks is None:
            self._scheduler.recompute(state.running)
            return
        self._scheduler.start_remote(state.first, state.running)
        self._release(state.remote_blocks.transfer_id)

    def _release(self, transfer_id: str) -> None:
        """Tell the source that its blocks are no longer needed."""
        if self.transfer_engine is not None:
            self.transfer_engine.release(transfer_id)


def _payload(choices: tuple[Sequence, ...]) -> bytes:
    first = choices[0]
    tokens = [(choice.output_token_ids[0], choice.logprobs[0] if choice.logprobs else None) for choice in choices]
    payload = Payload(_digest(first), tokens, first.prompt_logprobs, first.num_cached_tokens or 0)
    return msgspec.msgpack.encode(payload)


def _decode_payload(encoded: bytes, choices: tuple[Sequence, ...]) -> Payload:
    """Decode the payload of a request's blocks. Raises ValueError if it is invalid or of another request."""
    payload = msgspec.msgpack.decode(encoded, type=Payload)
    if payload.prompt != _digest(choices[0]):
        raise ValueError("the blocks are of another prompt")
    if len(payload.tokens) != len(choices):
        raise ValueError(f"the payload has {len(payload.tokens)} choices, the request {len(choices)}")
    return payload


def _digest(sequence: Sequence) -> bytes:
    prompt: Series[int] = sequence.token_ids[: sequence.num_prompt_tokens]
    return hashlib.blake2b(array("i", prompt).tobytes(), digest_size=16).digest()
