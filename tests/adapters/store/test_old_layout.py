"""A store that an older version made is taken over as it is: files, names of each schema, partial uploads."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import pytest

from support.adapter_files import CONFIG, digest, files, read_folder, revision, write_folder
from turret_adapters.spec import Split
from turret_adapters.store.names import Names
from turret_adapters.store.store import AdapterStore

OLD, NEW = revision(b"old"), revision(b"new")

# As the older versions wrote it, not as this one would.
SCHEMAS = {
    1: """
        CREATE TABLE published (number INTEGER PRIMARY KEY AUTOINCREMENT, base TEXT NOT NULL, name TEXT NOT
        NULL,
            revision TEXT NOT NULL, source TEXT NOT NULL, published_at REAL NOT NULL) STRICT;
        CREATE INDEX by_name ON published (base, name, number);
    """,
    2: """
        CREATE TABLE split (base TEXT NOT NULL, name TEXT NOT NULL, revision TEXT NOT NULL,
            percent INTEGER NOT NULL, PRIMARY KEY (base, name)) STRICT;
    """,
    3: """
        ALTER TABLE published ADD COLUMN owner TEXT NOT NULL DEFAULT '';
        ALTER TABLE published ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE published ADD COLUMN source_marks TEXT NOT NULL DEFAULT '';
        CREATE INDEX by_owner ON published (base, owner);
        CREATE TABLE record (base TEXT NOT NULL, revision TEXT NOT NULL, reader TEXT NOT NULL,
            marks TEXT NOT NULL, spec BLOB NOT NULL, PRIMARY KEY (base, revision)) STRICT;
    """,
}


def make_names(path: Path, version: int) -> None:
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode = WAL")
    database.executescript("".join(SCHEMAS[step] for step in range(1, version + 1)))
    database.execute(f"PRAGMA user_version = {version}")
    rows = [("llama", "poet", OLD, "/poet", 1.0), ("llama", "poet", NEW, "/poet", 2.0)]
    database.executemany(
        "INSERT INTO published (base, name, revision, source, published_at) VALUES (?, ?, ?, ?, ?)", rows
    )
    if version >= 2:
        database.execute("INSERT INTO split VALUES ('llama', 'poet', ?, 25)", (OLD,))
    if version >= 3:
        database.execute("UPDATE published SET owner = 'acme', bytes = 24")
        database.execute("INSERT INTO record VALUES ('llama', ?, 'reader', 'marks', x'00')", (NEW,))
    database.commit()
    database.close()


def make_store(root: Path, version: int) -> None:
    for tensors in (b"old", b"new"):
        folder = write_folder(root / "adapters" / revision(tensors), tensors)
        for path in folder.iterdir():
            path.chmod(0o444)
    for lease in ("of a server that was killed", "of another"):
        (root / "leases" / lease).mkdir(parents=True)
        (root / "leases" / lease / OLD).touch()
    write_folder(root / "staging" / "abandoned")
    owner = hashlib.sha256(b"acme").hexdigest()[:16]
    key = hashlib.sha256(repr(("acme", digest(), CONFIG)).encode()).hexdigest()
    write_folder(root / "uploads" / f"7-{owner}-{key}", b"tens")
    make_names(root / "names.sqlite", version)
    for path in (root, *root.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("version", SCHEMAS)
def test_a_store_of_before_is_taken_over_as_it_is(version: int, tmp_path: Path) -> None:
    make_store(tmp_path, version)
    for _ in ("the first start", "the next"):
        store = AdapterStore(tmp_path, max_bytes=24)
        names = Names(tmp_path / "names.sqlite", "llama")
        assert read_folder(store.path(OLD)) == files(b"old")
        assert read_folder(store.path(NEW)) == files(b"new")
        store.verify(NEW)
        assert [entry.revision for entry in names.history("poet")] == [NEW, OLD]
        assert {entry.owner for entry in names.history("poet")} == {"acme" if version >= 3 else ""}
        assert names.splits() == ({"poet": Split(OLD, 25)} if version >= 2 else {})
        assert list(names.records()) == ([NEW] if version >= 3 else [])
        assert list((tmp_path / "staging").iterdir()) == []
        assert not (tmp_path / "leases").exists()
        with store.receive(digest(), CONFIG, 7, "acme") as upload:
            assert upload.offset == 4
        names.close()
        store.close()
    store = AdapterStore(tmp_path, max_bytes=24)
    names = Names(tmp_path / "names.sqlite", "llama")
    assert names.rollback("poet").revision == OLD
    assert store.collect(names.needed) == [NEW], "no lease of before holds it"
    names.close()
    store.close()


def test_taking_over_leaves_the_files_as_they_look(tmp_path: Path) -> None:
    """Otherwise every record would be invalid, and the first start would read all adapters."""
    make_store(tmp_path, 3)
    path = tmp_path / "adapters" / NEW / "adapter_model.safetensors"
    before = path.stat()
    store = AdapterStore(tmp_path)
    assert (path.stat().st_mtime_ns, path.stat().st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    store.close()
