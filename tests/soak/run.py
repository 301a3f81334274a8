"""A soak: all features at once on a server that is short of pages, host memory and disk (`make soak`).

Tenants stream, cancel and are killed, while adapters are loaded, swapped, rolled back, split, uploaded and
unloaded, and watched folders break and vanish. Every answer is compared with the known one. The report is
RESULTS.md; the exit status is 1 if anything was violated.
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
from pathlib import Path

import click

from soak.changes import Changer, Shelf
from soak.ending import calm, check_counts, check_names, check_store, unload_everything
from soak.folders import FolderChanger
from soak.judge import Judge
from soak.known import learn, make_contents
from soak.load import Load, Watcher
from soak.mortal import Mortals
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
    quiet,
    short_of_everything,
)
from soak.timeline import State, Timeline
from soak.usage import check_usage_log
from soak.vitals import Vitals, leaks
from support.models import save_model
from support.serving import ServerProcess
from turret_client import Client

ROOT = Path(".soak")
# Two who change names by calls and two who change folders, each about once in so many seconds.
_PAUSE = 0.5
_MORTALS = 2
_JOIN_SECONDS = 300.0


@dataclass
class Soak:
    server: ServerProcess
    shelf: Shelf
    judge: Judge
    timeline: Timeline

    def run(self, seconds: float) -> Run:
        address, over = self.server.address, threading.Event()
        with Client(address, api_key=OPERATOR) as client:
            self._load_stable(client)
            vitals = Vitals(
                pid=self.server.process.pid,
                url=self.server.metrics_url,
                store=ROOT / "store",
                pools=ROOT / "pools.json",
                num_pages=PAGES,
                host_budget=HOST_BYTES,
                store_budget=STORE_BYTES + STORE_SLACK,
                complain=self.judge.complain,
            )
            watcher = Watcher(self.judge, address)
            mortals = Mortals(address, self.judge.take, over)
            working = [
                Load(address, self.judge, self.timeline, over).run,
                *(lambda seed=seed: mortals.run(seed) for seed in range(_MORTALS)),
                *(self._changer(client, CHURN[seed::2], seed, over).run for seed in range(2)),
                *(self._folder_changer(client, WATCHED[seed::2], seed, over).run for seed in range(2)),
            ]
            threads = [threading.Thread(target=self._guarded, args=[work, over]) for work in working]
            vitals.start()
            watcher.start()
            for thread in threads:
                thread.start()
            started = time.monotonic()
            over.wait(seconds)
            over.set()
            for thread in threads:
                thread.join(_JOIN_SECONDS)
                self.judge.expect(not thread.is_alive(), f"{thread.name} does not come to its end")
            elapsed = time.monotonic() - started
            calm(self.server)
            watcher.settle(client)
            asyncio.run(check_names(address, self.judge, self.timeline, watcher.revisions))
            calm(self.server)
            vitals.stop()
            watcher.stop()
            metrics = unload_everything(client, self.server, ROOT, self.judge)
            counts = check_counts(metrics, self.judge)
        self.judge.count("client processes killed", mortals.killed)
        return Run(elapsed, self.judge, vitals, metrics, counts)

    def _guarded(self, work: Callable[[], None], over: threading.Event) -> None:
        try:
            work()
        except Exception as error:
            self.judge.complain(f"{work}: {type(error).__name__}: {error}")
            over.set()
            raise

    def _load_stable(self, client: Client) -> None:
        contents = {content.key: content for content in self.shelf.contents}
        for name, key in STABLE.items():
            content = contents[key]
            with self.timeline.change(name, State().loaded(content.revision)) as change:
                client.load_adapter(name, str(self.shelf.place(content)))
                change.done = True

    def _changer(self, client: Client, names: tuple[str, ...], seed: int, over: threading.Event) -> Changer:
        return Changer(
            client=client,
            address=self.server.address,
            api_key=OPERATOR,
            names=names,
            shelf=self.shelf,
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
            shelf=self.shelf,
            judge=self.judge,
            timeline=self.timeline,
            pause=_PAUSE,
            seed=seed,
            over=over,
        )


def check_end(server: ServerProcess, judge: Judge, run: Run) -> None:
    """Check that the server exits on SIGTERM, logged no error, and did not grow."""
    status = server.stop()
    judge.expect(status == 0, f"the server ended with status {status}")
    for line in server.log:
        if any(mark in line for mark in (" ERROR ", " CRITICAL ", "Traceback")):
            judge.complain(f"the server's log: {line.strip()}")
    run.usage_lines = check_usage_log(ROOT / "usage.jsonl", judge, EXACT)
    run.revisions_left = check_store(ROOT / "store", judge)
    for leak in leaks(run.vitals.samples):
        judge.complain(leak)


@click.command()
@click.option("--minutes", default=20.0, show_default=True)
@click.option("--results/--no-results", default=True, help="Whether to write RESULTS.md and memory.svg.")
def main(minutes: float, results: bool) -> None:  # noqa: FBT001 -- click's
    """Run the soak; exit with 0 if nothing was violated."""
    shutil.rmtree(ROOT, ignore_errors=True)
    (ROOT / "model").mkdir(parents=True)
    contents = make_contents(save_model("llama", ROOT / "model"), ROOT / "made")
    with quiet(ROOT) as server:
        answers = learn(server.address, contents, ROOT / "learnt")
    click.echo("the answers are known")
    timeline = Timeline()
    judge = Judge(answers, timeline, forbidden=FORBIDDEN, queue_full={SMALL}, quota={POOR})
    with ExitStack() as stack:
        server = stack.enter_context(short_of_everything(ROOT))
        stack.callback(lambda: (ROOT / "server.log").write_text("".join(server.log)))
        run = Soak(server, Shelf(ROOT / "sources", contents, judge), judge, timeline).run(60 * minutes)
        check_end(server, judge, run)
    click.echo(write(run, minutes) if results else run.text())
    sys.exit(1 if judge.violations else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
