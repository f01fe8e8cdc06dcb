"""The engine as a process: `python -m dispec.engine.process.engine_loop DIRECTORY`, a child of the server.

The directory holds two sockets, one for each direction. The first line of standard input brings the options; standard
input ends with the server. The engine handles all waiting messages before each step, and without work sleeps until one
comes.
"""

import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from dispec.engine.errors import InvalidField
from dispec.engine.machine.cache_directory import remove_substitutes
from dispec.engine.process.channel import Channel, log_to_frontend
from dispec.engine.process.core_priority import CorePriority
from dispec.engine.process.crash_report import report_crash
from dispec.engine.process.grammar_queue import GrammarQueue
from dispec.engine.process.messages import (
    EXIT_AFTER_CRASH_REPORT,
    Abort,
    Accepted,
    Failed,
    FrontendMessage,
    Inspect,
    Inspection,
    IsCompiled,
    Refused,
    Resume,
    Shutdown,
    Start,
    StepOutput,
    Submit,
)
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.scheduling.step_record import StepRecord
from dispec.engine.scheduling.token_output import TokenOutput
from dispec.engine.structured_output.grammar_compiler import Grammar

if TYPE_CHECKING:
    from dispec.engine.engine import Engine

log = logging.getLogger("dispec")


class _Request(NamedTuple):
    """A request's choices, and the indices of those that have not ended."""

    choices: tuple[Sequence, ...]
    unfinished: set[int]


class EngineLoop:
    """Serves the requests of a channel with an engine, one step after another."""

    def __init__(self, engine: "Engine", channel: Channel, core_priority: CorePriority | None = None) -> None:
        self._engine = engine
        self._channel = channel
        self._core_priority = core_priority
        self._requests: dict[str, _Request] = {}
        self._grammars = GrammarQueue(engine.grammar_compiler)
        self._last_record: StepRecord | None = None
        self._is_running = True
        self._is_compiled = engine.runner.is_compiled

    def run(self) -> None:
        """Run steps and handle messages until `Shutdown`."""
        while self._is_running:
            engine = self._engine
            wake_ups = [*engine.wake_ups, self._grammars.fileno()]
            message = self._channel.receive(wait=not (engine.has_work or engine.has_idle_work), wake_ups=wake_ups)
            self._submit_compiled()
            if message is not None:
                self._handle(message)
            elif engine.has_work:
                with self._core_priority.step() if self._core_priority else contextlib.nullcontext():
                    self._step()
            elif engine.wake_ups or engine.has_idle_work:
                engine.work_while_idle()
            if engine.runner.is_compiled != self._is_compiled:
                self._is_compiled = engine.runner.is_compiled
                self._channel.send(IsCompiled(engine.compiled_seconds or 0.0))

    def _handle(self, message: FrontendMessage) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Resume():
                if message.request_id in self._grammars:
                    self._grammars.resume(message)
                elif message.request_id in self._requests:
                    self._engine.resume(self._requests[message.request_id].choices[0], message.outputs)
            case Abort():
                self._abort(message)
            case Inspect(verify=verify):
                self._channel.send(self._inspection(verify))
            case Shutdown():
                self._is_running = False

    def _submit(self, message: Submit) -> None:
        """Queue a request, at once or when its grammar is compiled."""
        key = message.request_id
        try:
            if key in self._requests or key in self._grammars:
                raise InvalidField("request_id", f"request_id {key!r} is under way already")
            params = SamplingParams(**message.params)
            structure, grammar = params.structure, None
            if structure is not None:
                grammar = self._grammars.find(structure)
                if grammar is None:
                    self._grammars.add(message, structure)
                    return
        except ValueError as error:
            self._refuse(key, error)
            return
        self._add(message, params, grammar)

    def _submit_compiled(self) -> None:
        """Queue the requests whose grammars are compiled since the last call."""
        for request in self._grammars.take():
            if isinstance(request.error, ValueError):
                self._refuse(request.submit.request_id, request.error)
            elif request.error is not None:
                self._fail_unqueued(request.submit.request_id, request.error)
            else:
                self._add(request.submit, SamplingParams(**request.submit.params), request.grammar)
                if request.resume is not None:
                    self._handle(request.resume)

    def _add(self, message: Submit, params: SamplingParams, grammar: Grammar | None) -> None:
        try:
            first = self._engine.add(
                message.prompt,
                params,
                request_id=message.request_id,
                priority=message.priority,
                cache_salt=message.cache_salt,
                slack=message.slack,
                publish_as=message.publish_as,
                pull=message.pull,
                is_resumed=message.is_resumed,
                grammar=grammar,
            )
        except ValueError as error:
            self._refuse(message.request_id, error)
            return
        except Exception as error:  # nothing was queued: no other request is affected
            self._fail_unqueued(message.request_id, error)
            return
        self._requests[message.request_id] = _Request(first.choices, set(range(len(first.choices))))
        self._channel.send(Accepted(message.request_id))

    def _refuse(self, request_id: str, error: ValueError) -> None:
        self._channel.send(Refused(request_id, str(error), getattr(error, "field", None)))

    def _fail_unqueued(self, request_id: str, error: Exception) -> None:
        log.error("a request could not be queued", exc_info=error)
        self._channel.send(Failed(request_id, f"{type(error).__name__}: {error}"))

    def _abort(self, message: Abort) -> None:
        if message.request_id in self._grammars:
            self._grammars.abort(message.request_id)
            return
        request = self._requests.get(message.request_id)
        if request is None:
            return  # ended while the message was on its way
        indices = list(request.unfinished) if message.choice is None else [message.choice]
        for index in indices:
            self._engine.finish(request.choices[index], message.reason)
            self._forget(message.request_id, index)

    def _forget(self, request_id: str, index: int) -> None:
        """Drop a choice, and with its last one the request."""
        unfinished = self._requests[request_id].unfinished
        unfinished.discard(index)
        if not unfinished:
            del self._requests[request_id]

    def _step(self) -> None:
        outputs = self._engine.step()
        finished = time.perf_counter()
        started = {key: when for key, when in self._engine.started.items() if key in self._requests}
        tokens: list[TokenOutput] = []
        for output in outputs:
            if output.request_id in self._requests:
                tokens.append(output)
                if output.finish_reason is not None:
                    self._forget(output.request_id, output.index)
        for sequence in self._engine.failed:
            self._fail(sequence)
        records = self._engine.records
        record = records[-1] if records and records[-1] is not self._last_record else None
        self._last_record = record or self._last_record
        if tokens or started or record is not None:
            self._channel.send(StepOutput(tokens, record, started, finished))

    def _fail(self, failed: Sequence) -> None:
        """End the request of a sequence that the engine could not continue."""
        if self._requests.pop(failed.request_id, None) is not None:
            for sequence in failed.choices:
                self._engine.finish(sequence, "error")
            self._channel.send(Failed(failed.request_id, failed.error or "the engine could not continue it"))

    def _inspection(self, verify: bool) -> Inspection:
        scheduler = self._engine.scheduler
        problem = None
        try:
            if verify:
                scheduler.check()
        except AssertionError as error:
            problem = str(error)
        used, total = self._engine.device_memory()
        return Inspection(
            num_requests=len(self._requests) + len(self._grammars),
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_used_blocks=scheduler.pool.num_usable - scheduler.pool.num_free,
            num_cached_blocks=scheduler.pool.num_cached,
            num_blocks=scheduler.pool.num_usable,
            problem=problem,
            device_memory_used=used,
            device_memory_total=total,
        )


def _serve(start: Start, channel: Channel) -> None:
    start_time = time.perf_counter()
    from tqdm import tqdm

    from dispec.engine.engine import Engine  # takes seconds, and may fail: that is reported
    from dispec.engine.options import EngineOptions
    from dispec.engine.process.engine_info import engine_info
    from dispec.engine.process.worker_place import place_worker

    tqdm.monitor_interval = 0  # its thread would wake the process periodically
    imported = time.perf_counter() - start_time
    options = place_worker(start.options, start.place) if start.place is not None else start.options
    engine = Engine(EngineOptions(**options))
    engine.phase_seconds = {"import": imported, **engine.phase_seconds}
    shared = start.shared_cores if engine.device.type == "cpu" else None
    cores = CorePriority(shared.path, shared.role) if shared else None
    channel.send(engine_info(engine))
    EngineLoop(engine, channel, cores).run()
    engine.close()  # the processes of other ranks do not outlive this one


def _exit_with_frontend(directory: str) -> None:
    """Exit at the end of standard input, also while the main thread compiles, loads, or runs a long step."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    shutil.rmtree(directory, ignore_errors=True)  # the server is gone and cannot remove its sockets
    remove_substitutes()
    os._exit(1)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the server ends this process
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    directory = sys.argv[1]
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    threading.Thread(target=_exit_with_frontend, args=(directory,), daemon=True).start()
    channel = Channel(directory)
    log_to_frontend(channel)
    code = 0
    try:
        _serve(start, channel)
    except Exception as error:
        channel.send(report_crash(error))
        code = EXIT_AFTER_CRASH_REPORT
    channel.close()
    remove_substitutes()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a regular exit would make a restart wait for torch


if __name__ == "__main__":
    main()
