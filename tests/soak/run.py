"""Soak test: all features at once on a server that is short of pages, host memory and disk (`make soak`).

Tenants stream, cancel and are killed, while adapters are loaded, swapped, rolled back, split, uploaded and
unloaded, and watched folders are corrupted and deleted. Every answer is compared with the known one. The
report is RESULTS.md; the exit status is 1 after any violation.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from soak.changes import AdapterSource, Changer
from soak.ending import check_counts, check_names, check_store, unload_everything, wait_until_idle
from soak.folders import FolderChanger
from soak.judge import Judge
from soak.killed_clients import KilledClients
from soak.known import make_contents, record_answers
from soak.load import Load, Watcher
from soak.monitor import Monitor, leaks
from soak.report import Run, write
from soak.setting import (
    CHURN,
    EXACT,
    FORBIDDEN,
    HOST_BYTES,
    OPERATOR,
    PAGES,
    POOR,
    SMALL,
    STABLE,
    STORE_BYTES,
    STORE_SLACK,
    WATCHED,
    constrained_server,
    idle_server,
)
from soak.timeline import State, Timeline
from soak.usage import check_usage_log
from support.models import save_model
from support.serving import ServerProcess
from turret_client import Client

ROOT = Path(".soak")
# Mean pause of the two threads that change adapters by calls and the two that change folders.
_PAUSE = 0.5
_KILLED_CLIENTS = 2
_JOIN_SECONDS = 300.0


@dataclass
class Soak:
    server: ServerProcess
    source: AdapterSource
    judge: Judge
    timeline: Timeline

    def run(self, seconds: float) -> Run:
        address, over = self.server.address, threading.Event()
        with Client(address, api_key=OPERATOR) as client:
            self._load_stable(client)
            monitor = Monitor(
                pid=self.server.process.pid,
                url=self.server.metrics_url,
                store=ROOT / "store",
                pools=ROOT / "pools.json",
                num_pages=PAGES,
                host_budget=HOST_BYTES,
                store_budget=STORE_BYTES + STORE_SLACK,
                violation=self.judge.violation,
            )
            watcher = Watcher(self.judge, address)
            killed_clients = KilledClients(address, self.judge.check, self.judge.violation, over)
            targets: list[tuple[str, Callable[[], None]]] = [
                ("load", Load(address, self.judge, self.timeline, over).run),
                *(
                    (f"killed clients {seed}", partial(killed_clients.run, seed))
                    for seed in range(_KILLED_CLIENTS)
                ),
                *(
                    (f"changes {seed}", self._changer(client, CHURN[seed::2], seed, over).run)
                    for seed in range(2)
                ),
                *(
                    (f"folders {seed}", self._folder_changer(client, WATCHED[seed::2], seed, over).run)
                    for seed in range(2)
                ),
            ]
            threads = [
                threading.Thread(name=name, target=self._guarded, args=[target, over])
                for name, target in targets
            ]
            monitor.start()
            watcher.start()
            for thread in threads:
                thread.start()
            started = time.monotonic()
            over.wait(seconds)
            over.set()
            for thread in threads:
                thread.join(_JOIN_SECONDS)
                self.judge.expect(not thread.is_alive(), f"{thread.name} does not end")
            elapsed = time.monotonic() - started
            wait_until_idle(self.server)
            watcher.wait_until_current(client)
            asyncio.run(check_names(address, self.judge, self.timeline, watcher.revisions))
            wait_until_idle(self.server)
            monitor.stop()
            watcher.stop()
            metrics = unload_everything(client, self.server, ROOT, self.judge)
            counts = check_counts(metrics, self.judge)
        self.judge.count("client processes killed", killed_clients.killed)
        return Run(elapsed, self.judge, monitor, metrics, counts)

    def _guarded(self, target: Callable[[], None], over: threading.Event) -> None:
        """Report an error of a thread under the thread's name, and end the run."""
        try:
            target()
        except Exception as error:
            self.judge.violation(f"{threading.current_thread().name}: {type(error).__name__}: {error}")
            over.set()
            raise

    def _load_stable(self, client: Client) -> None:
        contents = {content.key: content for content in self.source.contents}
        for name, key in STABLE.items():
            content = contents[key]
            with self.timeline.change(name, State().loaded(content.revision)) as change:
                client.load_adapter(name, str(self.source.write(content)))
                change.done = True

    def _changer(self, client: Client, names: tuple[str, ...], seed: int, over: threading.Event) -> Changer:
        return Changer(
            client=client,
            address=self.server.address,
            api_key=OPERATOR,
            names=names,
            source=self.source,
            judge=self.judge,
            timeline=self.timeline,
            pause=_PAUSE,
            seed=seed,
            over=over,
        )

    def _folder_changer(
        self, client: Client, names: tuple[str, ...], seed: int, over: threading.Event
    ) -> FolderChanger:
        return FolderChanger(
            client=client,
            root=ROOT / "watched",
            names=names,
            source=self.source,
            judge=self.judge,
            timeline=self.timeline,
            pause=_PAUSE,
            seed=seed,
            over=over,
        )


def check_end(server: ServerProcess, judge: Judge, run: Run) -> None:
    """Check that the server exits on SIGTERM, logged no error, and did not grow."""
    status = server.stop()
    judge.expect(status == 0, f"the server exited with status {status}")
    for line in server.log:
        if any(mark in line for mark in (" ERROR ", " CRITICAL ", "Traceback")):
            judge.violation(f"the server's log: {line.strip()}")
    run.usage_lines = check_usage_log(ROOT / "usage.jsonl", judge, EXACT)
    run.revisions_left = check_store(ROOT / "store", judge)
    for leak in leaks(run.monitor.samples):
        judge.violation(leak)


@click.command()
@click.option("--minutes", default=20.0, show_default=True)
@click.option("--results/--no-results", default=True, help="Whether to write RESULTS.md and memory.svg.")
def main(minutes: float, results: bool) -> None:  # noqa: FBT001 -- click's
    """Run the soak test; exit with 0 if there are no violations."""
    shutil.rmtree(ROOT, ignore_errors=True)
    (ROOT / "model").mkdir(parents=True)
    contents = make_contents(save_model("llama", ROOT / "model"), ROOT / "made")
    with idle_server(ROOT) as server:
        answers = record_answers(server.address, contents, ROOT / "reference")
    click.echo("the reference answers are recorded")
    timeline = Timeline()
    judge = Judge(answers, timeline, forbidden=FORBIDDEN, queue_full={SMALL}, quota={POOR})
    with ExitStack() as stack:
        server = stack.enter_context(constrained_server(ROOT))
        stack.callback(lambda: (ROOT / "server.log").write_text("".join(server.log)))
        run = Soak(server, AdapterSource(ROOT / "sources", contents, judge), judge, timeline).run(
            60 * minutes
        )
        check_end(server, judge, run)
    click.echo(write(run, minutes) if results else run.text())
    sys.exit(1 if judge.violations else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
