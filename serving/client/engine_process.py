"""One engine process as the front sees it: started, listened to, and known to have ended."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import msgspec
import zmq

from dispec.engine.process.messages import EXIT_AFTER_LAST_WORDS, Died, FromEngine, FromFront, Start, encode
from dispec.serving.client.engine_errors import EngineDied
from dispec.serving.client.socket_directory import SocketDirectory

_SERVICE = "dispec.engine.process.engine_loop"
_EXIT_BELL = "inproc://exit"


class EngineProcess:
    """Starts `engine.process.engine_loop` and reads what it says, in a thread, until it ends.

    `on_message` gets each message but the last words, `on_exit` why the process ended; both are called in the
    reading thread. Everything else belongs to one thread, the one that made it. Raises EngineDied if the system has no
    room for another process.
    """

    def __init__(
        self, start: Start, on_message: Callable[[FromEngine], None], on_exit: Callable[[EngineDied], None]
    ) -> None:
        self._on_message = on_message
        self._on_exit = on_exit
        self._last_words: Died | None = None
        with contextlib.ExitStack() as undo:
            try:
                self._sockets = SocketDirectory()
                undo.callback(self._sockets.remove)
                self._directory = self._sockets.path
                self._context = zmq.Context()
                undo.callback(self._context.destroy, linger=0)
                self._open(start)
            except (OSError, zmq.ZMQError) as error:
                why = os.strerror(error.errno) if error.errno else str(error)
                hint = "see how much memory and disk, how many processes and open files there may be"
                raise EngineDied(f"no engine process can be started ({why})", hint) from error
            undo.pop_all()
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, name="engine-waiter", daemon=True).start()

    def _open(self, start: Start) -> None:
        """Bind the sockets and start the process. Raises OSError or ZMQError."""
        self._outbox = self._socket(zmq.PUSH, f"ipc://{self._directory}/to-engine")
        # The thread that waits for the process rings the same socket on which the process speaks.
        self._inbox = self._socket(zmq.PULL, f"ipc://{self._directory}/to-front", _EXIT_BELL)
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        environment = os.environ | {
            "OPENBLAS_NUM_THREADS": "1",  # NumPy's, of which the engine uses no product
        }
        if start.num_threads is not None:
            environment["OMP_NUM_THREADS"] = str(start.num_threads)
        # -P: a "dispec" in the working directory is not ours. Its own session: Ctrl-C goes to the front alone.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _SERVICE, self._directory],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self.pid = self._process.pid
        assert self._process.stdin is not None
        self._stdin = self._process.stdin  # its end tells the engine that the front has gone
        with contextlib.suppress(BrokenPipeError):  # if it ended at once, the waiting thread will tell
            self._stdin.write(msgspec.json.encode(start) + b"\n")
            self._stdin.flush()

    def send(self, message: FromFront) -> None:
        """Hand a message over. One to a process that has ended goes nowhere: `on_exit` tells about the process."""
        with contextlib.suppress(zmq.Again):
            self._outbox.send(encode(message), zmq.NOBLOCK)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Free what is left, once `on_exit` was called."""
        self._reader.join()
        self._outbox.close(linger=0)
        self._context.destroy(linger=0)
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._sockets.remove()

    def _socket(self, kind: int, *addresses: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, 0)  # what may be under way is bounded by the front's queue
        socket.setsockopt(zmq.RCVHWM, 0)
        for address in addresses:
            socket.bind(address)
        return socket

    def _wait(self) -> None:
        self._process.wait()
        with self._context.socket(zmq.PUSH) as bell:
            bell.connect(_EXIT_BELL)
            bell.send(b"")

    def _read(self) -> None:
        try:
            while data := self._inbox.recv():
                self._take(data)
            # What it said just before its end may still be on its way, its last words above all.
            patience = 5000 if self._process.returncode == EXIT_AFTER_LAST_WORDS else 100
            while self._last_words is None and self._inbox.poll(patience):
                self._take(self._inbox.recv())
            ending = self._ending()
        except Exception as error:  # it spoke another language
            self._process.kill()
            self._process.wait()
            ending = EngineDied(f"the engine sent what cannot be read ({error})", "see that one version is installed")
        self._inbox.close(linger=0)
        self._on_exit(ending)

    def _take(self, data: bytes) -> None:
        message: FromEngine = self._decoder.decode(data)
        if isinstance(message, Died):
            self._last_words = message
            self._process.kill()  # there is nothing more to expect of it
        else:
            self._on_message(message)

    def _ending(self) -> EngineDied:
        if self._last_words is not None:
            words = self._last_words
            return EngineDied(words.message, words.hint, words.error, words.traceback, is_bad_input=words.is_bad_input)
        code = self._process.returncode
        if code >= 0:
            return EngineDied(f"the engine process ended with exit code {code}", "the log above may say why")
        name = signal.Signals(-code).name
        if -code == signal.SIGKILL:
            hint = "if nobody killed it, the system ran out of memory: lower kv_cache_memory or max_model_len"
        else:
            hint = "the log above may say why"
        return EngineDied(f"the engine process was ended by {name}", hint)
