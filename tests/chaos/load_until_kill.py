"""Loads a server with all kinds of work and kills it."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from chaos.fork_server import ForkedServer
from soak.changes import AdapterSource, Changer
from soak.judge import Judge
from soak.known import Content
from soak.requests import Request, RequestLoop
from soak.setting import OPERATOR
from soak.timeline import Timeline
from turret.v1 import adapters_pb2, adapters_pb2_grpc
from turret_client import Client, TurretError
from turret_client._status import call_scope
from turret_client._upload import AdapterFolder

NAMES = tuple(f"name-{index}" for index in range(6))
UPLOADED = "uploaded"

_CHUNK_BYTES = 1024
_CHUNK_SECONDS = 0.02


class Interrupted(Changer):
    """Changes names until the server is killed."""

    def failed(self, name: str, error: TurretError) -> None:
        if error.reason or time.monotonic() < self.judge.killed_at:
            super().failed(name, error)
        self.over.set()


@dataclass
class Uploader:
    """Uploads one adapter after another, slowly, so that most kills interrupt one."""

    address: str
    source: AdapterSource
    judge: Judge
    timeline: Timeline
    over: threading.Event
    current: Content | None = None

    def run(self, rng: random.Random) -> None:
        while not self.over.is_set():
            self.current = self.source.new(rng)
            folder = self.source.write(self.current)
            try:
                with self.timeline.change(
                    UPLOADED, self.timeline.now(UPLOADED).loaded(self.current.revision)
                ) as change:
                    self._send(folder)
                    change.done = True
            except TurretError as error:
                killed = not error.reason and time.monotonic() >= self.judge.killed_at
                self.judge.expect(killed, f"an upload failed: {error.reason}: {error}")
                return
            shutil.rmtree(folder)
            self.current = None
            self.judge.count("slow uploads completed")

    def _send(self, folder: Path) -> None:
        files = AdapterFolder(UPLOADED, folder, None)
        tensors = (folder / "adapter_model.safetensors").read_bytes()

        def requests() -> Iterator[adapters_pb2.UploadAdapterRequest]:
            yield files.start()
            for offset in range(0, len(tensors), _CHUNK_BYTES):
                time.sleep(_CHUNK_SECONDS)
                chunk = adapters_pb2.UploadChunk(offset=offset, data=tensors[offset : offset + _CHUNK_BYTES])
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)

        with grpc.insecure_channel(self.address) as channel:
            stub = adapters_pb2_grpc.AdapterServiceStub(channel)
            call = stub.UploadAdapter(requests(), metadata=[("authorization", f"Bearer {OPERATOR}")])
            with call_scope(call, self.address):
                list(call)


@dataclass
class LoadUntilKill:
    server: ForkedServer
    source: AdapterSource
    judge: Judge
    timeline: Timeline
    seed: int
    questions: Sequence[int]
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, seconds: float) -> Content | None:
        """Load, change and upload for this long, then kill the server. Returns the interrupted upload."""
        address = self.server.address
        uploader = Uploader(address, self.source, self.judge, self.timeline, self.over)
        with Client(address, api_key=OPERATOR) as client:
            changers = [self._changer(client, NAMES[index::2], index) for index in range(2)]
            targets: list[tuple[str, Callable[[], None]]] = [
                ("requests", self._send_requests),
                ("slow uploads", lambda: uploader.run(random.Random(self.seed))),
                *((f"changes {index}", changer.run) for index, changer in enumerate(changers)),
            ]
            threads = [
                threading.Thread(name=name, target=self._guarded, args=[target]) for name, target in targets
            ]
            for thread in threads:
                thread.start()
            time.sleep(seconds)
            self.judge.killed_at = time.monotonic()
            self.server.kill()
            self.over.set()
            for thread in threads:
                thread.join()
        return uploader.current

    def _guarded(self, target: Callable[[], None]) -> None:
        """Report an error of a thread under the thread's name."""
        try:
            target()
        except Exception as error:
            self.judge.violation(f"{threading.current_thread().name}: {type(error).__name__}: {error}")
            raise

    def _changer(self, client: Client, names: tuple[str, ...], index: int) -> Changer:
        return Interrupted(
            client=client,
            address=self.server.address,
            api_key=OPERATOR,
            names=names,
            source=self.source,
            judge=self.judge,
            timeline=self.timeline,
            pause=0.0,
            seed=2 * self.seed + index,
            over=self.over,
        )

    def _send_requests(self) -> None:
        loop = RequestLoop(OPERATOR, self._choose, 6, self.seed)
        asyncio.run(loop.run(self.server.address, self.over.is_set, self.judge.check, lambda _: None))

    def _choose(self, rng: random.Random) -> Request:
        name = rng.choice((*NAMES, UPLOADED, None))
        return Request(
            tenant=OPERATOR,
            names=(name,) if name else (),
            question=rng.choice(self.questions),
            streamed=rng.random() < 0.6,
        )
