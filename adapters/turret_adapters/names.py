"""Which revision each name serves, on disk: after a restart, however the process ended, it is the same one.

One SQLite file serves every server on the machine; names belong to a base model, so that two servers with
different bases share a store but not names. Each name has a stack of revisions: publishing pushes, rolling
back pops.
Durability is SQLite's: write-ahead log, synchronised at each commit (https://www.sqlite.org/wal.html).
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from turret_adapters.errors import AdapterNotFoundError
from turret_adapters.staging import exclusive
from turret_adapters.store_errors import (
    NamesCorruptError,
    RevisionNotFoundError,
    StoreBusyError,
    StoreFailedError,
    StoreFullError,
    errors_of_the_store,
)

SCHEMA_VERSION = 1
MAX_HISTORY = 32
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
_COLUMNS = "name, revision, source, published_at, number"


@dataclass(frozen=True, slots=True)
class Published:
    """That a name came to serve a revision. `number` grows with each, over all names; `published_at` is in
    seconds since 1970 by the clock of then.
    """

    name: str
    revision: str
    source: str
    published_at: float
    number: int


class Names:
    """The names of one base model. All methods may be called from any thread, and from several processes."""

    def __init__(self, place: Path, base: str) -> None:
        """Opens the database, and makes it if there is none.

        Args:
            place: the file; its folder must be there.
            base: what tells the base model from others.

        Raises:
            NamesCorruptError: it is no sound database, or a newer Turret made it.
            StoreBusyError, StoreFullError, StoreFailedError
        """
        self._place = place
        self._base = base
        self._lock = threading.Lock()
        # Two processes that switch a new file to the write-ahead log at once refuse each other.
        with errors_of_the_store(place.parent), exclusive(place.parent), self._told():
            self._database = sqlite3.connect(
                place, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._set_up()
            except BaseException:
                self._database.close()
                raise

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def publish(self, name: str, revision: str, source: str) -> Published:
        """Makes `name` serve a revision from now on. One that it serves already is published once."""
        with self._transaction() as database:
            current = self._rows(database, name)[:1]
            if current and current[0].revision == revision:
                database.execute(
                    "UPDATE published SET source = ? WHERE number = ?", (source, current[0].number)
                )
            else:
                database.execute(
                    "INSERT INTO published (base, name, revision, source, published_at) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (self._base, name, revision, source, time.time()),
                )
            rows = self._rows(database, name)
            for published in rows[MAX_HISTORY:]:
                database.execute("DELETE FROM published WHERE number = ?", (published.number,))
            return rows[0]

    def remove(self, name: str) -> None:
        """Forgets a name and its history.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._transaction() as database:
            self._history(database, name)
            database.execute("DELETE FROM published WHERE base = ? AND name = ?", (self._base, name))

    def rollback_target(self, name: str, revision: str | None = None) -> Published:
        """What `rollback` would make current; the beginning of a revision is enough.

        Raises:
            AdapterNotFoundError: there is no such name.
            RevisionNotFoundError: it has no earlier revision, or not this one.
        """
        history = self.history(name)
        if revision is not None:
            revision = _beginning_with(history, revision).revision
        return _earlier(history, revision)

    def rollback(self, name: str, revision: str | None = None) -> Published:
        """Makes `name` serve the revision before its current one, or the latest earlier one that is
        `revision`. Those after it are forgotten.

        Raises:
            AdapterNotFoundError: there is no such name.
            RevisionNotFoundError: it has no earlier revision, or not this one.
        """
        with self._transaction() as database:
            target = _earlier(self._history(database, name), revision)
            database.execute(
                "DELETE FROM published WHERE base = ? AND name = ? AND number > ?",
                (self._base, name, target.number),
            )
            return target

    def current(self) -> dict[str, Published]:
        """Each name with what it serves."""
        with self._transaction() as database:
            rows = database.execute(
                f"SELECT {_COLUMNS} FROM published WHERE number IN "  # noqa: S608 -- a constant
                "(SELECT MAX(number) FROM published WHERE base = ? GROUP BY name) ORDER BY name",
                (self._base,),
            )
            return {row[0]: Published(*row) for row in rows}

    def history(self, name: str) -> list[Published]:
        """What a name serves and served, the latest first, at most `MAX_HISTORY`.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._transaction() as database:
            return self._history(database, name)

    def histories(self, names: Iterable[str]) -> dict[str, list[Published]]:
        """The histories of several names; that of one that is not known is empty."""
        with self._transaction() as database:
            return {name: self._rows(database, name) for name in names}

    def find(self, name: str, beginning: str) -> Published:
        """The latest of a name's revisions, current or earlier, that begins like this.

        Raises:
            AdapterNotFoundError: there is no such name.
            RevisionNotFoundError: none of its revisions begins so, or several do.
        """
        return _beginning_with(self.history(name), beginning)

    def needed(self, depth: int = 2) -> set[str]:
        """The latest `depth` revisions of every name of every base: what the store must keep."""
        with self._transaction() as database:
            rows = database.execute(
                "SELECT DISTINCT revision FROM (SELECT revision, ROW_NUMBER() OVER "
                "(PARTITION BY base, name ORDER BY number DESC) AS place FROM published) WHERE place <= ?",
                (depth,),
            )
            return {revision for (revision,) in rows}

    def _history(self, database: sqlite3.Connection, name: str) -> list[Published]:
        rows = self._rows(database, name)
        if not rows:
            raise AdapterNotFoundError(f"no adapter has the name {name!r}")
        return rows

    def _rows(self, database: sqlite3.Connection, name: str) -> list[Published]:
        rows = database.execute(
            f"SELECT {_COLUMNS} FROM published WHERE base = ? AND name = ? "  # noqa: S608 -- a constant
            "ORDER BY number DESC",
            (self._base, name),
        )
        return [Published(*row) for row in rows]

    def _set_up(self) -> None:
        database = self._database
        (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreFailedError(
                f"names {str(self._place)!r}: expected a file system with shared memory, as SQLite's "
                "write-ahead log needs, found none (put the store on a local disk)"
            )
        database.execute("PRAGMA synchronous = FULL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            database.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        elif version != SCHEMA_VERSION:
            raise NamesCorruptError(
                f"names {str(self._place)!r}: expected schema {SCHEMA_VERSION}, found {version} "
                "(serve this store with the version of Turret that made it, or choose another folder)"
            )
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._corrupt(verdict)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._told():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

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


def _earlier(history: list[Published], revision: str | None) -> Published:
    for published in history[1:]:
        if revision in (None, published.revision):
            return published
    wanted = "an earlier revision" if revision is None else f"an earlier revision {revision!r}"
    found = ", ".join(published.revision for published in history[1:]) or "none"
    raise RevisionNotFoundError(f"adapter {history[0].name!r}: expected {wanted}, found {found}")


def _beginning_with(history: list[Published], beginning: str) -> Published:
    found = [published for published in history if published.revision.startswith(beginning)]
    if len({published.revision for published in found}) == 1:
        return found[0]
    others = ", ".join(dict.fromkeys(published.revision for published in found or history))
    wanted = "one revision that begins with" if found else "a revision that begins with"
    raise RevisionNotFoundError(f"adapter {history[0].name!r}: expected {wanted} {beginning!r}, found {others}")
