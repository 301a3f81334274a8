"""Checks of what a killed server leaves on disk."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from soak.judge import Judge
from soak.known import Content
from soak.timeline import State
from turret_adapters.formats.files import digest_of_folder


@dataclass(frozen=True)
class StoreCheck:
    store: Path
    judge: Judge

    def check(self, possible: dict[str, list[State]]) -> dict[str, State]:
        """Check that store and names are complete and each name has a possible state. Returns the states."""
        for folder in (self.store / "adapters").iterdir():
            matches = digest_of_folder(folder)[:32] == folder.name
            self.judge.expect(matches, f"{folder} does not have the digest it is named after")
            self.judge.count("digests of stored revisions checked")
        found = self._names()
        for name in found.keys() | possible.keys():
            state, expected = found.get(name, State()), possible.get(name, [State()])
            if state not in expected:
                self.judge.violation(f"{name} has the state {state}, expected one of {expected}")
                continue
            self.judge.count("names compared with acknowledged changes")
            if len(expected) > 1 and expected[0] != expected[1]:
                result = "applied" if state == expected[1] else "not applied"
                self.judge.count(f"changes in flight at a kill, {result}")
            found[name] = expected[expected.index(state)]
            for revision in found[name].kept:
                stored = (self.store / "adapters" / revision).is_dir()
                self.judge.expect(stored, f"{name}: revision {revision} is not in the store")
        return {name: state for name, state in found.items() if state.history}

    def _names(self) -> dict[str, State]:
        """Read a copy: the server must recover the original."""
        with tempfile.TemporaryDirectory() as copy:
            for file in self.store.glob("names.sqlite*"):
                shutil.copy(file, copy)
            with closing(sqlite3.connect(Path(copy) / "names.sqlite")) as database:
                (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
                self.judge.expect(verdict == "ok", f"integrity check of names.sqlite: {verdict}")
                published = database.execute("SELECT name, revision FROM published ORDER BY number DESC")
                histories: defaultdict[str, list[str]] = defaultdict(list)
                for name, revision in published.fetchall():
                    histories[name].append(revision)
                splits = {
                    name: (revision, percent)
                    for name, revision, percent in database.execute(
                        "SELECT name, revision, percent FROM split"
                    )
                }
        return {name: State(tuple(history), splits.get(name)) for name, history in histories.items()}

    def received(self, content: Content) -> int:
        """Bytes of an upload from which it can continue."""
        for folder in (self.store / "uploads").iterdir():
            config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
            if tensors.exists() and config.exists() and config.read_bytes() == content.config:
                return tensors.stat().st_size
        return 0

    def check_clean(self) -> None:
        """Check that the next start removed incomplete revisions."""
        self.judge.expect(not list((self.store / "staging").iterdir()), "staging is not empty")
