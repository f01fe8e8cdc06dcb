"""One engine for several callers: iterators that are read in turns, and threads."""

import threading
from collections import deque
from collections.abc import Generator
from collections.abc import Sequence as Series
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from dispec.engine.api.fair_lock import FairLock
from dispec.engine.api.interrupts import deferred_interrupt
from dispec.engine.api.outputs import Piece
from dispec.engine.api.prompts import PromptInput
from dispec.engine.api.running_request import RunningChoice, RunningRequest
from dispec.engine.engine import Engine
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.scheduler_output import TokenOutput
from dispec.engine.text.text_stream import TextStream, without_texts
from dispec.engine.text.tokenizer import Tokenizer


@dataclass(eq=False)
class _Call:
    """Requests that one caller waits for, and their pieces in the order of arrival, each with its request's index.

    num_open: choices that have not ended. error: why there are no more pieces.
    """

    requests: list[RunningRequest] = field(default_factory=list)
    pieces: deque[tuple[int, Piece]] = field(default_factory=deque)
    num_open: int = 0
    error: RuntimeError | None = None


class SharedEngine:
    """Runs requests of several callers in one batch.

    No thread of its own: a caller that waits for a piece runs a step, and every output of it goes to the call that it
    belongs to. One thread at a time uses the engine, for one step, in the order in which they asked.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._lock = FairLock()
        self._requests: dict[str, tuple[_Call, int]] = {}  # call, and index of the request in it, by request id
        self._abandoned: deque[_Call] = deque()
        self._thread = threading.get_ident()
        self._is_closed = False

    def run(self, prompts: Series[PromptInput], params: Series[SamplingParams]) -> Generator[tuple[int, Piece]]:
        """Start requests and yield each of their tokens as it comes, with its request's index. Closing the iterator
        aborts what has not ended.

        Raises ValueError, before anything runs, if a prompt cannot be served.
        """
        call = _Call()
        try:
            self._start(call, prompts, params)
            while call.pieces or call.num_open:
                if call.pieces:
                    yield call.pieces.popleft()
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

    def _start(self, call: _Call, prompts: Series[PromptInput], params: Series[SamplingParams]) -> None:
        # Outside of the lock, as long texts take their time.
        tokens = [self._tokenize(prompt, _where(index, prompts)) for index, prompt in enumerate(prompts)]
        edited = [without_texts(param, self._tokenizer) for param in params]
        with deferred_interrupt(), self._lock:
            self._check_usable()
            for index, (token_ids, prompt, param) in enumerate(zip(tokens, prompts, params, strict=True)):
                try:
                    first = self._engine.add(token_ids, edited[index], cache_salt=prompt.cache_salt)
                except ValueError as error:
                    raise ValueError(f"{_where(index, prompts)}{error}") from error
                texts = [TextStream(self._tokenizer, param, token_ids) for _ in first.choices]
                choices = [RunningChoice(*pair) for pair in zip(first.choices, texts, strict=True)]
                call.requests.append(RunningRequest(choices))
                call.num_open += len(choices)
                self._requests[first.request_id] = (call, index)

    def _tokenize(self, prompt: PromptInput, where: str) -> list[int]:
        if not isinstance(prompt.content, str):
            return prompt.content
        if self._tokenizer is None:
            raise ValueError(f"{where}this model was made from a ModelConfig and has no tokenizer: pass token ids")
        return self._tokenizer.encode(prompt.content)

    def _step_for(self, call: _Call) -> None:
        """Run a step, unless one of another thread has brought pieces for this call in the meantime."""
        with deferred_interrupt(), self._lock:
            if call.pieces or call.error is not None:
                return
            self._check_usable()
            self._abort_calls()
            if not self._engine.has_work:
                raise RuntimeError(
                    "the request was ended by something other than this LLM, which still waits for its tokens"
                )
            with self._as_made():
                outputs = self._engine.step()
            for output in outputs:
                self._hand_over(output)
            for sequence in self._engine.failed:
                if sequence.request_id in self._requests:
                    owner, _ = self._requests[sequence.request_id]
                    owner.error = RuntimeError(f"the engine failed: {sequence.error}")
        self._abort_abandoned()

    def _hand_over(self, output: TokenOutput) -> None:
        if output.request_id not in self._requests:
            return
        call, number = self._requests[output.request_id]
        request = call.requests[number]
        choice = request.choices[output.index]
        finished = output.finish_reason
        text = choice.take(output.token_id, ends=finished == "stop", is_last=finished is not None)
        if choice.text.stop_reason is not None:
            finished = "stop"
            self._engine.finish(choice.sequence, "stop")
        completion = None
        if finished is not None:
            call.num_open -= 1
            request.done[output.index] = choice.choice()
            completion = request.completion()
            if completion is not None:
                del self._requests[output.request_id]
        call.pieces.append((number, Piece(text, output.token_id, output.index, finished, completion)))

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
                if self._requests.pop(request.choices[0].sequence.request_id, None) is not None:
                    for choice in request.choices:
                        self._engine.abort(choice.sequence)

    def _check_usable(self) -> None:
        if self._is_closed:
            raise RuntimeError("this LLM is closed")
        ranks = self._engine.options.tensor_parallel_size
        if ranks > 1 and self._engine.device.type == "cuda" and threading.get_ident() != self._thread:
            raise RuntimeError(
                f"tensor_parallel_size is {ranks}: on CUDA such an LLM answers in the thread that made it, whose"
                " graphs it replays"
            )

    def _as_made(self) -> AbstractContextManager[object]:
        """What torch keeps for each thread, as it is in the one that made the engine."""
        torch.get_num_threads()  # a thread that has not called it has an OpenMP team of its own size
        return torch.cuda.device(self._engine.device) if self._engine.device.type == "cuda" else nullcontext()


def _where(index: int, prompts: Series[PromptInput]) -> str:
    return f"prompts[{index}]: " if len(prompts) > 1 else ""
