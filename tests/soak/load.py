"""The load: what each tenant requests, and a watcher of changes."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from soak.judge import Judge
from soak.known import QUESTIONS
from soak.requests import Request, RequestLoop, ask
from soak.setting import ALL_NAMES, CANCELLING, CHURN, OPERATOR, POOR, SMALL, STABLE, WATCHED
from soak.timeline import Timeline
from support.prompts import until
from turret_client import AdapterState, AsyncClient, Client, TurretError

_UNAUTHENTICATED_SECONDS = 5.0
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
        tenants: list[tuple[str, int, Callable[[random.Random], Request]]] = [
            ("acme", 6, self._anything),
            ("bolt", 4, self._permitted),
            (SMALL, 4, lambda rng: self._request(SMALL, rng, (rng.choice(ALL_NAMES),))),
            (POOR, 2, lambda rng: self._request(POOR, rng, (rng.choice(ALL_NAMES),))),
            (CANCELLING, 3, self._cancelled),
        ]
        await asyncio.gather(
            self._unauthenticated(),
            *(
                RequestLoop(tenant, choose, concurrency).run(
                    self.address, self.over.is_set, self.judge.check, lambda _: None
                )
                for tenant, concurrency, choose in tenants
            ),
        )

    def _request(self, tenant: str, rng: random.Random, names: tuple[str, ...]) -> Request:
        return Request(
            tenant=tenant,
            names=names,
            question=rng.randrange(len(QUESTIONS)),
            streamed=rng.random() < 0.6,
            routing_key=f"user-{rng.randrange(_KEYS)}" if rng.random() < 0.5 else "",
        )

    def _anything(self, rng: random.Random) -> Request:
        draw = rng.random()
        if draw < 0.1:
            return self._request("acme", rng, ())
        if draw < 0.2:
            return self._request("acme", rng, ("stable-lora", "stable-prefix"))
        if draw < 0.3 and (named := self._revision(rng)):
            return self._request("acme", rng, (named,))
        if draw < 0.32:
            request = self._request("acme", rng, ("stable-lora",))
            request.too_long = True
            return request
        return self._request("acme", rng, (rng.choice((*CHURN, *CHURN, *ALL_NAMES)),))

    def _revision(self, rng: random.Random) -> str | None:
        """A revision of a name's history, recent ones more often."""
        name = rng.choice(CHURN)
        history = self.timeline.now(name).history[: rng.choice([2, 2, 2, 5])]
        return f"{name}@{rng.choice(history)[: rng.choice([12, 32])]}" if history else None

    def _permitted(self, rng: random.Random) -> Request:
        names = CHURN if rng.random() < 0.03 else (*STABLE, *WATCHED)
        return self._request("bolt", rng, (rng.choice(names),))

    def _cancelled(self, rng: random.Random) -> Request:
        """A stream that the client closes midway, or that a deadline ends."""
        request = self._request(CANCELLING, rng, (rng.choice(tuple(STABLE)),))
        request.streamed = True
        if rng.random() < 0.6:
            request.cancel_after = rng.randrange(1, 12)
        else:
            request.timeout = rng.uniform(0.01, 1.0)
        return request

    async def _unauthenticated(self) -> None:
        """Send a call with an unknown key: it must be refused."""
        async with AsyncClient(self.address, api_key="nobody") as client:
            while not self.over.is_set():
                request = self._request("nobody", random.Random(), ("stable-lora",))
                await ask(client, request)
                self.judge.expect(
                    request.outcome == "UNAUTHENTICATED", f"an unknown key was accepted: {request}"
                )
                self.judge.count("unauthenticated calls refused")
                await asyncio.sleep(_UNAUTHENTICATED_SECONDS)


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
                self._judge.count("watch events")
                removed = adapter.state in (AdapterState.UNLOADED, AdapterState.DRAINING)
                self.revisions[adapter.name] = "" if removed else adapter.revision
        except TurretError as error:
            if not self._over.is_set():
                self._judge.violation(f"the watch failed: {error}")

    def wait_until_current(self, client: Client) -> None:
        """Wait until the last watched state is the listed state."""

        def is_current() -> bool:
            known = {adapter.name: adapter.revision for adapter in client.list_adapters()}
            return known == {name: revision for name, revision in self.revisions.items() if revision}

        with suppress(AssertionError):  # check_names reports the difference
            until(is_current, 10)

    def stop(self) -> None:
        self._over.set()
        self._client.close()
        self.join()
