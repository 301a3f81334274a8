"""The report of the kills: RESULTS.md."""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from soak.judge import Judge
from soak.setting import DTYPE

_HERE = Path(__file__).parent


def write(
    judge: Judge, kills: int, start_seconds: Sequence[float], exec_seconds: float, *, results: bool
) -> str:
    """The report; written to RESULTS.md if `results`."""
    starts = sorted(start_seconds)
    ends: Counter[str] = Counter()
    for (_, outcome), number in judge.outcomes.items():
        ends[outcome] += number
    text = f"""\
# Killed, and started again

`make chaos`: one server in {DTYPE}, killed with SIGKILL at random moments while two clients change six names
without a pause, one uploads slowly and six ask, and every fifth time while it starts; each time started again
on the same store. {platform.machine()}, {psutil.cpu_count(logical=False)} cores;
{time.strftime("%Y-%m-%d")}.

- Kills: {kills}. **Violations: {len(judge.violations)}.**
- From a fork of a process that has imported everything to serving again: median
  {statistics.median(starts):.1f} s, at most {starts[-1]:.1f} s; from exec, once: {exec_seconds:.1f} s.
- Answers compared with what their revision is known to say: {judge.checked:,}, of {judge.tokens_checked:,}
  tokens, those that a kill cut short among them.

| how requests ended | |
|---|---|
{_rows(ends)}

| what happened | |
|---|---|
{_rows(judge.events)}
"""
    if results:
        (_HERE / "RESULTS.md").write_text(text)
    return text


def _rows(counts: Counter[str]) -> str:
    return "\n".join(f"| {what} | {number:,} |" for what, number in sorted(counts.items()))
