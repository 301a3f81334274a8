"""Checks after the load: the remaining state is the known state, and after unloading nothing remains."""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

from soak.asking import Asked, ask
from soak.judge import Judge
from soak.known import QUESTIONS
from soak.setting import EXACT, OPERATOR, PAGES, WATCHED
from soak.timeline import Timeline
from soak.vitals import pages_of, read_metrics
from support.prompts import until
from support.serving import ServerProcess
from turret_adapters.formats.files import digest_of_folder
from turret_client import AsyncClient, Client, NotFoundError

_REQUESTS = re.compile(r'turret_requests_total\{outcome="(\w+)"\}')
_USAGE = re.compile(r"turret_usage_(requests|tokens)_total\{(.*)\}")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_CALMS_DOWN_SECONDS = 120.0
# How a request ends that is not let come to its end.
_CUT_SHORT = {"ok", "cancelled", "deadline_exceeded"}


def calm(server: ServerProcess) -> None:
    """Wait until no request is queued or running."""

    def is_calm() -> bool:
        metrics = read_metrics(server.metrics_url)
        busy = (f"turret_{what}" for what in ("running_requests", "waiting_requests", "loading_adapters"))
        return not (any(metrics[name] for name in busy) or pages_of(metrics)["sequence"])

    until(is_calm, _CALMS_DOWN_SECONDS)


async def check_names(address: str, judge: Judge, timeline: Timeline, watched: dict[str, str]) -> None:
    """Everything is listed, was told to who watches, and answers as it is known. `watched` are the revisions
    that a watcher was told last.
    """
    async with AsyncClient(address, api_key=OPERATOR) as client:
        listed = {adapter.name: adapter for adapter in await client.list_adapters()}
        known = {name: timeline.now(name).history[0] for name in timeline.names()}
        found = {name: adapter.revision for name, adapter in listed.items()}
        told = {name: revision for name, revision in watched.items() if revision}
        judge.expect(found == known, f"listed {found}, expected {known}")
        judge.expect(told == known, f"a watcher was told {told}, expected {known}")
        for name in known:
            adapter = listed[name]
            judge.expect(adapter.active_requests == 0, f"{name} has requests that nobody made")
            judge.expect(adapter.draining_revisions == (), f"{name} drains without requests")
            for question in range(0, len(QUESTIONS), 5):
                asked = Asked(tenant=OPERATOR, names=(name,), question=question, streamed=False)
                await ask(client, asked)
                judge.take(asked)


def check_counts(metrics: dict[str, float], judge: Judge) -> dict[str, Counter[str]]:
    """Every request is in the server's counts once, under how it ended. Of those that were cut short nobody
    knows whether they came to their end first, or ever arrived.
    """
    server = Counter({found[1]: int(metrics[key]) for key in metrics if (found := _REQUESTS.fullmatch(key))})
    clients: Counter[str] = Counter()
    for (_, outcome), number in judge.outcomes.items():
        clients[outcome.lower()] += number
    unsure = clients.pop("left", 0) + clients.pop("killed", 0) + clients.pop("deadline_exceeded", 0)
    for outcome in server.keys() | clients.keys():
        least, most = clients[outcome], clients[outcome] + unsure * (outcome in _CUT_SHORT)
        judge.expect(
            least <= server[outcome] <= most,
            f"{outcome}: the server counts {server[outcome]} requests, the clients {least} to {most}",
        )
    least, most = sum(clients.values()), sum(clients.values()) + unsure
    judge.expect(least <= server.total() <= most, f"{server.total()} requests, sent were {least} to {most}")
    _check_usage(metrics, judge)
    return {"server": server, "clients": clients, "unsure": Counter(unsure=unsure)}


def _check_usage(metrics: dict[str, float], judge: Judge) -> None:
    used: Counter[tuple[str, str]] = Counter()
    for key, value in metrics.items():
        if found := _USAGE.fullmatch(key):
            labels = dict(_LABEL.findall(found[2]))
            used[labels["tenant"], labels.get("kind", "requests")] += int(value)
    judge.expect(not used["other", "requests"], "usage that is not counted by tenant")
    for tenant in EXACT:
        expected = {"requests": judge.outcomes[tenant, "ok"]}
        expected |= {kind: judge.tokens[tenant, kind] for kind in ("prompt", "generated")}
        found = {kind: used[tenant, kind] for kind in expected}
        judge.expect(found == expected, f"{tenant} used {expected}, and the server counts {found}")


def unload_everything(client: Client, server: ServerProcess, root: Path, judge: Judge) -> dict[str, float]:
    """Unload everything; then no page has an owner and host memory is empty. Returns the final metrics."""
    for name in WATCHED:
        shutil.rmtree(root / "watched" / name, ignore_errors=True)
    for adapter in client.list_adapters():
        if adapter.name not in WATCHED:
            client.unload_adapter(adapter.name)
    until(lambda: not client.list_adapters(), _CALMS_DOWN_SECONDS)
    calm(server)
    metrics = read_metrics(server.metrics_url)
    pages = pages_of(metrics)
    judge.expect(pages["free"] + pages["cache"] == PAGES, f"pages are left with somebody: {pages}")
    judge.expect(metrics["turret_host_adapter_bytes"] == 0, "adapters are left in host memory")
    for name in ("churn-0", "stable-lora", "watched-0"):
        try:
            client.generate([5], adapter=name)
        except NotFoundError:
            continue
        judge.complain(f"{name} answers after it was unloaded")
    return metrics


def check_store(store: Path, judge: Judge) -> int:
    """Check that a stopped server left complete revisions and nothing else. Returns their number."""
    revisions = list((store / "adapters").iterdir())
    for folder in revisions:
        judge.expect(digest_of_folder(folder)[:32] == folder.name, f"{folder} is not what it is named after")
    judge.expect(not list((store / "staging").iterdir()), "something is left in staging")
    with closing(sqlite3.connect(store / "names.sqlite")) as database:
        (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
        (names,) = database.execute("SELECT COUNT(*) FROM published").fetchone()
    judge.expect(verdict == "ok", f"the database of names: {verdict}")
    judge.expect(names == 0, f"{names} entries of names that were unloaded")
    return len(revisions)
