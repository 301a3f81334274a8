"""The report of the kill test: RESULTS.md."""

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
    outcomes: Counter[str] = Counter()
    for (_, outcome), number in judge.outcomes.items():
        outcomes[outcome] += number
    text = f"""\
# Kill test

`make chaos`: one server in {DTYPE}, killed with SIGKILL at random moments while two clients change six names
without a pause, one uploads slowly and six send requests, and every fifth time during startup; each time
restarted on the same store. {platform.machine()}, {psutil.cpu_count(logical=False)} cores;
{time.strftime("%Y-%m-%d")}.

- Kills: {kills}. **Violations: {len(judge.violations)}.**
- Time to serve again, forked from a process that has imported everything: median
  {statistics.median(starts):.1f} s, at most {starts[-1]:.1f} s; from exec: {exec_seconds:.1f} s.
- Answers compared with the reference answer, including partial ones: {judge.checked:,}, with
  {judge.tokens_checked:,} tokens.

| outcome | requests |
|---|---:|
{_rows(outcomes)}

| event | count |
|---|---:|
{_rows(judge.events)}
"""
    if results:
        (_HERE / "RESULTS.md").write_text(text)
    return text


def _rows(counts: Counter[str]) -> str:
    return "\n".join(f"| {what} | {number:,} |" for what, number in sorted(counts.items()))
