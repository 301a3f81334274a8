"""Names whose adapters are changed by calls: loaded, swapped, rolled back, split, uploaded, unloaded."""

from __future__ import annotations

import itertools
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from soak.judge import Judge
from soak.known import Content
from soak.timeline import State, Timeline
from turret.v1 import adapters_pb2, adapters_pb2_grpc
from turret_client import Adapter, Client, NotFoundError, TurretError, UnavailableError
from turret_client._status import call_scope
from turret_client._upload import AdapterFolder

# What a server says of a folder that is broken, or that somebody breaks while it is read.
BROKEN = {"ADAPTER_INVALID", "ADAPTER_SOURCE_NOT_FOUND"}

_CHUNK_BYTES = 4096
_BUSY_SECONDS = 60.0


def break_folder(folder: Path, chance: random.Random) -> None:
    """Damage an adapter's files: truncate, overwrite or remove one."""
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    match chance.randrange(5):
        case 0:
            content = tensors.read_bytes()
            tensors.write_bytes(content[: chance.randrange(len(content))])
        case 1:
            config.write_bytes(chance.randbytes(200))
        case 2:
            tensors.write_bytes(chance.randbytes(5000))
        case 3:
            tensors.unlink()
        case _:
            config.write_bytes(config.read_bytes()[:50])


@dataclass
class Shelf:
    """Adapters to load: new revisions of the contents, each in its own folder."""

    folder: Path
    contents: Sequence[Content]
    judge: Judge
    _blanks: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def new(self, chance: random.Random) -> Content:
        content = chance.choice(self.contents).variant(next(self._blanks))
        self.judge.answers.add(content)
        return content

    def place(self, content: Content) -> Path:
        return content.write(self.folder / content.revision)


@dataclass
class Changer:
    """Changes some names, one after another, until `over` is set."""

    client: Client
    address: str
    api_key: str
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
            self._change(name, self.timeline.now(name))
            self.over.wait(self._chance.uniform(0, 2 * self.pause))

    def _change(self, name: str, state: State) -> None:
        changes: list[Callable[[str, State], None]] = [self._load, self._upload]
        if state.history:
            changes = [self._load, self._load, self._upload, self._broken, self._unload]
            if len(state.history) > 1:
                changes += [self._roll_back, self._roll_back, self._split, self._split]
        try:
            self._chance.choice(changes)(name, state)
        except TurretError as error:
            self.failed(name, error)

    def failed(self, name: str, error: TurretError) -> None:
        """Any error that a change does not expect is a violation."""
        self.judge.complain(f"a change of {name}: {error.reason or error.code}: {error.message}")

    def _load(self, name: str, state: State) -> None:
        content = self.shelf.new(self._chance)
        folder = self.shelf.place(content)
        with self.timeline.change(name, state.loaded(content.revision)) as change:
            adapter = self.client.load_adapter(name, str(folder))
            change.done = True
        self._made("swaps" if state.history else "loads", adapter, change.after)
        if self._chance.random() < 0.5:
            break_folder(folder, self._chance)
            self.judge.count("sources spoiled after the load")
        else:
            shutil.rmtree(folder)
            self.judge.count("sources gone after the load")

    def _broken(self, name: str, state: State) -> None:
        """Load a folder that is damaged before or during the read: all of it is served, or none."""
        content = self.shelf.new(self._chance)
        folder = self.shelf.place(content)
        delay = self._chance.choice([0, 0.001, 0.003, 0.01])
        spoiler = threading.Timer(delay, break_folder, [folder, random.Random(self._chance.random())])
        with self.timeline.change(name, state.loaded(content.revision)) as change:
            spoiler.start()
            if not delay:
                spoiler.join()
            try:
                adapter = self.client.load_adapter(name, str(folder))
                change.done = True
            except TurretError as error:
                if error.reason not in BROKEN:
                    raise
            finally:
                spoiler.join()
        if change.done:
            self._made("loads that were faster than what spoiled their source", adapter, change.after)
        else:
            self._made("loads of spoiled sources refused", self.client.get_adapter(name), state)
        shutil.rmtree(folder)

    def _unload(self, name: str, _: State) -> None:
        with self.timeline.change(name, State()) as change:
            self.client.unload_adapter(name)
            change.done = True
        self.judge.count("unloads")

    def _roll_back(self, name: str, state: State) -> None:
        to = self._chance.choice([1, 1, self._chance.randrange(1, len(state.history))])
        to = state.history.index(state.history[to], 1)
        revision = state.history[to] if to > 1 or self._chance.random() < 0.5 else None
        with self.timeline.change(name, state.rolled_back(to)) as change:
            try:
                adapter = self.client.rollback_adapter(name, revision)
                change.done = True
            except NotFoundError as error:
                self._not_kept(name, state, state.history[to], error)
        if change.done:
            self._made("rollbacks", adapter, change.after)

    def _split(self, name: str, state: State) -> None:
        revision = self._chance.choice([each for each in state.history if each != state.history[0]])
        percent = self._chance.choice([0, 10, 50, 90, 100])
        with self.timeline.change(name, state.split_to(revision, percent)) as change:
            try:
                adapter = self.client.set_traffic_split(name, revision, percent)
                change.done = True
            except NotFoundError as error:
                self._not_kept(name, state, revision, error)
        if change.done:
            self._made("splits" if percent else "ends of splits", adapter, change.after)

    def _not_kept(self, name: str, state: State, revision: str, error: TurretError) -> None:
        """The store has a budget: older revisions may be gone."""
        kept = revision in state.kept or error.reason != "REVISION_NOT_FOUND"
        self.judge.expect(not kept, f"{name} lost {revision} of {state}: {error}")
        self.judge.count("revisions that the store had let go of")

    def _upload(self, name: str, state: State) -> None:
        content = self.shelf.new(self._chance)
        folder = self.shelf.place(content)
        sent = 0
        if len(content.tensors) > 2 * _CHUNK_BYTES and self._chance.random() < 0.7:
            sent = self._break_off(name, folder)
        if sent and self._chance.random() < 0.2:
            self.judge.count("uploads given up")
        else:
            self._finish_upload(name, state, content, folder, sent)
        shutil.rmtree(folder)

    def _break_off(self, name: str, folder: Path) -> int:
        """Send part of an upload and cut the connection. Returns the maximum number of bytes sent."""
        tensors = (folder / "adapter_model.safetensors").read_bytes()
        chunks = self._chance.randrange(1, len(tensors) // _CHUNK_BYTES)
        accepted = threading.Event()

        def requests() -> Iterator[adapters_pb2.UploadAdapterRequest]:
            yield AdapterFolder(name, folder, None).start()
            accepted.wait(_BUSY_SECONDS)
            for offset in range(0, chunks * _CHUNK_BYTES, _CHUNK_BYTES):
                chunk = adapters_pb2.UploadChunk(offset=offset, data=tensors[offset : offset + _CHUNK_BYTES])
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)
            time.sleep(self._chance.uniform(0, 0.05))

        with grpc.insecure_channel(self.address) as channel:
            stub = adapters_pb2_grpc.AdapterServiceStub(channel)
            call = stub.UploadAdapter(requests(), metadata=[("authorization", f"Bearer {self.api_key}")])
            with call_scope(call, self.address):
                self.judge.expect(next(iter(call)).offset == 0, f"{name}: a new upload does not begin at 0")
                accepted.set()
                time.sleep(self._chance.uniform(0, 0.05))
        self.judge.count("uploads broken off")
        return chunks * _CHUNK_BYTES

    def _finish_upload(self, name: str, state: State, content: Content, folder: Path, sent: int) -> None:
        told: list[int] = []
        with self.timeline.change(name, state.loaded(content.revision)) as change:
            adapter = self._upload_when_free(name, folder, lambda at, _: told.append(at))
            change.done = True
        self.judge.expect(told[0] <= sent, f"{name}: the upload goes on at {told[0]} of {sent} sent")
        self.judge.count("uploads that went on where they were broken off", int(told[0] > 0))
        self._made("uploads", adapter, change.after)

    def _upload_when_free(self, name: str, folder: Path, progress: Callable[[int, int], None]) -> Adapter:
        """Retry while the server has not noticed that the first connection is closed."""
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return self.client.upload_adapter(name, folder, progress=progress)
            except UnavailableError as error:
                if error.reason != "STORE_BUSY" or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _made(self, event: str, adapter: Adapter, state: State) -> None:
        """Compare the server's answer with the expected state; nobody else changes the name."""
        self.judge.count(event)
        found = State(
            tuple(each.revision for each in adapter.history),
            (adapter.traffic_split.revision, adapter.traffic_split.percent)
            if adapter.traffic_split
            else None,
        )
        self.judge.expect(
            found == state and adapter.revision == state.history[0],
            f"{adapter.name}: after {event} expected {state}, found {found}, serving {adapter.revision}",
        )
