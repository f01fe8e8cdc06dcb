"""One engine for several callers: iterators that are read in turns, and threads."""

import threading
from collections import deque
from collections.abc import Generator, Iterator
from collections.abc import Sequence as Series
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from dispec.engine.api.fair_lock import FairLock
from dispec.engine.api.interrupts import deferred_interrupt
from dispec.engine.api.outputs import RequestOutput
from dispec.engine.api.prompts import TokenizedPrompt
from dispec.engine.api.running_request import RunningRequest
from dispec.engine.engine import Engine
from dispec.engine.sampling_params import RequestOutputKind, SamplingParams
from dispec.engine.scheduling.token_output import TokenOutput
from dispec.engine.text.text_stream import without_texts
from dispec.engine.text.tokenizer import Tokenizer


@dataclass(eq=False)
class _Call:
    """The requests of one caller.

    outputs: in the order of arrival, each with its request's index, until the caller reads them.
    num_open: requests that have not ended.
    error: the reason why no more outputs come.
    """

    requests: list[RunningRequest] = field(default_factory=list)
    outputs: deque[tuple[int, RequestOutput]] = field(default_factory=deque)
    num_open: int = 0
    error: RuntimeError | None = None


class SharedEngine:
    """Runs requests of several callers in one batch, without a thread of its own.

    A caller that waits for an output runs a step, and each token goes to the call of its request. One thread at a time
    uses the engine, for one step, in the order of asking.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._lock = FairLock()
        self._places: dict[str, tuple[_Call, int]] = {}  # call, and index of the request in it, by request id
        self._abandoned: deque[_Call] = deque()
        self._thread = threading.get_ident()
        self._is_closed = False

    def run(
        self, prompts: Series[TokenizedPrompt], params: Series[SamplingParams], kind: RequestOutputKind
    ) -> Generator[tuple[int, RequestOutput]]:
        """Start requests and yield their outputs, each with its request's index.

        Closing the iterator aborts the requests. Raises ValueError, before anything runs, if a prompt cannot be served.
        """
        call = _Call()
        try:
            self._start(call, prompts, params, kind)
            while call.outputs or call.num_open:
                if call.outputs:
                    yield call.outputs.popleft()
                elif call.error is not None:
                    raise call.error
                else:
                    self._step_for(call)
        finally:
            # The garbage collector may close this generator anywhere, also where this thread holds the lock.
            self._abandoned.append(call)
            self._abort_abandoned()

    def close(self) -> None:
        """Close the engine, once no other thread is in a step. Later calls raise RuntimeError."""
        with deferred_interrupt(), self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._engine.close()

    def _start(
        self,
        call: _Call,
        prompts: Series[TokenizedPrompt],
        params: Series[SamplingParams],
        kind: RequestOutputKind,
    ) -> None:
        engine_params = [without_texts(param, self._tokenizer) for param in params]
        grammars = []
        for index, param in enumerate(engine_params):  # without the lock: other callers run steps meanwhile
            with _naming(index, len(prompts)):
                grammars.append(self._engine.compile_grammar(param))
        with deferred_interrupt(), self._lock:
            self._check_usable()
            for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
                with _naming(index, len(prompts)):
                    first = self._engine.add(
                        prompt.token_ids, engine_params[index], cache_salt=prompt.cache_salt, grammar=grammars[index]
                    )
                request = RunningRequest(first, prompt, param, kind, self._tokenizer)
                call.requests.append(request)
                call.num_open += 1
                self._places[first.request_id] = call, index

    def _step_for(self, call: _Call) -> None:
        """Run a step, unless a step of another thread has brought outputs for this call in the meantime."""
        with deferred_interrupt(), self._lock:
            if call.outputs or call.error is not None:
                return
            self._check_usable()
            self._abort_calls()
            if not self._engine.has_work:
                raise RuntimeError(
                    "the request was ended by something other than this LLM, which still waits for its tokens"
                )
            with self._thread_state():
                outputs = self._engine.step()
            self._distribute(outputs)
            for sequence in self._engine.failed:
                if sequence.request_id in self._places:
                    failed_call, _ = self._places[sequence.request_id]
                    failed_call.error = RuntimeError(f"the engine failed: {sequence.error}")
        self._abort_abandoned()

    def _distribute(self, tokens: Series[TokenOutput]) -> None:
        """Give the tokens of a step to their requests, and append what is due to the calls."""
        changed: dict[str, tuple[_Call, int]] = {}
        for token in tokens:
            place = self._places.get(token.request_id)
            if place is None:
                continue
            call, index = place
            request = call.requests[index]
            if not request.process(token):
                continue  # a token after a stop string, of the same step
            changed[token.request_id] = place
            output = request.outputs[token.index]
            if output.text.stop_reason is not None:
                self._engine.finish(output.sequence, "stop")
        for request_id, (call, index) in changed.items():
            request = call.requests[index]
            if request.is_finished:
                call.num_open -= 1
                del self._places[request_id]
            if (due := request.take()) is not None:
                call.outputs.append((index, due))

    def _abort_abandoned(self) -> None:
        """Abort the requests of abandoned calls, or leave that to the thread that has the lock."""
        if not self._abandoned:
            return
        with deferred_interrupt():
            while self._abandoned and self._lock.acquire(blocking=False):
                try:
                    self._abort_calls()
                finally:
                    self._lock.release()

    def _abort_calls(self) -> None:
        while self._abandoned:
            call = self._abandoned.popleft()
            for request in call.requests:
                if self._places.pop(request.first.request_id, None) is not None:
                    for sequence in request.first.choices:
                        self._engine.abort(sequence)

    def _check_usable(self) -> None:
        if self._is_closed:
            raise RuntimeError("this LLM is closed")
        num_ranks = self._engine.options.tensor_parallel_size
        if num_ranks > 1 and self._engine.device.type == "cuda" and threading.get_ident() != self._thread:
            raise RuntimeError(
                f"tensor_parallel_size is {num_ranks}: on CUDA such an LLM answers in the thread that made it alone,"
                " because it replays that thread's graphs"
            )

    def _thread_state(self) -> AbstractContextManager[object]:
        """Give this thread the torch settings of the thread that made the engine."""
        torch.get_num_threads()  # a thread that has not called it has an OpenMP team of its own size
        return torch.cuda.device(self._engine.device) if self._engine.device.type == "cuda" else nullcontext()


@contextmanager
def _naming(index: int, num_prompts: int) -> Iterator[None]:
    """Name the prompt in ValueErrors, where there are several."""
    try:
        yield
    except ValueError as error:
        if num_prompts == 1:
            raise
        raise ValueError(f"prompts[{index}]: {error}") from error
