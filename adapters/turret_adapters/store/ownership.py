"""Whose a name is, and how much an owner may have."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from turret_adapters.store.store_errors import OwnerLimitError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """Who publishes a revision that takes `num_bytes`, and the most that is theirs: names, and bytes of all
    revisions in their names' histories. What nobody in particular owns has the owner "".
    """

    owner: str = ""
    num_bytes: int = 0
    max_names: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    revision: str
    num_bytes: int
    current: bool
    shared: bool


def make_room(database: sqlite3.Connection, base: str, name: str, ownership: Ownership) -> None:
    """Forgets revisions that the owner's names served once, the oldest first, until all that is left is what
    the owner may have. `name` has been published already.

    Raises:
        OwnerLimitError: what the names serve is more.
    """
    if ownership.max_names is None and ownership.max_bytes is None:
        return
    rows = _rows(database, base, ownership.owner)
    num_names = sum(row.current for row in rows)
    if ownership.max_names is not None and num_names > ownership.max_names:
        raise OwnerLimitError(
            f"{ownership.owner!r} may have {ownership.max_names} adapters and has {num_names - 1} besides "
            f"{name!r}; unload one first",
            limit="max_adapters",
        )
    if ownership.max_bytes is None:
        return
    while (total := sum({row.revision: row.num_bytes for row in rows}.values())) > ownership.max_bytes:
        oldest = next((row for row in rows if not row.current and not row.shared), None)
        if oldest is None:
            raise OwnerLimitError(
                f"{ownership.owner!r} may have adapters of {ownership.max_bytes} bytes; {name!r} takes "
                f"{ownership.num_bytes}, and with what its other names serve it would be {total}; unload one "
                "first",
                limit="max_adapter_bytes",
            )
        database.execute("DELETE FROM published WHERE number = ?", (oldest.number,))
        rows.remove(oldest)


def _rows(database: sqlite3.Connection, base: str, owner: str) -> list[_Row]:
    """What the owner published, the oldest first: whether it is what a name serves, and whether some of a
    name's requests go to it.
    """
    found = database.execute(
        "SELECT number, revision, bytes, "
        "number = (SELECT MAX(number) FROM published WHERE base = one.base AND name = one.name), "
        "EXISTS (SELECT 1 FROM split WHERE base = one.base AND name = one.name AND revision = one.revision) "
        "FROM published AS one WHERE base = ? AND owner = ? ORDER BY number",
        (base, owner),
    )
    return [_Row(*row) for row in found]
