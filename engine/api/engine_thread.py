"""A thread that steps an engine while it has work, for callers that must not block."""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future

from dispec.engine.api.call import Call
from dispec.engine.api.shared_engine import SharedEngine

# Returns the calls that have news.
Command = Callable[[SharedEngine], list[Call]]
_Commands = queue.SimpleQueue[Command | None]


class EngineThread:
    """Makes an engine in a thread of its own, and steps it there while it has work; idle, the thread sleeps.

    notify: called in the thread with the calls that have new outputs or an error. It must not raise.
    Raises what `make` raises.
    """

    def __init__(self, make: Callable[[], SharedEngine], notify: Callable[[list[Call]], None]) -> None:
        self._commands: _Commands = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        made: Future[SharedEngine] = Future()
        # A daemon, so that an engine that was not closed keeps no process alive: `finalize` ends it at the exit.
        thread = threading.Thread(
            target=_run, args=(make, notify, self._commands, made), name="dispec-engine", daemon=True
        )
        self._end = weakref.finalize(self, _end, self._commands, thread)
        thread.start()
        try:
            self.shared = made.result()
        except BaseException:
            self._commands.put(None)
            raise

    def submit(self, command: Command) -> None:
        """Run a command between two steps. Raises RuntimeError once the thread is closed."""
        with self._lock:
            if self._is_closed:
                raise RuntimeError("this LLM is closed")
            self._commands.put(command)

    def close(self) -> None:
        """Fail all calls, close the engine and end the thread, after the step that runs."""
        with self._lock:
            self._is_closed = True
        self._end()


def _run(
    make: Callable[[], SharedEngine],
    notify: Callable[[list[Call]], None],
    commands: _Commands,
    made: "Future[SharedEngine]",
) -> None:
    try:
        shared = make()
    except BaseException as error:
        made.set_exception(error)
        return
    made.set_result(shared)
    del made
    while True:
        try:
            command = commands.get(block=not shared.has_work)
        except queue.Empty:
            command = SharedEngine.step
        if command is None:
            notify(shared.fail(RuntimeError("this LLM is closed")))
            shared.close()
            return
        try:
            notify(command(shared))
        except Exception as error:  # no request causes it: the engine's own failure ends all of them
            notify(shared.fail(RuntimeError(f"the engine failed: {type(error).__name__}: {error}")))


def _end(commands: _Commands, thread: threading.Thread) -> None:
    commands.put(None)
    if thread is not threading.current_thread():
        thread.join()
