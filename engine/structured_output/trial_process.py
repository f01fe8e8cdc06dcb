"""Compiles a grammar in a process of its own first, which hostile grammars may end.

llguidance 1.9.1 has no limit on some of its work: 16 KB of nested terminals, 14 intersected patterns or `multipleOf` of
nine primes take minutes, and a chain of 2,000 references overflows the stack, which ends the process. A grammar that
compiles here within the limits compiles in the engine in the same time.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading

from dispec.engine.structured_output.tables import Vocabulary, new_matcher

MAX_SECONDS = 1.0  # of processor time; a JSON Schema of 20 properties takes 2 ms
_STACK_BYTES = 2 * 2**20  # a quarter of a thread's in the engine
_MEMORY_BYTES = 4 * 2**30  # of addresses; the tables of 151,936 tokens take 0.2 GB


class TrialProcess:
    """A process that compiles grammars, one at a time, and starts anew after one that ended it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None

    def compile(self, grammar: str) -> str | None:
        """Compile a grammar. Return why it must not be compiled in the engine, or None."""
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it ended while it waited, for no fault of this grammar
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            process.stdin.flush()
            if process.stdout.readline():
                return None
        except BrokenPipeError:
            pass
        code = process.wait()
        self.close()
        if code == -signal.SIGPROF:
            return f"takes more than {MAX_SECONDS:g} s to compile"
        if code == -signal.SIGSEGV:
            return "is nested too deeply"
        return f"cannot be compiled within {_MEMORY_BYTES >> 30} GiB of memory"

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal ends the engine, and with it this process
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(self._vocabulary).encode() + b"\n")
            self._process.stdin.flush()
            is_ready = bool(self._process.stdout.readline())
        except BrokenPipeError:
            is_ready = False
        if not is_ready:
            self.close()
            raise RuntimeError("the process that compiles grammars did not start")


def _serve() -> None:
    tokenizer_path, size, eos_token_ids = json.loads(sys.stdin.buffer.readline())
    tables = Vocabulary(tokenizer_path, size, tuple(eos_token_ids)).tables()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    while True:
        print(flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        # The signal ends the process, also inside llguidance.
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        new_matcher(tables, json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)


def _main() -> None:
    os.nice(10)  # a hostile grammar slows no steps
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    _main()
