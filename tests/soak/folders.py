"""Creates, changes, corrupts and deletes adapter folders that a server watches."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from soak.changes import AdapterSource, corrupt_folder
from soak.judge import Judge
from soak.known import Content
from soak.timeline import State, Timeline
from turret_client import Client, NotFoundError

_SERVED_SECONDS = 120.0
# Longer than a folder must stay unchanged before the server reads it.
_SETTLE_SECONDS = 2.5


@dataclass
class FolderChanger:
    """Changes some folders of `--adapters`, one after another, until `over` is set."""

    client: Client
    root: Path
    names: Sequence[str]
    source: AdapterSource
    judge: Judge
    timeline: Timeline
    pause: float
    seed: int
    over: threading.Event

    def run(self) -> None:
        self._rng = random.Random(self.seed)
        while not self.over.is_set():
            name = self._rng.choice(self.names)
            state = self.timeline.now(name)
            changes: list[Callable[[str, State], None]] = [self._write]
            if state.history:
                changes = [self._write, self._replace, self._corrupt, self._delete]
            self._rng.choice(changes)(name, state)
            self.over.wait(self._rng.uniform(0, 2 * self.pause))

    def _write(self, name: str, state: State) -> None:
        content = self.source.new(self._rng)
        with self.timeline.change(name, state.loaded(content.revision)) as change:
            content.write(self.root / name)
            change.done = self._wait_for(name, content.revision)
        self.judge.count("folders changed" if state.history else "folders created")

    def _replace(self, name: str, state: State) -> None:
        """Write a folder in pieces with pauses, like a copy over a network, or by one rename."""
        content = self.source.new(self._rng)
        with self.timeline.change(name, state.loaded(content.revision)) as change:
            if self._rng.random() < 0.5:
                self._write_in_pieces(content, self.root / name)
            else:
                self._rename(content, name)
            change.done = self._wait_for(name, content.revision)
        self.judge.count("folders written in pieces or replaced by a rename")

    def _write_in_pieces(self, content: Content, folder: Path) -> None:
        (folder / "adapter_config.json").write_bytes(content.config)
        with (folder / "adapter_model.safetensors").open("wb", buffering=0) as file:
            for offset in range(0, len(content.tensors), 1 + len(content.tensors) // 4):
                file.write(content.tensors[offset : offset + 1 + len(content.tensors) // 4])
                time.sleep(0.3)

    def _rename(self, content: Content, name: str) -> None:
        new, old = self.source.write(content), self.source.folder / f"old-{name}"
        (self.root / name).rename(old)
        new.rename(self.root / name)
        shutil.rmtree(old)

    def _corrupt(self, name: str, state: State) -> None:
        """Corrupt a folder, then repair it: the old revision is served until the repaired one is."""
        corrupt_folder(self.root / name, self._rng)
        time.sleep(_SETTLE_SECONDS)
        adapter = self.client.get_adapter(name)
        self.judge.expect(
            adapter.revision == state.history[0], f"{name}: a corrupt folder replaced {state} by {adapter}"
        )
        self.judge.count("folders corrupted")
        self._write(name, state)

    def _delete(self, name: str, _: State) -> None:
        with self.timeline.change(name, State()) as change:
            shutil.rmtree(self.root / name)
            change.done = self._wait_for(name, "")
        self.judge.count("folders deleted")

    def _wait_for(self, name: str, revision: str) -> bool:
        """Wait until the server serves the folder's content."""
        end = time.monotonic() + _SERVED_SECONDS
        while time.monotonic() < end:
            try:
                found = self.client.get_adapter(name).revision
            except NotFoundError:
                found = ""
            if found == revision:
                return True
            time.sleep(0.05)
        self.judge.violation(f"{name}: the folder's revision {revision or 'none'} was not served in time")
        return False
