"""The file that names are kept in: its schema, its transactions, and what can be wrong with it.

Durability is SQLite's: write-ahead log, synchronised at each commit (https://www.sqlite.org/wal.html).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from turret_adapters.store.staging import exclusive
from turret_adapters.store.store_errors import (
    NamesCorruptError,
    StoreBusyError,
    StoreFailedError,
    StoreFullError,
    errors_of_the_store,
)

BUSY_SECONDS = 30.0

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
# What makes the schema of each version of that before it.
_STEPS = (_SCHEMA, _SCHEMA_SINCE_2, _SCHEMA_SINCE_3)
SCHEMA_VERSION = len(_STEPS)


class NamesDatabase:
    """May be used from any thread, and from several processes."""

    def __init__(self, place: Path) -> None:
        """Opens the database, and makes it if there is none.

        Raises:
            NamesCorruptError: it is no sound database, or a newer Turret made it.
            StoreBusyError, StoreFullError, StoreFailedError
        """
        self._place = place
        self._lock = threading.Lock()
        # Two processes that switch a new file to the write-ahead log at once refuse each other.
        with errors_of_the_store(place.parent), exclusive(place.parent), self._told():
            self._connection = sqlite3.connect(
                place, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._set_up()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _set_up(self) -> None:
        database = self._connection
        (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreFailedError(
                f"names {str(self._place)!r}: expected a file system with shared memory, as SQLite's "
                "write-ahead log needs, found none (put the store on a local disk)"
            )
        database.execute("PRAGMA synchronous = FULL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise NamesCorruptError(
                f"names {str(self._place)!r}: expected schema {SCHEMA_VERSION}, found {version} "
                "(serve this store with the version of Turret that made it, or choose another folder)"
            )
        script = "".join(_STEPS[version:])
        if script:
            database.executescript(f"BEGIN;{script}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._corrupt(verdict)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tells SQLite's errors as an `AdapterError`."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            where = f"names {str(self._place)!r}: "
            match error.sqlite_errorcode & 0xFF:  # the rest is detail
                case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_ERROR:
                    raise self._corrupt(str(error)) from error
                case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                    raise StoreBusyError(
                        f"{where}another process has kept it locked for {BUSY_SECONDS:g} s"
                    ) from error
                case sqlite3.SQLITE_FULL:
                    raise StoreFullError(f"{where}the disk is full (free some space)") from error
                case _:
                    raise StoreFailedError(
                        f"{where}{error} (the server must be able to write in that folder)"
                    ) from error

    def _corrupt(self, found: str) -> NamesCorruptError:
        return NamesCorruptError(
            f"names {str(self._place)!r}: expected a sound SQLite database, found {found!r}. Stop the "
            "servers, move it and its -wal and -shm files away (or repair it with SQLite's `.recover`), "
            "start them, and load the adapters by name again; their files in the store are not touched"
        )
