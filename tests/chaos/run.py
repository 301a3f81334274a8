"""Kills a server repeatedly while it generates, loads, swaps, rolls back, splits and receives uploads, and
starts it on the same store each time; `make chaos` does it fifty times.

After each kill, the store and the names must be complete, acknowledged changes must be applied and others
applied or not as a whole, names must give the known answers of their revisions, and the interrupted upload
must resume. The report is RESULTS.md; the exit status is 1 after any violation.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path

import click

from chaos.fork_server import ForkServer
from chaos.killing import Chaos
from chaos.report import write
from soak.judge import Judge
from soak.known import make_contents, record_answers
from soak.setting import idle_server
from soak.timeline import Timeline
from soak.usage import check_usage_log
from support.models import save_model

ROOT = Path(".chaos")


@click.command()
@click.option("--kills", default=50, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--results/--no-results", default=True, help="Whether to write RESULTS.md.")
def main(kills: int, seed: int, results: bool) -> None:  # noqa: FBT001 -- click's
    """Run the kill test; exit with 0 if there are no violations."""
    shutil.rmtree(ROOT, ignore_errors=True)
    (ROOT / "model").mkdir(parents=True)
    contents = make_contents(save_model("llama", ROOT / "model"), ROOT / "made")
    with idle_server(ROOT) as server:
        answers = record_answers(server.address, contents, ROOT / "reference")
    judge = Judge(answers, Timeline(), forbidden={}, queue_full=set(), quota=set())
    with ForkServer() as fork_server:
        chaos = Chaos(ROOT, ROOT / "model", contents, judge, random.Random(seed), fork_server)
        for _ in range(kills):
            chaos.one_kill()
            click.echo(f"killed {chaos.kills} times, {len(judge.violations)} violations")
    exec_seconds = chaos.restart_from_exec()
    judge.count("lines of the usage log", check_usage_log(ROOT / "usage.jsonl", judge, exact=()))
    click.echo(write(judge, chaos.kills, chaos.start_seconds, exec_seconds, results=results))
    sys.exit(1 if judge.violations else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
