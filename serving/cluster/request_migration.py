"""A request that moves between engines: one computes the prompt, another continues, a third one if that fails.

The reader sees one stream. The server keeps every generated token, so an engine that continues a request gets them all,
and computes the KV blocks that it does not receive from another engine.
"""

import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from dispec.engine.scheduling.token_output import FinishReason
from dispec.engine.transfer.interface import RemoteBlocks
from dispec.serving.client.errors import EngineDied, Unavailable
from dispec.serving.client.process_client import ProcessClient
from dispec.serving.client.request_stream import ChoiceUpdate, GenerationRequest, RequestError, RequestStream

MAX_LOST_ENGINES = 5  # of one request; it fails with the next one


class SubRequest(RequestStream):
    """The part of a request that one engine serves. It reports to the `MigratedStream` and keeps no updates."""

    def __init__(self, whole: "MigratedStream", client: ProcessClient, *args: Any) -> None:
        super().__init__(*args)
        self.whole = whole
        self.client = client

    def start(self, now: float) -> None:
        super().start(now)
        self.whole.sub_request_started(now)

    def accept(self) -> None:
        self.is_accepted = True
        self.whole.sub_request_accepted()

    def take(self, update: ChoiceUpdate, now: float) -> None:
        self._record(update, now)
        self.whole.sub_request_updated(self, update, now)

    def end(self, reason: FinishReason, error: RequestError | None = None) -> None:
        self.error = error
        self.timing.finished = time.perf_counter()
        self.whole.sub_request_ended(self, reason, error)


class MigratedStream(RequestStream):
    """The updates of a request from all its engines.

    request: with a seed, so that all engines sample alike. choose: returns an engine to continue with, or None if none
    is ready. on_first_token, on_end: called once each.
    """

    def __init__(
        self,
        key: str,
        request: GenerationRequest,
        choose: Callable[[], ProcessClient | None],
        on_first_token: Callable[["MigratedStream"], None],
        on_end: Callable[["MigratedStream"], None],
    ) -> None:
        super().__init__(key, request, on_abort=lambda _: self._finish("abort"))
        self._choose = choose
        self._on_first_token = on_first_token
        self._on_end = on_end
        self._outputs: list[list[int]] = [[] for _ in range(request.params.n)]
        self._sub_requests: list[SubRequest] = []
        self._prefill: SubRequest | None = None
        self._decode: SubRequest | None = None
        self._num_lost_engines = 0

    @property
    def role(self) -> Literal["prefill", "decode"]:
        """The kind of engine that it needs now."""
        return "prefill" if self._prefill is not None else "decode"

    @property
    def engine(self) -> ProcessClient | None:
        """The engine that serves it now, or did last."""
        current = self._prefill or self._decode
        return current.client if current is not None else None

    @property
    def has_started_there(self) -> bool:
        """Whether that engine has scheduled it."""
        current = self._prefill or self._decode
        return current is not None and current.has_started

    def begin(self, prefill: ProcessClient, decode: ProcessClient, transfer_id: str) -> None:
        """Compute the prompt on one engine and continue with the other. Raises as `EngineClient.submit`."""
        self._prefill = self._submit(prefill, publish_as=transfer_id, is_continued=True)
        try:
            self._decode = self._submit(decode, is_resumed=True, pull=remote_blocks(prefill, transfer_id))
        except Exception:
            self._drop(self._prefill)
            raise

    def begin_alone(self, client: ProcessClient) -> None:
        """Serve the whole request with one engine."""
        self._decode = self._submit(client)

    # Called by the sub-requests

    def sub_request_accepted(self) -> None:
        if all(sub_request.is_accepted for sub_request in self._sub_requests):
            self.accept()

    def sub_request_started(self, now: float) -> None:
        if not self.has_started:
            self.start(now)

    def sub_request_updated(self, sub_request: SubRequest, update: ChoiceUpdate, now: float) -> None:
        if self.has_ended or sub_request not in self._sub_requests:
            return
        self._outputs[update.index] += update.token_ids
        is_first = self.timing.first_token is None
        self.take(update, now)
        if is_first:
            self._on_first_token(self)
        if self.has_ended:
            self._finish(None)
        elif sub_request is self._prefill and all(map(self._has_begun, range(len(self._outputs)))):
            self._drop(sub_request)
            self._move_to_decode()

    def sub_request_ended(self, sub_request: SubRequest, reason: FinishReason, error: RequestError | None) -> None:
        if self.has_ended or sub_request not in self._sub_requests:
            return
        self._sub_requests.remove(sub_request)
        if not isinstance(error, EngineDied):
            self._finish(reason, error)
            return
        self._num_lost_engines += 1
        if sub_request is self._prefill:
            if self._decode in self._sub_requests:
                self._move_to_decode()
            else:
                self._continue_elsewhere(error)
        elif self._prefill is None:
            self._continue_elsewhere(error)
        # A lost decode engine is replaced when the prefill engine has sent the first tokens.

    def _move_to_decode(self) -> None:
        """Tell the decode engine the tokens of the prefill engine."""
        self._prefill = None
        if self._decode is not None and self._decode in self._sub_requests:
            self._resume(self._decode)
        else:
            self._continue_elsewhere(EngineDied("the engine ended before the request did"))

    def _continue_elsewhere(self, error: EngineDied) -> None:
        """Continue from the known tokens on another engine; end with the error if there is none."""
        client = self._choose() if self._num_lost_engines < MAX_LOST_ENGINES else None
        if client is None:
            self._finish("error", error)
            return
        try:
            self._decode = self._submit(client, is_resumed=True)
        except (Unavailable, ValueError):
            self._finish("error", error)
            return
        self._resume(self._decode)

    def _resume(self, sub_request: SubRequest) -> None:
        reasons = self.finish_reasons
        outputs = [None if reason else tokens for reason, tokens in zip(reasons, self._outputs, strict=True)]
        sub_request.client.resume(sub_request, outputs)

    def _submit(self, client: ProcessClient, **changes: Any) -> SubRequest:
        def make_stream(*args: Any) -> SubRequest:
            made.append(SubRequest(self, client, *args))
            self._sub_requests += made
            return made[0]

        made: list[SubRequest] = []
        client.submit(msgspec.structs.replace(self.request, **changes), make_stream)
        return made[0]

    def _drop(self, sub_request: SubRequest) -> None:
        if sub_request in self._sub_requests:
            self._sub_requests.remove(sub_request)
        sub_request.abort()

    def _finish(self, reason: FinishReason | None, error: RequestError | None = None) -> None:
        """End the stream, unless its last token has ended it (`reason` None), and all sub-requests."""
        if reason is not None and not self.has_ended:
            self.end(reason, error)
        sub_requests, self._sub_requests = self._sub_requests, []
        for sub_request in sub_requests:
            sub_request.abort()
        on_end, self._on_end = self._on_end, lambda _: None
        on_end(self)

    def _has_begun(self, choice: int) -> bool:
        return bool(self._outputs[choice]) or self.finish_reasons[choice] is not None


def remote_blocks(client: ProcessClient, transfer_id: str) -> RemoteBlocks:
    """Return the handle of the blocks that an engine publishes under `transfer_id`. Raises ValueError if it cannot."""
    info = client.info
    if info is None or info.engine_id is None or info.transfer_host is None or info.transfer_port is None:
        raise ValueError("kv_transfer is off: this engine cannot send its KV cache to another")
    return RemoteBlocks(info.engine_id, transfer_id, info.transfer_host, info.transfer_port)
