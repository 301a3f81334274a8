"""Which revision each name serves, on disk, so that it is the same one after a restart or a crash.

The names of all base models are in one SQLite file; each belongs to one base. A name has a stack of
revisions: publishing pushes one, rolling back pops. A percentage of a name's requests can go to another
revision of its stack (a split).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from turret_adapters.errors import AdapterNotFoundError, OwnerLimitError, RevisionNotFoundError
from turret_adapters.spec import Split
from turret_adapters.store.names_database import NamesDatabase

MAX_HISTORY = 32

_COLUMNS = "name, revision, source, published_at, number, owner, source_marks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """The owner of a revision of `num_bytes` bytes, and the owner's limits: of names, and of the bytes of all
    revisions in their names' histories. The owner "" stands for no tenant.
    """

    owner: str = ""
    num_bytes: int = 0
    max_names: int | None = None
    max_bytes: int | None = None


NO_OWNER = Ownership()


@dataclass(frozen=True, slots=True)
class Published:
    """One entry of a name's history. `number` grows over all names; `published_at` is in seconds since 1970;
    `source_marks` change when the source, a folder, changes.
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
    """The encoded spec of a revision, see `turret_adapters.store.records`."""

    reader: str
    marks: str
    spec: bytes


class Names:
    """The names of one base model. Thread-safe. Every method that changes something does all of it or
    nothing, and raises StoreBusyError, StoreFullError, StoreFailedError or NamesCorruptError if it fails.
    """

    def __init__(self, path: Path, base: str) -> None:
        """Opens the database, and creates it if there is none.

        Args:
            path: the file, in an existing folder.
            base: identifies the base model.

        Raises:
            NamesCorruptError: it is not a sound database, or a newer Turret made it.
            StoreBusyError, StoreFullError, StoreFailedError
        """
        self._base = base
        self._database = NamesDatabase(path)

    def close(self) -> None:
        self._database.close()

    def publish(
        self,
        name: str,
        revision: str,
        source: str,
        ownership: Ownership = NO_OWNER,
        *,
        source_marks: str = "",
        record: Record | None = None,
    ) -> Published:
        """Pushes a revision on the history of `name`; if it is the current one, updates its entry instead.

        The oldest revisions of the owner's names are dropped until the owner's limits are kept.

        Raises:
            OwnerLimitError: the current revisions of the owner's names exceed the limits.
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
            _keep_limits(database, self._base, name, ownership)
            if record:
                self._insert_record(database, revision, record)
            return rows[0]

    def remove(self, name: str) -> None:
        """Deletes a name and its history, if there is one; also on a full disk, where it may give room."""

        def remove(database: sqlite3.Connection) -> None:
            for table in ("published", "split"):
                database.execute(
                    f"DELETE FROM {table} WHERE base = ? AND name = ?",  # noqa: S608 -- a constant
                    (self._base, name),
                )

        self._database.write_even_if_full(remove)

    def rollback_target(self, name: str, revision: str | None = None) -> Published:
        """The entry that `rollback` with the same arguments would make current.

        Raises:
            AdapterNotFoundError: there is no such name.
            RevisionNotFoundError: it has no earlier revision, or not this one.
        """
        return _earlier(self.history(name), revision)

    def rollback(self, name: str, revision: str | None = None) -> Published:
        """Makes the revision before the current one current again, or the latest earlier one that begins with
        `revision`. The entries after it are deleted.

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
        """Sends `percent` of a name's requests to another revision of its history; 0 ends the split.

        Raises:
            AdapterNotFoundError: there is no such name.
            RevisionNotFoundError: none of its other revisions begins with `beginning`, or several do.
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
        """The splits, by name."""
        with self._database.transaction() as database:
            rows = database.execute(
                "SELECT name, revision, percent FROM split WHERE base = ? ORDER BY name", (self._base,)
            )
            return {name: Split(revision, percent) for name, revision, percent in rows}

    def current(self) -> dict[str, Published]:
        """The current entry of every name."""
        with self._database.transaction() as database:
            rows = database.execute(
                f"SELECT {_COLUMNS} FROM published WHERE number IN "  # noqa: S608 -- a constant
                "(SELECT MAX(number) FROM published WHERE base = ? GROUP BY name) ORDER BY name",
                (self._base,),
            )
            return {row[0]: Published(*row) for row in rows}

    def history(self, name: str) -> list[Published]:
        """The history of a name, the current entry first, at most `MAX_HISTORY` entries.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._database.transaction() as database:
            return self._history(database, name)

    def histories(self, names: Iterable[str]) -> dict[str, list[Published]]:
        """The histories of several names; the history of an unknown name is empty."""
        with self._database.transaction() as database:
            return {name: self._rows(database, name) for name in names}

    def find(self, name: str, beginning: str) -> Published:
        """The latest entry of a name's history whose revision begins with `beginning`.

        Raises:
            AdapterNotFoundError: there is no such name.
            RevisionNotFoundError: none of its revisions begins with it, or several do.
        """
        return _only(name, self.history(name), beginning)

    def needed(self, depth: int = 2) -> set[str]:
        """The revisions that the store must keep: the latest `depth` of every name of every base, and those
        of splits.
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
        """The revisions that an owner has published."""
        with self._database.transaction() as database:
            rows = database.execute(
                "SELECT DISTINCT revision FROM published WHERE base = ? AND owner = ?", (self._base, owner)
            )
            return {revision for (revision,) in rows}

    def save_record(self, revision: str, record: Record) -> None:
        """Saves the record of a revision."""
        with self._database.transaction() as database:
            self._insert_record(database, revision, record)

    def records(self) -> dict[str, Record]:
        """The saved records, by revision."""
        with self._database.transaction() as database:
            rows = database.execute(
                "SELECT revision, reader, marks, spec FROM record WHERE base = ?", (self._base,)
            )
            return {revision: Record(*rest) for revision, *rest in rows}

    def tidy_records(self) -> None:
        """Deletes the records of revisions that no name of any base has."""
        with self._database.transaction() as database:
            database.execute("DELETE FROM record WHERE revision NOT IN (SELECT revision FROM published)")

    def forget_record(self, revision: str) -> None:
        """Deletes the record of a revision."""
        with self._database.transaction() as database:
            database.execute("DELETE FROM record WHERE base = ? AND revision = ?", (self._base, revision))

    def _insert_record(self, database: sqlite3.Connection, revision: str, record: Record) -> None:
        database.execute(
            "INSERT OR REPLACE INTO record (base, revision, reader, marks, spec) VALUES (?, ?, ?, ?, ?)",
            (self._base, revision, record.reader, record.marks, record.spec),
        )

    def _tidy_split(self, database: sqlite3.Connection, name: str) -> None:
        """Ends a split whose revision has become current or has left the history."""
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
            raise AdapterNotFoundError(f"no adapter has the name {name!r}; load it first")
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
        raise RevisionNotFoundError(
            f"adapter {history[0].name!r}: expected an earlier revision, found none (load the one that you "
            "want)"
        )
    return history[1]


def _only(name: str, entries: list[Published], beginning: str) -> Published:
    """The latest entry whose revision begins with `beginning`, if they all have the same revision."""
    found = [entry for entry in entries if entry.revision.startswith(beginning)]
    if len({entry.revision for entry in found}) == 1:
        return found[0]
    others = ", ".join(dict.fromkeys(entry.revision for entry in found or entries))
    raise RevisionNotFoundError(
        f"adapter {name!r}: expected {'one' if found else 'a'} revision that begins with {beginning!r}, "
        f"found {others or 'none'}"
    )


@dataclass(frozen=True, slots=True)
class _Owned:
    number: int
    revision: str
    num_bytes: int
    current: bool
    split: bool


def _keep_limits(database: sqlite3.Connection, base: str, name: str, ownership: Ownership) -> None:
    """Deletes the oldest entries of the owner that are neither current nor of a split until the limits are
    kept. `name` has been published already.

    Raises:
        OwnerLimitError: the other entries alone exceed them.
    """
    if ownership.max_names is None and ownership.max_bytes is None:
        return
    entries = _owned_entries(database, base, ownership.owner)
    num_names = sum(entry.current for entry in entries)
    if ownership.max_names is not None and num_names > ownership.max_names:
        raise OwnerLimitError(
            f"adapter {name!r}: tenant {ownership.owner!r} may have {ownership.max_names} adapters "
            f"(max_adapters), found {num_names - 1} others; unload one first",
            limit="max_adapters",
        )
    if ownership.max_bytes is None:
        return
    while (
        total := sum({entry.revision: entry.num_bytes for entry in entries}.values())
    ) > ownership.max_bytes:
        oldest = next((entry for entry in entries if not entry.current and not entry.split), None)
        if oldest is None:
            raise OwnerLimitError(
                f"adapter {name!r}: tenant {ownership.owner!r} may have adapters of {ownership.max_bytes} "
                f"bytes (max_adapter_bytes), found {total} with the {ownership.num_bytes} of this one; "
                "unload one first",
                limit="max_adapter_bytes",
            )
        database.execute("DELETE FROM published WHERE number = ?", (oldest.number,))
        entries.remove(oldest)


def _owned_entries(database: sqlite3.Connection, base: str, owner: str) -> list[_Owned]:
    """The entries that the owner published, the oldest first."""
    found = database.execute(
        "SELECT number, revision, bytes, "
        "number = (SELECT MAX(number) FROM published WHERE base = one.base AND name = one.name), "
        "EXISTS (SELECT 1 FROM split WHERE base = one.base AND name = one.name AND revision = one.revision) "
        "FROM published AS one WHERE base = ? AND owner = ? ORDER BY number",
        (base, owner),
    )
    return [_Owned(*row) for row in found]
