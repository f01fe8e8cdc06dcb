"""One engine for several callers: iterators that are read in turns, and threads."""

import logging
import random
import threading
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Series
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property

import torch

from dispec.engine.api.arguments import Params, one_for_each
from dispec.engine.api.call import Call, PreparedRequest
from dispec.engine.api.fair_lock import FairLock
from dispec.engine.api.interrupts import deferred_interrupt
from dispec.engine.api.outputs import RequestOutput
from dispec.engine.api.prompts import TokenizedPrompt
from dispec.engine.api.running_request import RunningRequest
from dispec.engine.engine import Engine
from dispec.engine.loading.generation_config import generation_defaults
from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import RequestOutputKind, SamplingParams
from dispec.engine.scheduling.token_output import TokenOutput
from dispec.engine.text.text_stream import without_texts
from dispec.engine.text.tokenizer import Tokenizer
from dispec.layers.config import ModelConfig

log = logging.getLogger("dispec")


class SharedEngine:
    """Runs requests of several callers in one batch, without a thread of its own.

    A caller that waits for an output runs a step, and each token goes to the call of its request. One thread at a time
    uses the engine, for one step, in the order of asking.
    """

    @classmethod
    def load(cls, options: EngineOptions) -> "SharedEngine":
        """Load a model in this thread, with its tokenizer. Raises ValueError for options that are for a server."""
        if options.compile == "background":
            raise ValueError("compile is 'background', which is for a server: an LLM is never idle, use startup or off")
        engine = Engine(options)
        checkpoint = engine.checkpoint
        return cls(engine, None if checkpoint is None else Tokenizer.from_directory(checkpoint.directory))

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._lock = FairLock()
        self._places: dict[str, tuple[Call, int]] = {}  # call, and index of the request in it, by request id
        self._abandoned: deque[Call] = deque()
        self._seeds = None if engine.options.seed is None else random.Random(engine.options.seed)
        self._thread = threading.get_ident()
        self._is_closed = False

    @cached_property
    def default_params(self) -> SamplingParams:
        """The parameters of calls without `sampling_params`: the model's own, else the usual ones."""
        checkpoint = self.engine.checkpoint
        return SamplingParams(**generation_defaults(None if checkpoint is None else checkpoint.directory))

    def params_of_each(self, given: Params, count: int) -> list[SamplingParams]:
        """Return the parameters of each of `count` prompts. Raises ValueError for anything but SamplingParams."""
        return one_for_each(self.default_params if given is None else given, count)

    def run(
        self,
        prompts: Series[TokenizedPrompt],
        params: Series[SamplingParams],
        default_kind: RequestOutputKind,
        on_step: Callable[[Call], None] | None = None,
    ) -> Generator[tuple[int, RequestOutput]]:
        """Start requests and yield their outputs, each with its request's index.

        default_kind: of the outputs of parameters without `output_kind`. on_step: called at least after each step.
        Closing the iterator aborts the requests.
        Raises ValueError, before anything runs, if a prompt cannot be served.
        """
        call = Call()
        try:
            self.start(call, self.prepare(prompts, params), default_kind)
            while True:
                if on_step is not None:
                    on_step(call)
                is_open = call.num_open > 0  # before the look at the outputs, to which another thread appends the last
                if (found := call.take()) is not None:
                    yield found
                elif not is_open:
                    return
                elif call.error is not None:
                    raise call.error
                else:
                    self._step_for(call)
        finally:
            self.abandon(call)

    def prepare(self, prompts: Series[TokenizedPrompt], params: Series[SamplingParams]) -> list[PreparedRequest]:
        """Check texts and compile grammars, while other callers run steps. Raises ValueError."""
        found = []
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            with _naming(index, len(prompts)):
                engine_params = without_texts(param, self.tokenizer)
                grammar = self.engine.compile_grammar(engine_params)
            found.append(PreparedRequest(prompt, param, engine_params, grammar))
        return found

    def start(
        self,
        call: Call,
        requests: Series[PreparedRequest],
        default_kind: RequestOutputKind,
        request_id: str | None = None,
    ) -> None:
        """Queue the requests of a call. request_id: of its only request. Raises ValueError."""
        with deferred_interrupt(), self._lock:
            self._check_usable()
            if request_id in self._places:
                raise ValueError(f"request_id is {request_id!r}, which another request has that still runs")
            for index, (prompt, param, engine_params, grammar) in enumerate(requests):
                if self._seeds is not None and engine_params.seed is None:
                    engine_params = replace(engine_params, seed=self._seeds.getrandbits(63))
                with _naming(index, len(requests)):
                    first = self.engine.add(
                        prompt.token_ids,
                        engine_params,
                        cache_salt=prompt.cache_salt,
                        grammar=grammar,
                        request_id=request_id or uuid.uuid4().hex,  # which no caller's own id is
                    )
                kind = param.output_kind or default_kind
                call.requests.append(RunningRequest(first, prompt, param, kind, self.tokenizer))
                call.num_open += 1
                self._places[first.request_id] = call, index

    @property
    def has_work(self) -> bool:
        return not self._is_closed and self.engine.has_work

    def step(self) -> list[Call]:
        """Run a step, and return the calls that have new outputs or an error."""
        with deferred_interrupt(), self._lock:
            self._check_usable()
            self._abort_calls()
            changed = self._step()
        self._abort_abandoned()
        return changed

    def abandon(self, call: Call) -> None:
        """Abort what runs of a call, unless another thread is in a step, which does it then."""
        # The garbage collector may close a generator anywhere, also where this thread holds the lock.
        self._abandoned.append(call)
        self._abort_abandoned()

    def abort(self, request_id: str) -> list[Call]:
        """End a request with the finish reason "abort"; return its call, if the request runs."""
        with deferred_interrupt(), self._lock:
            place = self._places.pop(request_id, None)
            if place is None:
                return []
            call, index = place
            request = call.requests[index]
            for sequence in request.first.choices:
                self.engine.abort(sequence)
            request.abort()
            call.num_open -= 1
            if (due := request.take()) is not None:
                call.put(index, due)
            return [call]

    def fail(self, error: Exception) -> list[Call]:
        """End every request with an error; return their calls."""
        with deferred_interrupt(), self._lock:
            calls = list(dict.fromkeys(call for call, _ in self._places.values()))
            for call in calls:
                call.error = error
                self._abandoned.append(call)
            try:
                self._abort_calls()
            except Exception:  # the engine is beyond use: every later call is refused
                log.exception("the requests of a failed engine cannot be aborted: it is closed")
                self._is_closed = True
            return calls

    def close(self) -> None:
        """Close the engine, once no other thread is in a step. Later calls raise RuntimeError."""
        with deferred_interrupt(), self._lock:
            if not self._is_closed:
                self._is_closed = True
                self.engine.close()

    def _step_for(self, call: Call) -> None:
        """Run a step, unless a step of another thread has brought outputs for this call in the meantime."""
        with deferred_interrupt(), self._lock:
            if call.outputs or call.error is not None:
                return
            self._check_usable()
            self._abort_calls()
            if not self.engine.has_work:
                raise RuntimeError(
                    "the request was ended by something other than this LLM, which still waits for its tokens"
                )
            self._step()
        self._abort_abandoned()

    def _step(self) -> list[Call]:
        with self._thread_state():
            tokens = self.engine.step()
        changed = self._distribute(tokens)
        for sequence in self.engine.failed:
            if sequence.request_id in self._places:
                call, _ = self._places[sequence.request_id]
                call.error = RuntimeError(f"the engine failed: {sequence.error}")
                changed[call] = None
        return list(changed)

    def _distribute(self, tokens: Series[TokenOutput]) -> dict[Call, None]:
        """Give the tokens of a step to their requests; return the calls that have new outputs."""
        updated: dict[str, tuple[Call, int]] = {}
        for token in tokens:
            place = self._places.get(token.request_id)
            if place is None:
                continue
            call, index = place
            request = call.requests[index]
            call.num_prompt_tokens += 0 if request.has_token else request.first.num_prompt_tokens
            if not request.process(token):
                continue  # a token after a stop string, of the same step
            call.num_output_tokens += 1
            updated[token.request_id] = place
            output = request.outputs[token.index]
            if output.text.stop_reason is not None:
                self.engine.finish(output.sequence, "stop")
        changed: dict[Call, None] = {}
        for request_id, (call, index) in updated.items():
            request = call.requests[index]
            if (due := request.take()) is not None:
                call.put(index, due)
                changed[call] = None
            if request.is_finished:
                call.num_open -= 1
                del self._places[request_id]
        return changed

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
                        self.engine.abort(sequence)

    def _check_usable(self) -> None:
        if self._is_closed:
            raise RuntimeError("this LLM is closed")
        num_ranks = self.engine.options.tensor_parallel_size
        if num_ranks > 1 and self.engine.device.type == "cuda" and threading.get_ident() != self._thread:
            raise RuntimeError(
                f"tensor_parallel_size is {num_ranks}: on CUDA such an LLM answers in the thread that made it alone,"
                " because it replays that thread's graphs"
            )

    def _thread_state(self) -> AbstractContextManager[object]:
        """Give this thread the torch settings of the thread that made the engine."""
        torch.get_num_threads()  # a thread that has not called it has an OpenMP team of its own size
        return torch.cuda.device(self.engine.device) if self.engine.device.type == "cuda" else nullcontext()


@contextmanager
def _naming(index: int, num_prompts: int) -> Iterator[None]:
    """Name the prompt in ValueErrors, where there are several."""
    try:
        yield
    except ValueError as error:
        if num_prompts == 1:
            raise
        raise ValueError(f"prompts[{index}]: {error}") from error


def describe(name: str, engine: Engine) -> str:
    """Return the repr of an `LLM`: its model, dtype, device and context."""
    options = engine.options
    model = type(options.model).__name__ if isinstance(options.model, ModelConfig) else str(options.model)
    return f"{name}({model!r}, dtype={options.dtype}, device={engine.device}, max_model_len={engine.max_model_len})"
