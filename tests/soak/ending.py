"""Checks after the load: the remaining state is the known state, and after unloading nothing remains."""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

from soak.judge import Judge
from soak.known import QUESTIONS
from soak.monitor import pages_of, read_metrics
from soak.requests import Request, ask
from soak.setting import EXACT, OPERATOR, PAGES, WATCHED
from soak.timeline import Timeline
from support.prompts import until
from support.serving import ServerProcess
from turret_adapters.formats.files import digest_of_folder
from turret_client import AsyncClient, Client, NotFoundError

_REQUESTS = re.compile(r'turret_requests_total\{outcome="(\w+)"\}')
_USAGE = re.compile(r"turret_usage_(requests|tokens)_total\{(.*)\}")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_IDLE_SECONDS = 120.0
# Possible outcomes, in the server's counts, of requests that clients cancelled.
_CANCELLED = {"ok", "cancelled", "deadline_exceeded"}


def wait_until_idle(server: ServerProcess) -> None:
    """Wait until no request is queued or running."""

    def is_idle() -> bool:
        metrics = read_metrics(server.metrics_url)
        busy = (f"turret_{what}" for what in ("running_requests", "waiting_requests", "loading_adapters"))
        return not (any(metrics[name] for name in busy) or pages_of(metrics)["sequence"])

    until(is_idle, _IDLE_SECONDS)


async def check_names(address: str, judge: Judge, timeline: Timeline, watched: dict[str, str]) -> None:
    """Check that lists, watch events (`watched`: the last revision of each name) and answers are the known
    ones.
    """
    async with AsyncClient(address, api_key=OPERATOR) as client:
        listed = {adapter.name: adapter for adapter in await client.list_adapters()}
        known = {name: timeline.now(name).history[0] for name in timeline.names()}
        found = {name: adapter.revision for name, adapter in listed.items()}
        seen = {name: revision for name, revision in watched.items() if revision}
        judge.expect(found == known, f"listed {found}, expected {known}")
        judge.expect(seen == known, f"the watch saw {seen}, expected {known}")
        for name in known:
            adapter = listed[name]
            judge.expect(adapter.active_requests == 0, f"{name} has active requests after the load")
            judge.expect(adapter.draining_revisions == (), f"{name} drains without requests")
            for question in range(0, len(QUESTIONS), 5):
                request = Request(tenant=OPERATOR, names=(name,), question=question, streamed=False)
                await ask(client, request)
                judge.check(request)


def check_counts(metrics: dict[str, float], judge: Judge) -> dict[str, Counter[str]]:
    """Check that the server counted every request once, under its outcome. Requests that clients cancelled
    may have finished first, or never have arrived.
    """
    server = Counter({found[1]: int(metrics[key]) for key in metrics if (found := _REQUESTS.fullmatch(key))})
    clients: Counter[str] = Counter()
    for (_, outcome), number in judge.outcomes.items():
        clients[outcome.lower()] += number
    cancelled = clients.pop("cancelled", 0) + clients.pop("killed", 0) + clients.pop("deadline_exceeded", 0)
    for outcome in server.keys() | clients.keys():
        least, most = clients[outcome], clients[outcome] + cancelled * (outcome in _CANCELLED)
        judge.expect(
            least <= server[outcome] <= most,
            f"{outcome}: the server counts {server[outcome]} requests, the clients {least} to {most}",
        )
    least, most = sum(clients.values()), sum(clients.values()) + cancelled
    judge.expect(
        least <= server.total() <= most,
        f"the server counts {server.total()} requests, the clients {least} to {most}",
    )
    _check_usage(metrics, judge)
    return {"server": server, "clients": clients, "cancelled": Counter(cancelled=cancelled)}


def _check_usage(metrics: dict[str, float], judge: Judge) -> None:
    used: Counter[tuple[str, str]] = Counter()
    for key, value in metrics.items():
        if found := _USAGE.fullmatch(key):
            labels = dict(_LABEL.findall(found[2]))
            used[labels["tenant"], labels.get("kind", "requests")] += int(value)
    judge.expect(not used["other", "requests"], "usage is not counted by tenant")
    for tenant in EXACT:
        expected = {"requests": judge.outcomes[tenant, "ok"]}
        expected |= {kind: judge.tokens[tenant, kind] for kind in ("prompt", "generated")}
        found = {kind: used[tenant, kind] for kind in expected}
        judge.expect(found == expected, f"{tenant} used {expected}, but the server counts {found}")


def unload_everything(client: Client, server: ServerProcess, root: Path, judge: Judge) -> dict[str, float]:
    """Unload everything; then no page has an owner and host memory is empty. Returns the final metrics."""
    for name in WATCHED:
        shutil.rmtree(root / "watched" / name, ignore_errors=True)
    for adapter in client.list_adapters():
        if adapter.name not in WATCHED:
            client.unload_adapter(adapter.name)
    until(lambda: not client.list_adapters(), _IDLE_SECONDS)
    wait_until_idle(server)
    metrics = read_metrics(server.metrics_url)
    pages = pages_of(metrics)
    judge.expect(pages["free"] + pages["cache"] == PAGES, f"pages still have an owner: {pages}")
    judge.expect(metrics["turret_host_adapter_bytes"] == 0, "adapters remain in host memory")
    for name in ("churn-0", "stable-lora", "watched-0"):
        try:
            client.generate([5], adapter=name)
        except NotFoundError:
            continue
        judge.violation(f"{name} answers after it was unloaded")
    return metrics


def check_store(store: Path, judge: Judge) -> int:
    """Check that a stopped server left complete revisions and nothing else. Returns their number."""
    revisions = list((store / "adapters").iterdir())
    for folder in revisions:
        judge.expect(
            digest_of_folder(folder)[:32] == folder.name,
            f"{folder} does not have the digest it is named after",
        )
    judge.expect(not list((store / "staging").iterdir()), "staging is not empty")
    with closing(sqlite3.connect(store / "names.sqlite")) as database:
        (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
        (names,) = database.execute("SELECT COUNT(*) FROM published").fetchone()
    judge.expect(verdict == "ok", f"integrity check of names.sqlite: {verdict}")
    judge.expect(names == 0, f"{names} unloaded names remain in names.sqlite")
    return len(revisions)
