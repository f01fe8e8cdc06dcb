"""The engine process's channel to the frontend: messages both ways, and the log."""

import logging
import sys
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import msgspec
import zmq

from dispec.engine.process.messages import EngineMessage, FrontendMessage, Log, encode

log = logging.getLogger("dispec")


class Channel:
    """The two sockets to the frontend. A channel belongs to the thread that made it."""

    def __init__(self, directory: str) -> None:
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        for socket in (self._inbox, self._outbox):
            socket.setsockopt(zmq.RCVHWM, 0)  # messages are bounded by the frontend's queue of requests
            socket.setsockopt(zmq.SNDHWM, 0)
        self._inbox.connect(f"ipc://{directory}/to-engine")
        self._outbox.connect(f"ipc://{directory}/to-front")
        self._decoder = msgspec.msgpack.Decoder(FrontendMessage)

    def send(self, message: EngineMessage) -> None:
        self._outbox.send(encode(message))

    def receive(self, *, wait: bool, wake_ups: Iterable[int] = ()) -> FrontendMessage | None:
        """Return the next message, or None when none has come.

        wait: until a message comes or one of the file descriptors `wake_ups` becomes readable.
        """
        if wait and wake_ups:
            poller = zmq.Poller()
            poller.register(self._inbox, zmq.POLLIN)
            for wake_up in wake_ups:
                poller.register(wake_up, zmq.POLLIN)
            poller.poll()
            wait = False
        try:
            data = self._inbox.recv(0 if wait else zmq.NOBLOCK)
        except zmq.Again:
            return None
        message: FrontendMessage = self._decoder.decode(data)
        return message

    def close(self) -> None:
        """Close the sockets once all messages are delivered, or after five seconds."""
        self._context.destroy(linger=5000)


class _FrontendHandler(logging.Handler):
    """Sends log lines to the frontend; those of other threads go to standard error."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel
        self._thread = threading.get_ident()
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if threading.get_ident() == self._thread:
            self._channel.send(Log(record.levelno, text))
        else:
            print(text, file=sys.stderr)


def log_to_frontend(channel: Channel) -> None:
    """Send log lines and warnings over the channel instead of writing them."""
    handler = _FrontendHandler(channel)
    for name in ("dispec", "engine"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)

    def show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
        log.warning("%s", " ".join(str(message).split()))

    warnings.showwarning = show_warning
