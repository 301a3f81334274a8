"""The SQLite file of the names: its schema, transactions and errors.

Durability comes from SQLite's write-ahead log, synchronised at each commit (https://www.sqlite.org/wal.html).
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from turret_adapters.errors import (
    NamesCorruptError,
    StoreBusyError,
    StoreFailedError,
    StoreFullError,
)
from turret_adapters.store.disk import LOG_AFTER_SECONDS, errors_of_the_store

# Only programs other than the server that has the store's lock, such as a backup, keep the database locked.
BUSY_TIMES = 10
BUSY_SECONDS = BUSY_TIMES * LOG_AFTER_SECONDS

# Room for the log of dozens of removed names.
RESERVE_BYTES = 1 << 20

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE published (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    base TEXT NOT NULL,
    name TEXT NOT NULL,
    revision TEXT NOT NULL,
    source TEXT NOT NULL,
    published_at REAL NOT NULL
) STRICT;
CREATE INDEX by_name ON published (base, name, number);
"""
_SCHEMA_SINCE_2 = """
CREATE TABLE split (
    base TEXT NOT NULL,
    name TEXT NOT NULL,
    revision TEXT NOT NULL,
    percent INTEGER NOT NULL,
    PRIMARY KEY (base, name)
) STRICT;
"""
_SCHEMA_SINCE_3 = """
ALTER TABLE published ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE published ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE published ADD COLUMN source_marks TEXT NOT NULL DEFAULT '';
CREATE INDEX by_owner ON published (base, owner);
CREATE TABLE record (
    base TEXT NOT NULL,
    revision TEXT NOT NULL,
    reader TEXT NOT NULL,
    marks TEXT NOT NULL,
    spec BLOB NOT NULL,
    PRIMARY KEY (base, revision)
) STRICT;
"""
# Step n turns the schema of version n into that of version n + 1.
_STEPS = (_SCHEMA, _SCHEMA_SINCE_2, _SCHEMA_SINCE_3)
SCHEMA_VERSION = len(_STEPS)


class NamesDatabase:
    """Thread-safe: transactions run one after another."""

    def __init__(self, path: Path) -> None:
        """Opens the database for this process's user alone, and creates it if there is none.

        Raises:
            NamesCorruptError: it is not a sound database, or a newer Turret made it.
            StoreBusyError, StoreFullError, StoreFailedError
        """
        self._path = path
        self._reserve = path.with_name(f"{path.name}-reserve")
        self._lock = threading.Lock()
        with errors_of_the_store(path.parent):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            # SQLite gives a new log the permissions of the database; one of before may be there.
            for file in path.parent.glob(f"{path.name}*"):
                file.chmod(0o600)
        with self._translated():
            self._connection = sqlite3.connect(
                path, timeout=LOG_AFTER_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._set_up()
            except BaseException:
                self._connection.close()
                raise
        self._keep_reserve()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commits what the block writes; an exception in the block, or one of its own, changes nothing.

        Raises:
            StoreBusyError: another program has kept the database locked for `BUSY_SECONDS`.
            NamesCorruptError, StoreFullError, StoreFailedError
        """
        with self._lock, self._translated():
            self._begin()
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def write_even_if_full(self, write: Callable[[sqlite3.Connection], None]) -> None:
        """A transaction for what must be possible on a full disk: it gets the room of the reserve.

        Raises:
            StoreBusyError, NamesCorruptError, StoreFullError, StoreFailedError: as `transaction`.
        """
        try:
            with self.transaction() as database:
                write(database)
        except (StoreFullError, StoreFailedError) as error:
            # A disk quota that is used up is among the failures.
            log.warning("%s: trying again with the room of %s", error, self._reserve)
            self._reserve.unlink(missing_ok=True)
            with self.transaction() as database:
                write(database)
        self._keep_reserve()

    def _keep_reserve(self) -> None:
        """Take the reserve's room, if there is room."""
        try:
            handle = os.open(self._reserve, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(handle, 0, RESERVE_BYTES)
            finally:
                os.close(handle)
        except OSError:
            # Part of it would be as good as nothing, and keep room from others.
            self._reserve.unlink(missing_ok=True)

    def _begin(self) -> None:
        for left in reversed(range(BUSY_TIMES)):
            try:
                self._connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or not left:
                    raise
                if left == BUSY_TIMES - 1:
                    log.warning(
                        "waiting for %s, which another program has kept locked for %g s",
                        self._path,
                        LOG_AFTER_SECONDS,
                    )
            else:
                return

    def _set_up(self) -> None:
        database = self._connection
        (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreFailedError(
                f"names {str(self._path)!r}: expected a file system with shared memory, as SQLite's "
                "write-ahead log needs it, found none (put the store on a local disk)"
            )
        database.execute("PRAGMA synchronous = FULL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise NamesCorruptError(
                f"names {str(self._path)!r}: expected schema {SCHEMA_VERSION}, found {version} "
                "(serve this store with the version of Turret that made it, or choose another folder with "
                "--store)"
            )
        script = "".join(_STEPS[version:])
        if script:
            database.executescript(f"BEGIN;{script}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._corrupt(verdict)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turns SQLite's errors into AdapterErrors."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            names = f"names {str(self._path)!r}: "
            match error.sqlite_errorcode & 0xFF:  # the higher bits are details
                case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_ERROR:
                    raise self._corrupt(str(error)) from error
                case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                    raise StoreBusyError(
                        f"{names}another program has kept it locked for {BUSY_SECONDS:g} s (end that "
                        "program, and try again)"
                    ) from error
                case sqlite3.SQLITE_FULL:
                    raise StoreFullError(f"{names}the disk is full (free some space)") from error
                case _:
                    raise StoreFailedError(
                        f"{names}{error} (the server must be able to write in that folder)"
                    ) from error

    def _corrupt(self, found: str) -> NamesCorruptError:
        return NamesCorruptError(
            f"names {str(self._path)!r}: expected a sound SQLite database, found {found!r}. Stop the server, "
            "move it and its -wal and -shm files away (or repair it with SQLite's `.recover`), start the "
            "server, and load the adapters by name again; their files in the store are not touched"
        )
