"""One engine process as the server sees it: started, read from, and reported when it has ended."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable

import msgspec
import zmq

from dispec.engine.errors import LESS_MEMORY_HINT
from dispec.engine.machine.owned_directory import OwnedDirectory
from dispec.engine.process.messages import (
    EXIT_AFTER_CRASH_REPORT,
    CrashReport,
    EngineMessage,
    FrontendMessage,
    Start,
    encode,
)
from dispec.serving.client.errors import EngineDied

_ENGINE_MODULE = "dispec.engine.process.engine_loop"
_EXIT_ADDRESS = "inproc://exit"
_SOCKET_PREFIX = "dispec-sockets-"
_MAX_SOCKET_PATH = 100  # the system's limit is 104 to 108 bytes


class SocketDirectory(OwnedDirectory):
    """A private directory for the sockets of one engine process; it exists until `remove` is called."""

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        longest = os.path.join(parent, _SOCKET_PREFIX) + "12345678/to-engine"  # mkdtemp adds 8 characters
        super().__init__(_SOCKET_PREFIX, parent if len(longest) <= _MAX_SOCKET_PATH else "/tmp")


class EngineProcess:
    """Starts `engine.process.engine_loop` and reads its messages, in a thread, until it ends.

    `on_message` gets each message but the crash report, `on_exit` the reason why the process ended; both are called in
    the reading thread. Everything else belongs to the thread that created the object. Raises EngineDied if the system
    cannot start another process.
    """

    def __init__(
        self, start: Start, on_message: Callable[[EngineMessage], None], on_exit: Callable[[EngineDied], None]
    ) -> None:
        self._on_message = on_message
        self._on_exit = on_exit
        self._crash_report: CrashReport | None = None
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
                hint = "check the limits on memory, disk, processes and open files"
                raise EngineDied(f"no engine process can be started ({why})", hint) from error
            undo.pop_all()
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, name="engine-waiter", daemon=True).start()

    def _open(self, start: Start) -> None:
        """Bind the sockets and start the process. Raises OSError or ZMQError."""
        self._outbox = self._socket(zmq.PUSH, f"ipc://{self._directory}/to-engine")
        # The thread that waits for the process wakes the reader through the socket that the process sends to.
        self._inbox = self._socket(zmq.PULL, f"ipc://{self._directory}/to-front", _EXIT_ADDRESS)
        self._decoder = msgspec.msgpack.Decoder(EngineMessage)
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # NumPy's; the engine multiplies no NumPy matrices
        # -P: ignore a "dispec" in the working directory. A session of its own: Ctrl-C reaches the server alone.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _ENGINE_MODULE, self._directory],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self.pid = self._process.pid
        assert self._process.stdin is not None
        self._stdin = self._process.stdin  # its end tells the engine that the server has gone
        with contextlib.suppress(BrokenPipeError):  # the waiting thread reports a process that ended at once
            self._stdin.write(msgspec.json.encode(start) + b"\n")
            self._stdin.flush()

    def send(self, message: FrontendMessage) -> None:
        """Send a message. One to a process that has ended is lost: `on_exit` reports the process."""
        with contextlib.suppress(zmq.Again):
            self._outbox.send(encode(message), zmq.NOBLOCK)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Free the sockets, after `on_exit` was called."""
        self._reader.join()
        self._outbox.close(linger=0)
        self._context.destroy(linger=0)
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._sockets.remove()

    def _socket(self, kind: int, *addresses: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, 0)  # messages are bounded by the server's queue of requests
        socket.setsockopt(zmq.RCVHWM, 0)
        for address in addresses:
            socket.bind(address)
        return socket

    def _wait(self) -> None:
        self._process.wait()
        with self._context.socket(zmq.PUSH) as socket:
            socket.connect(_EXIT_ADDRESS)
            socket.send(b"")

    def _read(self) -> None:
        try:
            while data := self._inbox.recv():
                self._take(data)
            # Messages sent just before the end may still arrive, above all the crash report.
            timeout_ms = 5000 if self._process.returncode == EXIT_AFTER_CRASH_REPORT else 100
            while self._crash_report is None and self._inbox.poll(timeout_ms):
                self._take(self._inbox.recv())
            ending = self._ending()
        except Exception as error:  # a message of another version
            self._process.kill()
            self._process.wait()
            ending = EngineDied(f"the engine sent an unreadable message ({error})", "install one version of DiSpec")
        self._inbox.close(linger=0)
        self._on_exit(ending)

    def _take(self, data: bytes) -> None:
        message: EngineMessage = self._decoder.decode(data)
        if isinstance(message, CrashReport):
            self._crash_report = message
            self._process.kill()  # it sends nothing after its crash report
        else:
            self._on_message(message)

    def _ending(self) -> EngineDied:
        if self._crash_report is not None:
            report = self._crash_report
            return EngineDied(
                report.message, report.hint, report.error, report.traceback, is_bad_input=report.is_bad_input
            )
        code = self._process.returncode
        if code >= 0:
            return EngineDied(f"the engine process ended with exit code {code}", "the log above may say why")
        name = signal.Signals(-code).name
        if -code == signal.SIGKILL:
            hint = f"if it was not killed by hand, the system ran out of memory: {LESS_MEMORY_HINT}"
        else:
            hint = "the log above may say why"
        return EngineDied(f"the engine process was ended by {name}", hint)
