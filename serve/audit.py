"""What is written down of requests, as JSON lines: the audit, who sampled what, and the application's log.

    {"time": "2026-11-25T09:30:00.123+00:00", "request_id": "5f0c...", "key_id": "8a1b...", "model": ...}

Whatever a client sends stands in its line as a JSON string in ASCII: it can neither end the line nor begin
another, nor move the cursor of the terminal that shows it. What looks like the secret of a key is struck out.
"""

import json
import logging
import os
import queue
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any

from gdl_ray.home import home

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The request that this task works for; empty outside of one."""

FILE_BYTES = 64 * 2**20
OLD_FILES = 15
"""So many full files a process keeps beside the one that it writes: with it, 1 GiB at most."""
MAX_WAITING = 100_000
"""Most lines that wait for a slow disk; about 100 MB."""

_SECRET = re.compile(r"gdl_[A-Za-z0-9_-]{43}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")

log = logging.getLogger(__name__)


def request_id_of(header: str | None) -> str:
    """Take the X-Request-Id that a client or proxy has sent, if it is fit for one; make another otherwise."""
    return header if header and _REQUEST_ID.fullmatch(header) else uuid.uuid4().hex


def _line(seconds: float, record: dict[str, Any]) -> str:
    """Write a record of a time, in seconds since 1970, as one line."""
    moment = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return _SECRET.sub("gdl_***", json.dumps({"time": moment, **record}, default=str))


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One request, once it is answered; None where it did not come so far as to have it."""

    request_id: str
    key_id: str
    key_name: str
    client: str
    """Address that it came from."""
    method: str
    path: str
    model: str | None = None
    version: int | None = None
    operation: str | None = None
    n: int | None = None
    seed: int | None = None
    status: int
    """Of the HTTP answer; 0 where the client was gone before it."""
    problem: str | None = None
    """What was wrong."""
    seconds: float
    bytes: int
    """Length of the answer's body."""


class Audit:
    """The audit of one process: a file of its own, which nobody else may read.

    Args:
        folder: of the files; `logs/audit/` in the home of the platform if left out.
        file_bytes: length at which a file is full.
        max_waiting: most lines that wait for the disk; more are lost, and how many the file itself says.
    """

    def __init__(
        self, folder: Path | None = None, file_bytes: int = FILE_BYTES, max_waiting: int = MAX_WAITING
    ) -> None:
        folder = folder or home() / "logs" / "audit"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A pid comes back; with the time, the name does not.
        self.file = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{os.getpid()}.jsonl"
        self._lost = 0
        self._waiting: queue.Queue[Any] = queue.Queue(max_waiting)
        self._disk = _PrivateFile(self.file, maxBytes=file_bytes, backupCount=OLD_FILES, encoding="ascii")
        self._disk.setFormatter(_AuditLines())
        self._writer = _Writer(self._waiting, self._disk)
        self._writer.start()

    def write(self, entry: Entry) -> None:
        """Write down a request, on a thread that waits for the disk in the caller's place.

        Call it from one thread, the event loop's.
        """
        if self._lost and self._put({"lost": self._lost}):
            self._lost = 0
        if not self._put(entry):
            self._lost += 1
            if self._lost == 1:
                log.error("%d lines of the audit wait for the disk: others are lost", self._waiting.qsize())

    def close(self) -> None:
        """Write down what waits, and end."""
        self._waiting.join()
        if self._lost:
            self._put({"lost": self._lost})
            self._waiting.join()  # `stop` needs room for a word of its own
        self._writer.stop()
        self._disk.close()

    def _put(self, what: Entry | dict[str, Any]) -> bool:
        try:
            self._waiting.put_nowait((time.time(), what))
        except queue.Full:
            return False
        return True


class _Writer(QueueListener):
    """Makes records on its own thread of what the event loop has put into the queue."""

    def prepare(self, record: Any) -> logging.LogRecord:
        created, what = record
        return logging.makeLogRecord({"msg": what, "created": created})


class _PrivateFile(RotatingFileHandler):
    """A file of mode 0600 from its first byte on, whatever the umask."""

    def _open(self) -> TextIOWrapper:
        handle = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return os.fdopen(handle, "a", encoding=self.encoding)


class _AuditLines(logging.Formatter):
    """An entry of the audit as a line."""

    def format(self, record: logging.LogRecord) -> str:
        what: Any = record.msg
        fields = what if isinstance(what, dict) else {name: getattr(what, name) for name in what.__slots__}
        return _line(record.created, fields)


class JsonLines(logging.Formatter):
    """The log of the application: one JSON object a line, with the request that it speaks of.

    It reads `REQUEST_ID` when it formats: use it on a handler that the logging thread itself calls.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Write a record as a line."""
        written = {
            "level": record.levelname,
            "logger": record.name,
            "request_id": REQUEST_ID.get(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            written["exception"] = self.formatException(record.exc_info)
        return _line(record.created, written)
