"""A server that is killed repeatedly, and the checks after each start."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from chaos.life import UPLOADED, Life
from chaos.nursery import Nursery, Nursling
from chaos.remains import Remains
from soak.asking import Asked, ask
from soak.changes import Shelf
from soak.judge import Judge
from soak.known import QUESTIONS, Content
from soak.setting import DTYPE, HOST_BYTES, OPERATOR, PAGE_BYTES, PAGES, STORE_BYTES, write_tenants
from soak.timeline import State, Timeline
from support.serving import ServerProcess, server_process
from turret_client import AsyncClient, Client

# One kill in so many falls into the start.
_WHILE_STARTING = 5


@dataclass
class Chaos:
    root: Path
    model: Path
    contents: list[Content]
    judge: Judge
    chance: random.Random
    nursery: Nursery
    questions: Sequence[int] = range(len(QUESTIONS))
    most_seconds: float = 3.0
    start_seconds: list[float] = field(default_factory=list)
    kills: int = 0
    known: dict[str, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._shelf = Shelf(self.root / "sources", self.contents, self.judge)
        self._remains = Remains(self.root / "store", self.judge)
        self._going: Content | None = None
        self._received = 0

    def one_kill(self) -> None:
        """One life of the server that a kill ends, and the checks of what it left on disk."""
        self.kills += 1
        if self.kills % _WHILE_STARTING == 0:
            self._kill_while_starting()
            self.known = self._remains.check({name: [state] for name, state in self.known.items()})
            return
        with self._server() as server:
            started = time.monotonic()
            server.wait_until_it_serves()
            self.start_seconds.append(time.monotonic() - started)
            timeline = self._begin(server)
            life = Life(server, self._shelf, self.judge, timeline, self.kills, self.questions)
            self._going = life.run(self.chance.uniform(0.1, self.most_seconds))
        self.known = self._remains.check(timeline.left())
        self._received = self._remains.received(self._going) if self._going else 0

    def last_start(self) -> float:
        """Start after the last kill, from exec. Returns the seconds until the server serves."""
        started = time.monotonic()
        with server_process(self.model, self.root / "cache", *self._arguments) as server:
            seconds = time.monotonic() - started
            self._end(server)
        return seconds

    def last_look(self) -> None:
        """Start after the last kill, from a fork."""
        with self._server() as server:
            server.wait_until_it_serves()
            self._end(server)

    def _end(self, server: ServerProcess | Nursling) -> None:
        """Check that everything is there and that the server exits on SIGTERM."""
        self._begin(server)
        self.judge.expect(server.stop() == 0, "the last server did not end well")

    def _begin(self, server: ServerProcess | Nursling) -> Timeline:
        """Check that the server serves the same revisions as before, and that the upload continues."""
        timeline = Timeline()
        self.judge.timeline, self.judge.killed_at = timeline, float("inf")
        for name, state in self.known.items():
            timeline.put(name, state)
        self._remains.check_clean()
        with Client(server.address, api_key=OPERATOR) as client:
            self._check_served(client)
            if self._going:
                self._go_on(client, timeline, self._going)
        asyncio.run(self._check_answers(server.address, timeline))
        for line in server.log:
            self.judge.expect(" ERROR " not in line and "Traceback" not in line, f"the log: {line.strip()}")
        return timeline

    def _check_served(self, client: Client) -> None:
        found = {}
        for adapter in client.list_adapters():
            split = adapter.traffic_split
            history = tuple(each.revision for each in adapter.history)
            found[adapter.name] = State(history, (split.revision, split.percent) if split else None)
            served = adapter.revision == history[0]
            self.judge.expect(served, f"{adapter.name} serves {adapter.revision}, and says {history}")
        self.judge.expect(found == self.known, f"served after the start {found}, expected {self.known}")

    def _go_on(self, client: Client, timeline: Timeline, content: Content) -> None:
        told: list[int] = []
        with timeline.change(UPLOADED, timeline.now(UPLOADED).loaded(content.revision)) as change:
            folder = self._shelf.place(content)
            adapter = client.upload_adapter(UPLOADED, folder, progress=lambda at, _: told.append(at))
            change.done = True
        self.judge.expect(adapter.revision == content.revision, f"uploaded {content.revision}, got {adapter}")
        # Where all was there already, nothing is told before the end.
        at = self._received or (0 if len(told) > 1 else told[0])
        self.judge.expect(told[0] == at, f"{self._received} bytes had come, and it goes on at {told[0]}")
        self.judge.count("uploads that went on after a kill" if told[0] else "uploads that began again")
        self._going, self._received = None, 0

    async def _check_answers(self, address: str, timeline: Timeline) -> None:
        async with AsyncClient(address, api_key=OPERATOR) as client:
            for name in timeline.names():
                for question in self.chance.sample(self.questions, 2):
                    asked = Asked(tenant=OPERATOR, names=(name,), question=question, streamed=True)
                    await ask(client, asked)
                    self.judge.take(asked)
                    self.judge.expect(asked.outcome == "ok", f"after a start: {asked}")

    @property
    def _arguments(self) -> list[str]:
        arguments = {
            "--dtype": DTYPE,
            "--memory": PAGES * PAGE_BYTES,
            "--host-memory": HOST_BYTES,
            "--store": self.root / "store",
            "--store-size": STORE_BYTES,
            "--usage-log": self.root / "usage.jsonl",
            "--tenants": write_tenants(self.root / "tenants.toml"),
        }
        return [str(word) for pair in arguments.items() for word in pair]

    def _server(self) -> AbstractContextManager[Nursling]:
        where = ("--model", str(self.model), "--cache", str(self.root / "cache"), "--device", "cpu")
        return self.nursery.server(*where, *self._arguments)

    def _kill_while_starting(self) -> None:
        with self._server() as server:
            time.sleep(self.chance.uniform(0, max(self.start_seconds)))
            server.kill()
        self.judge.count("kills while it started")
