"""Which revision each name serves, on disk: after a restart, however the process ended, it is the same one.

One SQLite file serves every server on the machine; names belong to a base model, so that two servers with
different bases share a store but not names. Each name has a stack of revisions: publishing pushes, rolling
back pops. Besides, some percent of a name's requests may go to another revision of its stack.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from turret_adapters.errors import AdapterNotFoundError
from turret_adapters.store.names_database import NamesDatabase
from turret_adapters.store.ownership import Ownership, make_room
from turret_adapters.store.store_errors import RevisionNotFoundError

MAX_HISTORY = 32

_COLUMNS = "name, revision, source, published_at, number, owner, source_marks"
_NOBODYS = Ownership()


@dataclass(frozen=True, slots=True)
class Published:
    """That a name came to serve a revision. `number` grows with each, over all names; `published_at` is in
    seconds since 1970 by the clock of then; `source_marks` tell whether the source, a folder, has changed.
    """

    name: str
    revision: str
    source: str
    published_at: float
    number: int
    owner: str
    source_marks: str


@dataclass(frozen=True, slots=True)
class Record:
    """What was written down of a revision by a reader, see `turret_adapters.store.records`."""

    reader: str
    marks: str
    spec: bytes


@dataclass(frozen=True, slots=True)
class Split:
    """That `percent` of a name's requests go to a revision besides its current one."""

    revision: str
    percent: int


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
        self._base = base
        self._database = NamesDatabase(place)

    def close(self) -> None:
        self._database.close()

    def publish(
        self,
        name: str,
        revision: str,
        source: str,
        ownership: Ownership = _NOBODYS,
        *,
        source_marks: str = "",
        record: Record | None = None,
    ) -> Published:
        """Makes `name` serve a revision from now on. One that it serves already is published once.

        Raises:
            OwnerLimitError: the owner may not have so much.
        """
        with self._database.transaction() as database:
            current = self._rows(database, name)[:1]
            if current and current[0].revision == revision:
                database.execute(
                    "UPDATE published SET source = ?, source_marks = ?, owner = ?, bytes = ? "
                    "WHERE number = ?",
                    (source, source_marks, ownership.owner, ownership.num_bytes, current[0].number),
                )
            else:
                database.execute(
                    "INSERT INTO published (base, name, revision, source, published_at, source_marks, owner, "
                    "bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(self._base, name, revision, source, time.time()),
                        *(source_marks, ownership.owner, ownership.num_bytes),
                    ),
                )
            rows = self._rows(database, name)
            for published in rows[MAX_HISTORY:]:
                database.execute("DELETE FROM published WHERE number = ?", (published.number,))
            self._tidy_split(database, name)
            make_room(database, self._base, name, ownership)
            if record:
                self._record(database, revision, record)
            return rows[0]

    def remove(self, name: str) -> None:
        """Forgets a name and its history.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._database.transaction() as database:
            self._history(database, name)
            for table in ("published", "split"):
                database.execute(
                    f"DELETE FROM {table} WHERE base = ? AND name = ?",  # noqa: S608 -- a constant
                    (self._base, name),
                )

    def rollback_target(self, name: str, revision: str | None = None) -> Published:
        """What `rollback` would make current.

        Raises:
            AdapterNotFoundError: there is no such name.
            RevisionNotFoundError: it has no earlier revision, or not this one.
        """
        return _earlier(self.history(name), revision)

    def rollback(self, name: str, revision: str | None = None) -> Published:
        """Makes `name` serve the revision before its current one, or the latest earlier one that begins with
        `revision`. Those after it are forgotten.

        Raises:
            AdapterNotFoundError: there is no such name.
            RevisionNotFoundError: it has no earlier revision, or not this one.
        """
        with self._database.transaction() as database:
            target = _earlier(self._history(database, name), revision)
            database.execute(
                "DELETE FROM published WHERE base = ? AND name = ? AND number > ?",
                (self._base, name, target.number),
            )
            self._tidy_split(database, name)
            return target

    def split(self, name: str, beginning: str, percent: int) -> Split | None:
        """Makes `percent` of a name's requests go to another revision of its history; 0 of them ends that.

        Raises:
            AdapterNotFoundError: there is no such name.
            RevisionNotFoundError: none of its earlier revisions begins so, or several do.
        """
        with self._database.transaction() as database:
            history = self._history(database, name)
            database.execute("DELETE FROM split WHERE base = ? AND name = ?", (self._base, name))
            if not percent:
                return None
            others = [published for published in history if published.revision != history[0].revision]
            split = Split(_only(name, others, beginning).revision, percent)
            database.execute(
                "INSERT INTO split (base, name, revision, percent) VALUES (?, ?, ?, ?)",
                (self._base, name, split.revision, percent),
            )
            return split

    def splits(self) -> dict[str, Split]:
        """The names of which some requests go to another revision than the current one."""
        with self._database.transaction() as database:
            rows = database.execute(
                "SELECT name, revision, percent FROM split WHERE base = ? ORDER BY name", (self._base,)
            )
            return {name: Split(revision, percent) for name, revision, percent in rows}

    def current(self) -> dict[str, Published]:
        """Each name with what it serves."""
        with self._database.transaction() as database:
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
        with self._database.transaction() as database:
            return self._history(database, name)

    def histories(self, names: Iterable[str]) -> dict[str, list[Published]]:
        """The histories of several names; that of one that is not known is empty."""
        with self._database.transaction() as database:
            return {name: self._rows(database, name) for name in names}

    def find(self, name: str, beginning: str) -> Published:
        """The latest of a name's revisions, current or earlier, that begins like this.

        Raises:
            AdapterNotFoundError: there is no such name.
            RevisionNotFoundError: none of its revisions begins so, or several do.
        """
        return _only(name, self.history(name), beginning)

    def needed(self, depth: int = 2) -> set[str]:
        """The latest `depth` revisions of every name of every base, and those that share its requests: what
        the store must keep.
        """
        with self._database.transaction() as database:
            rows = database.execute(
                "SELECT DISTINCT revision FROM (SELECT revision, ROW_NUMBER() OVER "
                "(PARTITION BY base, name ORDER BY number DESC) AS place FROM published) WHERE place <= ? "
                "UNION SELECT revision FROM split",
                (depth,),
            )
            return {revision for (revision,) in rows}

    def owned(self, owner: str) -> set[str]:
        """The revisions in the histories of names that are theirs."""
        with self._database.transaction() as database:
            rows = database.execute(
                "SELECT DISTINCT revision FROM published WHERE base = ? AND owner = ?", (self._base, owner)
            )
            return {revision for (revision,) in rows}

    def record(self, revision: str, record: Record) -> None:
        """Writes down what is known of a revision."""
        with self._database.transaction() as database:
            self._record(database, revision, record)

    def records(self) -> dict[str, Record]:
        """What is known of revisions."""
        with self._database.transaction() as database:
            rows = database.execute(
                "SELECT revision, reader, marks, spec FROM record WHERE base = ?", (self._base,)
            )
            return {revision: Record(*rest) for revision, *rest in rows}

    def tidy_records(self) -> None:
        """Forgets what is known of revisions that no name has any more."""
        with self._database.transaction() as database:
            database.execute("DELETE FROM record WHERE revision NOT IN (SELECT revision FROM published)")

    def forget_record(self, revision: str) -> None:
        """What was known of a revision is not so."""
        with self._database.transaction() as database:
            database.execute("DELETE FROM record WHERE base = ? AND revision = ?", (self._base, revision))

    def _record(self, database: sqlite3.Connection, revision: str, record: Record) -> None:
        database.execute(
            "INSERT OR REPLACE INTO record (base, revision, reader, marks, spec) VALUES (?, ?, ?, ?, ?)",
            (self._base, revision, record.reader, record.marks, record.spec),
        )

    def _tidy_split(self, database: sqlite3.Connection, name: str) -> None:
        """Ends a split with a revision that has become current, or is no longer in the history."""
        rows = self._rows(database, name)
        others = {published.revision for published in rows} - {rows[0].revision}
        ended = database.execute(
            "SELECT revision FROM split WHERE base = ? AND name = ?", (self._base, name)
        ).fetchone()
        if ended and ended[0] not in others:
            database.execute("DELETE FROM split WHERE base = ? AND name = ?", (self._base, name))

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


def _earlier(history: list[Published], beginning: str | None) -> Published:
    if beginning is not None:
        return _only(history[0].name, history[1:], beginning)
    if not history[1:]:
        raise RevisionNotFoundError(f"adapter {history[0].name!r}: expected an earlier revision, found none")
    return history[1]


def _only(name: str, among: list[Published], beginning: str) -> Published:
    """The latest of those that begin like this, if all of them are one revision."""
    found = [published for published in among if published.revision.startswith(beginning)]
    if len({published.revision for published in found}) == 1:
        return found[0]
    others = ", ".join(dict.fromkeys(published.revision for published in found or among))
    raise RevisionNotFoundError(
        f"adapter {name!r}: expected {'one' if found else 'a'} revision that begins with {beginning!r}, "
        f"found {others or 'none'}"
    )
