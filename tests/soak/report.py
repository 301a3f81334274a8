"""The report of a soak test: RESULTS.md and memory.svg."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import psutil
from matplotlib import pyplot as plt

from soak.judge import Judge
from soak.monitor import MIB, Monitor, slopes
from soak.setting import ALL_NAMES, DTYPE, HOST_BYTES, PAGES, STORE_BYTES

_HERE = Path(__file__).parent

# Why the judge allows outcomes other than "ok".
_WHY = {
    "cancelled": "the client closed the stream midway; its tokens begin the reference answer",
    "killed": "the client process was killed; its tokens begin the reference answer",
    "DEADLINE_EXCEEDED": "the client set a short deadline; its tokens begin the reference answer",
    "ADAPTER_NOT_FOUND": "the name was not served during some of the request, or is another tenant's",
    "REVISION_NOT_FOUND": "`name@revision` of a revision older than the two that the store keeps",
    "QUEUE_FULL": "the tenant `small` may queue one request and sends four at a time",
    "QUOTA_EXCEEDED": "the tenant `poor` has few tokens a minute",
    "PROMPT_TOO_LONG": "the request needs more tokens than the context holds",
}


@dataclass
class Run:
    seconds: float
    judge: Judge
    monitor: Monitor
    metrics: dict[str, float]
    counts: dict[str, Counter[str]]
    revisions_left: int = 0
    usage_lines: int = 0

    def text(self) -> str:
        return "\n".join(
            [*self._facts(), "", *self._outcomes(), "", *self._events(), "", *self._memory(), ""]
        )

    def _facts(self) -> Iterator[str]:
        judge, counts = self.judge, self.counts
        yield f"- **Violations: {len(judge.violations)}.**"
        yield from (f"  - {violation[:500]}" for violation in judge.violations[:20])
        yield (
            f"- Answers compared with the reference answer: {judge.checked:,}, "
            f"with {judge.tokens_checked:,} tokens; wrong answers: "
            f"{sum('wrong' in violation for violation in judge.violations)}."
        )
        yield (
            f"- Requests counted by the server: {counts['server'].total():,}; requests that clients "
            f"completed: {counts['clients'].total():,}; requests cancelled by clients: "
            f"{counts['cancelled'].total():,}."
        )
        yield (
            f"- The usage log has {self.usage_lines:,} lines, all complete and unique, and one for "
            "every answer that a client received."
        )
        yield (
            f"- Page counts were consistent in all {self.monitor.num_checks:,} checks ({PAGES} pages). "
            f"Preempted requests: {self.metrics['turret_preemptions_total']:,.0f}; adapter evictions: "
            f"{self.metrics['turret_adapter_evictions_total']:,.0f}; reads from the store: "
            f"{self.metrics['turret_adapter_disk_reads_total']:,.0f}. After everything was unloaded, no page "
            "had an owner."
        )
        maxima = self.monitor.maxima
        yield (
            f"- Adapters in host memory: at most {maxima['host'] / 1024:.0f} KiB (budget "
            f"{HOST_BYTES / 1024:.0f}); in the store: at most {maxima['store'] / 1024:.0f} KiB (budget "
            f"{STORE_BYTES / 1024:.0f}, without running loads). All {self.revisions_left} revisions that "
            "remain in the store have the digest they are named after."
        )

    def _outcomes(self) -> Iterator[str]:
        by_outcome: Counter[str] = Counter()
        for (_, outcome), number in self.judge.outcomes.items():
            by_outcome[outcome] += number
        yield "| outcome | requests | why it is expected |"
        yield "|---|---:|---|"
        for outcome, number in by_outcome.most_common():
            why = "the reference answer of a revision that the name served" if outcome == "ok" else ""
            yield f"| {outcome} | {number:,} | {why or _WHY.get(outcome, 'unexpected')} |"

    def _events(self) -> Iterator[str]:
        yield "| event | count | per minute |"
        yield "|---|---:|---:|"
        for event, number in sorted(self.judge.events.items()):
            yield f"| {event} | {number:,} | {60 * number / self.seconds:.1f} |"

    def _memory(self) -> Iterator[str]:
        yield "| last three quarters of the run | mean | growth (linear fit) |"
        yield "|---|---:|---:|"
        for what, mean, growth in slopes(self.monitor.samples):
            yield f"| {what} | {mean:.1f} | {growth:+.2f} ({100 * growth / mean:+.2f} %) |"
        last = self.monitor.samples[-1]
        yield ""
        yield f"Pools had {last.pooled_threads} of their {last.pool_capacity} threads at the end."


def _draw(run: Run) -> None:
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "turret"
    figure, axes = plt.subplots(figsize=(7, 3))
    samples = run.monitor.samples
    minutes = [sample.seconds / 60 for sample in samples]
    axes.plot(minutes, [sample.resident / MIB for sample in samples])
    axes.set(ylim=(0, None), xlabel="minutes", ylabel="resident memory (MiB)")
    figure.tight_layout()
    figure.savefig(_HERE / "memory.svg", metadata={"Date": None})
    plt.close(figure)


def write(run: Run, minutes: float) -> str:
    _draw(run)
    about = f"""\
# Soak test

`make soak`: {minutes:g} minutes of mixed load on {len(ALL_NAMES)} names in {DTYPE}, with pages for
a few of their adapters and some of the requests, while adapters are loaded and unloaded, clients cancel and
are killed, and files are corrupted. Every answer is compared with the reference answer, which an idle server
gave to the request alone. {platform.machine()}, {psutil.cpu_count(logical=False)} cores;
{time.strftime("%Y-%m-%d")}.

"""
    text = about + run.text() + "\n![Resident memory of the server](memory.svg)\n"
    (_HERE / "RESULTS.md").write_text(text)
    return text
