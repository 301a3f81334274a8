"""Changes adapters by calls: load, swap, roll back, split, upload, unload."""

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

# Errors of a load whose folder is corrupt, or is corrupted while it is read.
_CORRUPT = {"ADAPTER_INVALID", "ADAPTER_SOURCE_NOT_FOUND"}

_CHUNK_BYTES = 4096
_BUSY_SECONDS = 60.0


def corrupt_folder(folder: Path, rng: random.Random) -> None:
    """Truncate, overwrite or remove one of an adapter's files."""
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    match rng.randrange(5):
        case 0:
            content = tensors.read_bytes()
            tensors.write_bytes(content[: rng.randrange(len(content))])
        case 1:
            config.write_bytes(rng.randbytes(200))
        case 2:
            tensors.write_bytes(rng.randbytes(5000))
        case 3:
            tensors.unlink()
        case _:
            config.write_bytes(config.read_bytes()[:50])


@dataclass
class AdapterSource:
    """Creates adapters to load: new revisions of the contents, each in its own folder."""

    folder: Path
    contents: Sequence[Content]
    judge: Judge
    _blanks: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def new(self, rng: random.Random) -> Content:
        content = rng.choice(self.contents).variant(next(self._blanks))
        self.judge.answers.add(content)
        return content

    def write(self, content: Content) -> Path:
        """Write the files of an adapter. Returns their folder."""
        return content.write(self.folder / content.revision)


@dataclass
class Changer:
    """Changes some names, one after another, until `over` is set."""

    client: Client
    address: str
    api_key: str
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
            self._change(name, self.timeline.now(name))
            self.over.wait(self._rng.uniform(0, 2 * self.pause))

    def _change(self, name: str, state: State) -> None:
        changes: list[Callable[[str, State], None]] = [self._load, self._upload]
        if state.history:
            changes = [self._load, self._load, self._upload, self._load_corrupted, self._unload]
            if len(state.history) > 1:
                changes += [self._roll_back, self._roll_back, self._split, self._split]
        try:
            self._rng.choice(changes)(name, state)
        except TurretError as error:
            self.failed(name, error)

    def failed(self, name: str, error: TurretError) -> None:
        """Any error that a change does not expect is a violation."""
        self.judge.violation(f"a change of {name}: {error.reason or error.code}: {error.message}")

    def _load(self, name: str, state: State) -> None:
        content = self.source.new(self._rng)
        folder = self.source.write(content)
        with self.timeline.change(name, state.loaded(content.revision)) as change:
            adapter = self.client.load_adapter(name, str(folder))
            change.done = True
        self._check("swaps" if state.history else "loads", adapter, change.after)
        if self._rng.random() < 0.5:
            corrupt_folder(folder, self._rng)
            self.judge.count("sources corrupted after a load")
        else:
            shutil.rmtree(folder)
            self.judge.count("sources deleted after a load")

    def _load_corrupted(self, name: str, state: State) -> None:
        """Load a folder that is corrupted before or during the read: all of it is served, or none."""
        content = self.source.new(self._rng)
        folder = self.source.write(content)
        delay = self._rng.choice([0, 0.001, 0.003, 0.01])
        timer = threading.Timer(delay, corrupt_folder, [folder, random.Random(self._rng.random())])
        with self.timeline.change(name, state.loaded(content.revision)) as change:
            timer.start()
            if not delay:
                timer.join()
            try:
                adapter = self.client.load_adapter(name, str(folder))
                change.done = True
            except TurretError as error:
                if error.reason not in _CORRUPT:
                    raise
            finally:
                timer.join()
        if change.done:
            self._check("loads that finished before the corruption", adapter, change.after)
        else:
            self._check("loads of corrupted sources refused", self.client.get_adapter(name), state)
        shutil.rmtree(folder)

    def _unload(self, name: str, _: State) -> None:
        with self.timeline.change(name, State()) as change:
            self.client.unload_adapter(name)
            change.done = True
        self.judge.count("unloads")

    def _roll_back(self, name: str, state: State) -> None:
        to = self._rng.choice([1, 1, self._rng.randrange(1, len(state.history))])
        to = state.history.index(state.history[to], 1)
        revision = state.history[to] if to > 1 or self._rng.random() < 0.5 else None
        with self.timeline.change(name, state.rolled_back(to)) as change:
            try:
                adapter = self.client.rollback_adapter(name, revision)
                change.done = True
            except NotFoundError as error:
                self._check_deleted(name, state, state.history[to], error)
        if change.done:
            self._check("rollbacks", adapter, change.after)

    def _split(self, name: str, state: State) -> None:
        revision = self._rng.choice([each for each in state.history if each != state.history[0]])
        percent = self._rng.choice([0, 10, 50, 90, 100])
        with self.timeline.change(name, state.split_to(revision, percent)) as change:
            try:
                adapter = self.client.set_traffic_split(name, revision, percent)
                change.done = True
            except NotFoundError as error:
                self._check_deleted(name, state, revision, error)
        if change.done:
            self._check("splits" if percent else "splits removed", adapter, change.after)

    def _check_deleted(self, name: str, state: State, revision: str, error: TurretError) -> None:
        """The store has a budget: older revisions may have been deleted."""
        expected = error.reason == "REVISION_NOT_FOUND" and revision not in state.kept
        self.judge.expect(expected, f"{name} lost {revision} of {state}: {error}")
        self.judge.count("revisions deleted by the store")

    def _upload(self, name: str, state: State) -> None:
        content = self.source.new(self._rng)
        folder = self.source.write(content)
        sent = 0
        if len(content.tensors) > 2 * _CHUNK_BYTES and self._rng.random() < 0.7:
            sent = self._interrupt(name, folder)
        if sent and self._rng.random() < 0.2:
            self.judge.count("uploads abandoned")
        else:
            self._finish_upload(name, state, content, folder, sent)
        shutil.rmtree(folder)

    def _interrupt(self, name: str, folder: Path) -> int:
        """Send part of an upload and cut the connection. Returns the maximum number of bytes sent."""
        tensors = (folder / "adapter_model.safetensors").read_bytes()
        chunks = self._rng.randrange(1, len(tensors) // _CHUNK_BYTES)
        accepted = threading.Event()

        def requests() -> Iterator[adapters_pb2.UploadAdapterRequest]:
            yield AdapterFolder(name, folder, None).start()
            accepted.wait(_BUSY_SECONDS)
            for offset in range(0, chunks * _CHUNK_BYTES, _CHUNK_BYTES):
                chunk = adapters_pb2.UploadChunk(offset=offset, data=tensors[offset : offset + _CHUNK_BYTES])
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)
            time.sleep(self._rng.uniform(0, 0.05))

        with grpc.insecure_channel(self.address) as channel:
            stub = adapters_pb2_grpc.AdapterServiceStub(channel)
            call = stub.UploadAdapter(requests(), metadata=[("authorization", f"Bearer {self.api_key}")])
            with call_scope(call, self.address):
                self.judge.expect(next(iter(call)).offset == 0, f"{name}: a new upload does not start at 0")
                accepted.set()
                time.sleep(self._rng.uniform(0, 0.05))
        self.judge.count("uploads interrupted")
        return chunks * _CHUNK_BYTES

    def _finish_upload(self, name: str, state: State, content: Content, folder: Path, sent: int) -> None:
        offsets: list[int] = []
        with self.timeline.change(name, state.loaded(content.revision)) as change:
            adapter = self._upload_when_free(name, folder, lambda at, _: offsets.append(at))
            change.done = True
        self.judge.expect(
            offsets[0] <= sent, f"{name}: the upload resumes at {offsets[0]}, but {sent} bytes were sent"
        )
        self.judge.count("uploads resumed", int(offsets[0] > 0))
        self._check("uploads", adapter, change.after)

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

    def _check(self, event: str, adapter: Adapter, state: State) -> None:
        """Compare the server's answer with the expected state; no other thread changes the name."""
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
