"""Compiles the grammars of requests in threads, while the engine runs steps."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from dispec.engine.process.messages import Abort, Resume, Submit
from dispec.engine.structured_output.grammar_compiler import MAX_COMPILATIONS, Grammar, GrammarCompiler
from dispec.engine.structured_output.structured_outputs import StructuredOutputs


class CompiledRequest(NamedTuple):
    """A request whose grammar is compiled, or refused.

    later: messages about the request that came in the meantime, in their order.
    """

    submit: Submit
    grammar: Grammar | None
    error: Exception | None
    later: list[Resume | Abort]


class GrammarQueue:
    """Requests that wait for their grammars. All methods are for the thread of the steps."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._threads = ThreadPoolExecutor(MAX_COMPILATIONS, "grammars")
        self._waiting: dict[str, tuple[Submit, list[Resume | Abort]]] = {}  # by request id
        self._done: deque[tuple[Submit, Grammar | None, Exception | None]] = deque()
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)

    def fileno(self) -> int:
        """Return a descriptor that is readable while `take` has requests to return."""
        return self._read_end

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def find(self, structure: StructuredOutputs) -> Grammar | None:
        """Return the grammar if it is compiled. Raises InvalidField if it was refused."""
        return self._compiler.find(structure)

    def add(self, submit: Submit, structure: StructuredOutputs) -> None:
        """Compile the grammar of a request."""
        self._waiting[submit.request_id] = submit, []
        self._threads.submit(self._compile, submit, structure)

    def keep(self, message: Resume | Abort) -> None:
        """Keep a message about a waiting request until its grammar is compiled. An abort ends the wait."""
        if isinstance(message, Abort) and message.choice is None:
            del self._waiting[message.request_id]
        else:
            self._waiting[message.request_id][1].append(message)

    def take(self) -> list[CompiledRequest]:
        """Return the requests that need wait no longer."""
        found = []
        while self._done:
            submit, grammar, error = self._done.popleft()
            os.read(self._read_end, 1)
            waiting = self._waiting.get(submit.request_id)
            if waiting is not None and waiting[0] is submit:  # not aborted
                del self._waiting[submit.request_id]
                found.append(CompiledRequest(submit, grammar, error, waiting[1]))
        return found

    def _compile(self, submit: Submit, structure: StructuredOutputs) -> None:
        grammar = error = None
        try:
            grammar = self._compiler.compile(structure)
        except Exception as failure:
            error = failure
        os.write(self._write_end, b"\0")
        self._done.append((submit, grammar, error))
        # A reader between these two lines finds nothing, and comes back because the pipe stays readable.
