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
class Remains:
    store: Path
    judge: Judge

    def check(self, possible: dict[str, list[State]]) -> dict[str, State]:
        """Check that store and names are complete and each name has a possible state. Returns the states."""
        for folder in (self.store / "adapters").iterdir():
            sound = digest_of_folder(folder)[:32] == folder.name
            self.judge.expect(sound, f"half a revision is visible: {folder}")
            self.judge.count("stored revisions compared with their digests")
        found = self._names()
        for name in found.keys() | possible.keys():
            state, expected = found.get(name, State()), possible.get(name, [State()])
            if state not in expected:
                self.judge.complain(f"{name} serves {state}, and may serve {expected}")
                continue
            self.judge.count("names compared with what was acknowledged")
            if len(expected) > 1 and expected[0] != expected[1]:
                which = "" if state == expected[1] else "not "
                self.judge.count(f"changes in flight at a kill that were {which}made")
            found[name] = expected[expected.index(state)]
            for revision in found[name].kept:
                there = (self.store / "adapters" / revision).is_dir()
                self.judge.expect(there, f"{name}: revision {revision} is not in the store")
        return {name: state for name, state in found.items() if state.history}

    def _names(self) -> dict[str, State]:
        """Read a copy: the server must recover the original."""
        with tempfile.TemporaryDirectory() as copy:
            for place in self.store.glob("names.sqlite*"):
                shutil.copy(place, copy)
            with closing(sqlite3.connect(Path(copy) / "names.sqlite")) as database:
                (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
                self.judge.expect(verdict == "ok", f"the database of names: {verdict}")
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
        """Check that the next start removed what the kill left over."""
        self.judge.expect(not list((self.store / "staging").iterdir()), "staging is not clean")
