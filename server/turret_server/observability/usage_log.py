"""The usage log for billing: one JSON object a line for each request.

An entry is written and fsynced before `append`'s future is done, and the client gets the end of its answer
after that. So

- a request whose end its client received has exactly one line, whatever kills the process or the machine, as
  far as the disk keeps what it has acknowledged;
- no request has two lines;
- a request whose end its client did not receive, because the client disconnected, the disk failed or the
  server was killed, has one line or none. One that a crash ended has none: its tokens are not billed.

A line that a crash left unfinished is cut off at the next start. While the file cannot be written (the disk
is full or fails), `check` raises, so that no request begins that could not be billed. Requests that run
finish and fail at their end; their entries are kept, and are written as soon as that is possible.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from turret_adapters.formats.files import sync, write_whole
from turret_server.errors import ConfigError, UsageLogFailedError

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0

_BLOCK_BYTES = 1 << 16


@dataclass(slots=True, eq=False)
class _Entry:
    line: bytes
    written: Future[None] = field(default_factory=Future)

    def __post_init__(self) -> None:
        # It is written even if nobody waits for it any more.
        self.written.set_running_or_notify_cancel()


class UsageLog:
    """Appends to a file from a thread of its own: entries that arrive during one fsync share the next.

    One process writes a file at a time. After the file was renamed, as by logrotate, the next entry begins a
    new one; an entry that arrives just then may still go to the old one.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file, and cut off a line that a crash left unfinished.

        Raises:
            ConfigError: it cannot be written, another process writes it, or it is no usage log.
        """
        self._path = path
        try:
            self._handle = _open(path)
        except OSError as error:
            raise ConfigError(f"--usage-log {path}: {_reason(error)}") from error
        # Offset of what a failed attempt left behind, until it is cut off.
        self._torn_at: int | None = None
        self._error: str | None = None
        self._entries: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="turret-usage-log")
        self._thread.start()

    def check(self) -> None:
        """Check that entries can be written.

        Raises:
            UsageLogFailedError: the last attempt failed.
        """
        if self._error is not None:
            raise _failure(self._error)

    def append(self, entry: Mapping[str, object]) -> Future[None]:
        """Write an entry. The future is done when the entry is on the disk, or fails with
        `UsageLogFailedError` when an attempt has failed; the entry is kept all the same.
        """
        added = _Entry(json.dumps(entry).encode() + b"\n")
        with self._changed:
            assert not self._closing
            self._entries.append(added)
            self._changed.notify()
        return added.written

    def close(self) -> None:
        """Write the remaining entries. Those that cannot be written go to the log, to be added by hand."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        os.close(self._handle)
        for entry in self._entries:
            log.critical("%s lacks this line: %s", self._path, entry.line.decode().rstrip())

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._entries or self._closing)
                batch, last = list(self._entries), self._closing
            if batch and not self._attempt(batch) and not last:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=RETRY_SECONDS)
            elif last:
                return

    def _attempt(self, batch: list[_Entry]) -> bool:
        try:
            self._write(b"".join(entry.line for entry in batch))
        except OSError as error:
            if self._error is None:
                log.critical(
                    "%s cannot be written (%s); requests are refused until it can", self._path, _reason(error)
                )
            self._error = _reason(error)
            for entry in batch:
                if not entry.written.done():
                    entry.written.set_exception(_failure(self._error))
            return False
        if self._error is not None:
            log.warning("%s can be written again", self._path)
        self._error = None
        with self._changed:
            for _ in batch:
                self._entries.popleft()
        for entry in batch:
            if not entry.written.done():
                entry.written.set_result(None)
        return True

    def _write(self, lines: bytes) -> None:
        size = os.fstat(self._handle).st_size
        if self._torn_at is not None:
            # Also if only fsync failed: the kernel may have dropped those pages and report the next fsync
            # as a success, so they are written again.
            size = min(size, self._torn_at)
            os.ftruncate(self._handle, size)
            self._torn_at = None
        if _is_moved(self._path, self._handle):
            handle = _open(self._path)
            os.close(self._handle)
            self._handle, size = handle, os.fstat(handle).st_size
        try:
            write_whole(self._handle, lines)
            os.fsync(self._handle)
        except OSError:
            self._torn_at = size
            raise


def _open(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _cut_torn_line(path, handle)
        os.fsync(handle)
        sync(path.parent)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _cut_torn_line(path: Path, handle: int) -> None:
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("expected a regular file, found another")
    size = status.st_size
    whole = _end_of_last_line(handle, size)
    if whole == size:
        return
    # Bytes that did not reach the disk may be zeros. Anything else was not written here.
    if os.pread(handle, 1, whole) not in (b"{", b"\0"):
        raise OSError("expected a usage log, found another kind of file")
    os.ftruncate(handle, whole)
    log.warning("%s: cut off %d bytes of a line that a crash left unfinished", path, size - whole)


def _end_of_last_line(handle: int, size: int) -> int:
    end = size
    while end:
        start = max(end - _BLOCK_BYTES, 0)
        found = os.pread(handle, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _is_moved(path: Path, handle: int) -> bool:
    try:
        return not os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return True


def _reason(error: OSError) -> str:
    if isinstance(error, BlockingIOError):
        return "another process writes it; give each server its own file"
    return error.strerror or str(error)


def _failure(reason: str) -> UsageLogFailedError:
    return UsageLogFailedError(f"the usage log cannot be written ({reason}); try again later")
