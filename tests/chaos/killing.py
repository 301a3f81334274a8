"""A server that is killed repeatedly, and the checks after each start."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from chaos.fork_server import ForkedServer, ForkServer
from chaos.load_until_kill import UPLOADED, LoadUntilKill
from chaos.store_check import StoreCheck
from soak.changes import AdapterSource
from soak.judge import Judge
from soak.known import QUESTIONS, Content
from soak.requests import Request, ask
from soak.setting import DTYPE, HOST_BYTES, OPERATOR, PAGE_BYTES, PAGES, STORE_BYTES, write_tenants
from soak.timeline import State, Timeline
from support.serving import ServerProcess, server_process
from turret_client import AsyncClient, Client

# Every fifth kill is during startup.
_STARTUP_KILLS = 5


@dataclass
class Chaos:
    root: Path
    model: Path
    contents: list[Content]
    judge: Judge
    rng: random.Random
    fork_server: ForkServer
    questions: Sequence[int] = range(len(QUESTIONS))
    max_seconds: float = 3.0
    start_seconds: list[float] = field(default_factory=list)
    kills: int = 0
    known: dict[str, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._source = AdapterSource(self.root / "sources", self.contents, self.judge)
        self._store_check = StoreCheck(self.root / "store", self.judge)
        self._interrupted: Content | None = None
        self._received = 0

    def one_kill(self) -> None:
        """Start a server, kill it, and check what it left on disk."""
        self.kills += 1
        if self.kills % _STARTUP_KILLS == 0:
            self._kill_during_startup()
            self.known = self._store_check.check({name: [state] for name, state in self.known.items()})
            return
        with self._server() as server:
            started = time.monotonic()
            server.wait_until_it_serves()
            self.start_seconds.append(time.monotonic() - started)
            timeline = self._check_start(server)
            load = LoadUntilKill(server, self._source, self.judge, timeline, self.kills, self.questions)
            self._interrupted = load.run(self.rng.uniform(0.1, self.max_seconds))
        self.known = self._store_check.check(timeline.final_states())
        self._received = self._store_check.received(self._interrupted) if self._interrupted else 0

    def restart_from_exec(self) -> float:
        """Start after the last kill, from exec. Returns the seconds until the server serves."""
        started = time.monotonic()
        with server_process(self.model, self.root / "cache", *self._arguments) as server:
            seconds = time.monotonic() - started
            self._check_last(server)
        return seconds

    def restart_from_fork(self) -> None:
        """Start after the last kill, from a fork."""
        with self._server() as server:
            server.wait_until_it_serves()
            self._check_last(server)

    def _check_last(self, server: ServerProcess | ForkedServer) -> None:
        """Check the start as after any kill, and that the server exits on SIGTERM."""
        self._check_start(server)
        self.judge.expect(server.stop() == 0, "the last server did not exit with status 0")

    def _check_start(self, server: ServerProcess | ForkedServer) -> Timeline:
        """Check that the server serves the same revisions as before, and that the upload continues."""
        timeline = Timeline()
        self.judge.timeline, self.judge.killed_at = timeline, float("inf")
        for name, state in self.known.items():
            timeline.put(name, state)
        self._store_check.check_clean()
        with Client(server.address, api_key=OPERATOR) as client:
            self._check_served(client)
            if self._interrupted:
                self._resume(client, timeline, self._interrupted)
        asyncio.run(self._check_answers(server.address, timeline))
        for line in server.log:
            self.judge.expect(
                " ERROR " not in line and "Traceback" not in line, f"the server's log: {line.strip()}"
            )
        return timeline

    def _check_served(self, client: Client) -> None:
        found = {}
        for adapter in client.list_adapters():
            split = adapter.traffic_split
            history = tuple(each.revision for each in adapter.history)
            found[adapter.name] = State(history, (split.revision, split.percent) if split else None)
            served = adapter.revision == history[0]
            self.judge.expect(
                served, f"{adapter.name} serves {adapter.revision}, but its history is {history}"
            )
        self.judge.expect(found == self.known, f"after the start {found} are served, expected {self.known}")

    def _resume(self, client: Client, timeline: Timeline, content: Content) -> None:
        offsets: list[int] = []
        with timeline.change(UPLOADED, timeline.now(UPLOADED).loaded(content.revision)) as change:
            folder = self._source.write(content)
            adapter = client.upload_adapter(UPLOADED, folder, progress=lambda at, _: offsets.append(at))
            change.done = True
        self.judge.expect(adapter.revision == content.revision, f"uploaded {content.revision}, got {adapter}")
        # If the server has all bytes already, progress is reported only at the end.
        at = self._received or (0 if len(offsets) > 1 else offsets[0])
        self.judge.expect(
            offsets[0] == at, f"{self._received} bytes were received, but the upload resumes at {offsets[0]}"
        )
        self.judge.count(f"uploads {'resumed' if offsets[0] else 'restarted'} after a kill")
        self._interrupted, self._received = None, 0

    async def _check_answers(self, address: str, timeline: Timeline) -> None:
        async with AsyncClient(address, api_key=OPERATOR) as client:
            for name in timeline.names():
                for question in self.rng.sample(self.questions, 2):
                    request = Request(tenant=OPERATOR, names=(name,), question=question, streamed=True)
                    await ask(client, request)
                    self.judge.check(request)
                    self.judge.expect(request.outcome == "ok", f"after a start: {request}")

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

    def _server(self) -> AbstractContextManager[ForkedServer]:
        arguments = ("--model", str(self.model), "--cache", str(self.root / "cache"), "--device", "cpu")
        return self.fork_server.server(*arguments, *self._arguments)

    def _kill_during_startup(self) -> None:
        with self._server() as server:
            time.sleep(self.rng.uniform(0, max(self.start_seconds)))
            server.kill()
        self.judge.count("kills during startup")
