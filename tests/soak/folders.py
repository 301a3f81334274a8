"""Names whose folders appear, change, break and vanish under a server that watches them."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from soak.changes import Shelf, break_folder
from soak.judge import Judge
from soak.known import Content
from soak.timeline import State, Timeline
from turret_client import Client, NotFoundError

_SEEN_SECONDS = 120.0
# Longer than a folder must stay alike to be looked at.
_SETTLE_SECONDS = 2.5


@dataclass
class FolderChanger:
    """Changes some folders of `--adapters`, one after another, until `over` is set."""

    client: Client
    root: Path
    names: Sequence[str]
    shelf: Shelf
    judge: Judge
    timeline: Timeline
    pause: float
    seed: int
    over: threading.Event

    def run(self) -> None:
        self._chance = random.Random(self.seed)
        while not self.over.is_set():
            name = self._chance.choice(self.names)
            state = self.timeline.now(name)
            changes: list[Callable[[str, State], None]] = [self._appear]
            if state.history:
                changes = [self._appear, self._slowly, self._break, self._vanish]
            self._chance.choice(changes)(name, state)
            self.over.wait(self._chance.uniform(0, 2 * self.pause))

    def _appear(self, name: str, state: State) -> None:
        content = self.shelf.new(self._chance)
        with self.timeline.change(name, state.loaded(content.revision)) as change:
            content.write(self.root / name)
            change.done = self._wait_for(name, content.revision)
        self.judge.count("folders changed" if state.history else "folders that appeared")

    def _slowly(self, name: str, state: State) -> None:
        """Write a folder in pieces with pauses, like a copy over a network, or by one rename."""
        content = self.shelf.new(self._chance)
        with self.timeline.change(name, state.loaded(content.revision)) as change:
            if self._chance.random() < 0.5:
                self._write_in_pieces(content, self.root / name)
            else:
                self._put_in_place(content, name)
            change.done = self._wait_for(name, content.revision)
        self.judge.count("folders written in pieces, or put in place")

    def _write_in_pieces(self, content: Content, folder: Path) -> None:
        (folder / "adapter_config.json").write_bytes(content.config)
        with (folder / "adapter_model.safetensors").open("wb", buffering=0) as file:
            for offset in range(0, len(content.tensors), 1 + len(content.tensors) // 4):
                file.write(content.tensors[offset : offset + 1 + len(content.tensors) // 4])
                time.sleep(0.3)

    def _put_in_place(self, content: Content, name: str) -> None:
        made, old = self.shelf.place(content), self.shelf.folder / f"old-{name}"
        (self.root / name).rename(old)
        made.rename(self.root / name)
        shutil.rmtree(old)

    def _break(self, name: str, state: State) -> None:
        """Break a folder, then repair it: the old revision stays served until the repaired one is."""
        break_folder(self.root / name, self._chance)
        time.sleep(_SETTLE_SECONDS)
        adapter = self.client.get_adapter(name)
        self.judge.expect(
            adapter.revision == state.history[0], f"{name}: a broken folder replaced {state} by {adapter}"
        )
        self.judge.count("folders broken")
        self._appear(name, state)

    def _vanish(self, name: str, _: State) -> None:
        with self.timeline.change(name, State()) as change:
            shutil.rmtree(self.root / name)
            change.done = self._wait_for(name, "")
        self.judge.count("folders that vanished")

    def _wait_for(self, name: str, revision: str) -> bool:
        """Wait until the server serves the folder's content."""
        end = time.monotonic() + _SEEN_SECONDS
        while time.monotonic() < end:
            try:
                found = self.client.get_adapter(name).revision
            except NotFoundError:
                found = ""
            if found == revision:
                return True
            time.sleep(0.05)
        self.judge.complain(f"{name}: the folder's revision {revision or 'none'} was not served in time")
        return False
