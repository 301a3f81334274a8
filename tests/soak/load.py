"""The load: what each tenant requests, and a watcher of changes."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from soak.asking import Asked, Asker, ask
from soak.judge import Judge
from soak.known import QUESTIONS
from soak.setting import CHURN, EVERY, FICKLE, OPERATOR, POOR, SMALL, STABLE, WATCHED
from soak.timeline import Timeline
from support.prompts import until
from turret_client import AdapterState, AsyncClient, Client, TurretError

_STRANGER_SECONDS = 5.0
_KEYS = 20


@dataclass(frozen=True)
class Load:
    """Sends requests from its own thread until `over` is set."""

    address: str
    judge: Judge
    timeline: Timeline
    over: threading.Event

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        tenants: list[tuple[str, int, Callable[[random.Random], Asked]]] = [
            ("acme", 6, self._anything),
            ("bolt", 4, self._its_own),
            (SMALL, 4, lambda chance: self._asked(SMALL, chance, (chance.choice(EVERY),))),
            (POOR, 2, lambda chance: self._asked(POOR, chance, (chance.choice(EVERY),))),
            (FICKLE, 3, self._left),
        ]
        await asyncio.gather(
            self._stranger(),
            *(
                Asker(tenant, choose, concurrency).run(
                    self.address, self.over.is_set, self.judge.take, lambda _: None
                )
                for tenant, concurrency, choose in tenants
            ),
        )

    def _asked(self, tenant: str, chance: random.Random, names: tuple[str, ...]) -> Asked:
        return Asked(
            tenant=tenant,
            names=names,
            question=chance.randrange(len(QUESTIONS)),
            streamed=chance.random() < 0.6,
            routing_key=f"user-{chance.randrange(_KEYS)}" if chance.random() < 0.5 else "",
        )

    def _anything(self, chance: random.Random) -> Asked:
        draw = chance.random()
        if draw < 0.1:
            return self._asked("acme", chance, ())
        if draw < 0.2:
            return self._asked("acme", chance, ("stable-lora", "stable-prefix"))
        if draw < 0.3 and (named := self._revision(chance)):
            return self._asked("acme", chance, (named,))
        if draw < 0.32:
            asked = self._asked("acme", chance, ("stable-lora",))
            asked.too_long = True
            return asked
        return self._asked("acme", chance, (chance.choice((*CHURN, *CHURN, *EVERY)),))

    def _revision(self, chance: random.Random) -> str | None:
        """A revision of a name's history, recent ones more often."""
        name = chance.choice(CHURN)
        history = self.timeline.now(name).history[: chance.choice([2, 2, 2, 5])]
        return f"{name}@{chance.choice(history)[: chance.choice([12, 32])]}" if history else None

    def _its_own(self, chance: random.Random) -> Asked:
        names = CHURN if chance.random() < 0.03 else (*STABLE, *WATCHED)
        return self._asked("bolt", chance, (chance.choice(names),))

    def _left(self, chance: random.Random) -> Asked:
        """A stream that the client closes midway, or that a deadline ends."""
        asked = self._asked(FICKLE, chance, (chance.choice(tuple(STABLE)),))
        asked.streamed = True
        if chance.random() < 0.6:
            asked.leave_after = chance.randrange(1, 12)
        else:
            asked.timeout = chance.uniform(0.01, 1.0)
        return asked

    async def _stranger(self) -> None:
        """Send a call with an unknown key: it must be refused."""
        async with AsyncClient(self.address, api_key="nobody") as client:
            while not self.over.is_set():
                asked = self._asked("nobody", random.Random(), ("stable-lora",))
                await ask(client, asked)
                self.judge.expect(asked.outcome == "UNAUTHENTICATED", f"a stranger was answered: {asked}")
                self.judge.count("strangers turned away")
                await asyncio.sleep(_STRANGER_SECONDS)


class Watcher(threading.Thread):
    """Follows `WatchAdapters` and keeps the final state of every name."""

    def __init__(self, judge: Judge, address: str) -> None:
        super().__init__(daemon=True)
        self.revisions: dict[str, str] = {}
        self._judge = judge
        self._client = Client(address, api_key=OPERATOR)
        self._over = threading.Event()

    def run(self) -> None:
        try:
            for adapter in self._client.watch_adapters():
                self._judge.count("changes that a watcher was told")
                gone = adapter.state in (AdapterState.UNLOADED, AdapterState.DRAINING)
                self.revisions[adapter.name] = "" if gone else adapter.revision
        except TurretError as error:
            if not self._over.is_set():
                self._judge.complain(f"the watcher was cut off: {error}")

    def settle(self, client: Client) -> None:
        """Wait until the last watched state is the listed state."""

        def is_told() -> bool:
            known = {adapter.name: adapter.revision for adapter in client.list_adapters()}
            return known == {name: revision for name, revision in self.revisions.items() if revision}

        with suppress(AssertionError):  # it is looked at once more afterwards, and told in full
            until(is_told, 10)

    def stop(self) -> None:
        self._over.set()
        self._client.close()
        self.join()
