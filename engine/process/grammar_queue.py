"""Requests whose grammars are being compiled, in threads, while the engine runs steps."""

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from dispec.engine.process.messages import Resume, Submit
from dispec.engine.structured_output.grammar_compiler import MAX_COMPILATIONS, Grammar, GrammarCompiler
from dispec.engine.structured_output.structured_outputs import StructuredOutputs

_TIMEOUT_SECONDS = 10.0  # of one grammar, waiting for a thread included


class CompiledRequest(NamedTuple):
    """A request with its grammar, or with the error of its grammar. resume: the message that came meanwhile."""

    submit: Submit
    resume: Resume | None
    grammar: Grammar | None
    error: Exception | None


class _Entry:
    """A request under way. resume: as in `CompiledRequest`."""

    def __init__(self, submit: Submit, timer: threading.Timer) -> None:
        self.submit = submit
        self.timer = timer
        self.resume: Resume | None = None


class GrammarQueue:
    """Compiles the grammars of requests. Its methods belong to the engine's thread.

    compiler: a grammar that it refuses, or that takes longer than ten seconds, refuses the request. The thread of such
        a grammar ends by the limits of the compiler.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._pool = ThreadPoolExecutor(MAX_COMPILATIONS, thread_name_prefix="grammar")
        self._entries: dict[str, _Entry] = {}
        self._done: deque[tuple[_Entry, Grammar | None, Exception | None]] = deque()
        self._wake_up, self._waker = os.pipe()
        os.set_blocking(self._wake_up, False)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def find(self, structure: StructuredOutputs) -> Grammar | None:
        """Return the grammar if it is compiled."""
        return self._compiler.find(structure)

    def fileno(self) -> int:
        """Return a file descriptor that is readable when `take` returns something."""
        return self._wake_up

    def add(self, submit: Submit, structure: StructuredOutputs) -> None:
        """Begin to compile the grammar of a request."""
        timer = threading.Timer(_TIMEOUT_SECONDS, lambda: self._finish(entry, None, _timeout(structure)))
        timer.daemon = True
        entry = self._entries[submit.request_id] = _Entry(submit, timer)
        timer.start()
        self._pool.submit(self._compile, entry, structure)

    def resume(self, message: Resume) -> None:
        """Keep a message for a request until its grammar is compiled."""
        self._entries[message.request_id].resume = message

    def abort(self, request_id: str) -> None:
        """Forget a request."""
        self._entries.pop(request_id).timer.cancel()

    def take(self) -> list[CompiledRequest]:
        """Return the requests that are done."""
        found = []
        while self._done:
            os.read(self._wake_up, 1)
            entry, grammar, error = self._done.popleft()
            # Aborted, or done already: a grammar may end after its time was up.
            if self._entries.get(entry.submit.request_id) is entry:
                del self._entries[entry.submit.request_id]
                entry.timer.cancel()
                found.append(CompiledRequest(entry.submit, entry.resume, grammar, error))
        return found

    def _compile(self, entry: _Entry, structure: StructuredOutputs) -> None:
        if self._entries.get(entry.submit.request_id) is not entry:
            return  # aborted, or out of time, while it waited for a thread
        try:
            grammar = self._compiler.compile(structure)
        except Exception as error:
            self._finish(entry, None, error)
        else:
            self._finish(entry, grammar, None)

    def _finish(self, entry: _Entry, grammar: Grammar | None, error: Exception | None) -> None:
        """Hand a result to the engine's thread."""
        os.write(self._waker, b"\0")  # before: `take` reads one byte for each result
        self._done.append((entry, grammar, error))


def _timeout(structure: StructuredOutputs) -> Exception:
    return structure.error(f"takes longer than {_TIMEOUT_SECONDS:g} s to compile, make it simpler")
