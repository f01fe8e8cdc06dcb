"""The server's log: a line for each event, with the id of its request, written by a thread of its own.

A log call only puts a record into a queue. If the reader of the log is slower, records are dropped and counted, and
serving continues.
"""

import json
import logging
import logging.handlers
import queue
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal, TextIO

LogFormat = Literal["auto", "json", "text"]

_LOGGERS = ("dispec", "engine", "uvicorn", "asyncio", "litestar")
_MAX_QUEUED_RECORDS = 10_000


@contextmanager
def logging_to(stream: TextIO, log_format: LogFormat, level: int = logging.INFO) -> Iterator[None]:
    """Write the log to a stream; "auto" writes text to a terminal and JSON to any other stream."""
    is_json = log_format == "json" or (log_format == "auto" and not stream.isatty())
    target = logging.StreamHandler(stream)
    target.setFormatter(JsonLines() if is_json else TextLines())
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(_MAX_QUEUED_RECORDS)
    handler = _Enqueue(waiting)
    listener = logging.handlers.QueueListener(waiting, target)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.getLogger("uvicorn").setLevel(max(level, logging.WARNING))  # the server reports its start and end itself
    listener.start()
    try:
        yield
    finally:
        for logger, (handlers, old_level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(old_level)
        listener.stop()


class _Enqueue(logging.handlers.QueueHandler):
    def __init__(self, waiting: queue.Queue[logging.LogRecord]) -> None:
        super().__init__(waiting)
        self._num_dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # the writing thread formats it

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._num_dropped:
            record.lost = self._num_dropped
        try:
            self.queue.put_nowait(record)
            self._num_dropped = 0
        except queue.Full:
            self._num_dropped += 1


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info is not None and record.exc_info[0] is not None:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=True, default=str)


class TextLines(logging.Formatter):
    """A line of text for each event."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        fields = _fields(record)
        if record.name == "dispec.access":
            text = " ".join(str(fields.pop(name)) for name in ("method", "path", "status") if name in fields)
        else:
            text = record.getMessage()
        more = "".join(f" {name}={value}" for name, value in fields.items())
        line = f"{clock} {prefix}{text}{more}"
        if record.exc_info is not None and record.exc_info[0] is not None:
            line += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return line


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields = dict(getattr(record, "fields", {}))
    for name in ("request_id", "lost"):
        value = getattr(record, name, None)
        if value is not None:
            fields.setdefault(name, value)
    return fields
