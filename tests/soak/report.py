"""The report of a soak: RESULTS.md and memory.svg."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import psutil
from matplotlib import pyplot as plt

from soak.judge import Judge
from soak.setting import DTYPE, EVERY, HOST_BYTES, PAGES, STORE_BYTES
from soak.vitals import MIB, Vitals, slopes

_HERE = Path(__file__).parent

# Why an end other than "ok" is right where the judge lets it pass.
_WHY = {
    "left": "the client closed its stream in the middle; what had come is how the answer begins",
    "killed": "the client's process was killed; what had come is how the answer begins",
    "DEADLINE_EXCEEDED": "the client set so short a deadline; what had come is how the answer begins",
    "ADAPTER_NOT_FOUND": "the name was not served at some time of the request, or is another tenant's",
    "REVISION_NOT_FOUND": "`name@revision` with one of no place among the two latest that the store keeps",
    "QUEUE_FULL": "the tenant `small` may queue one request and sends four at a time",
    "QUOTA_EXCEEDED": "the tenant `poor` has few tokens a minute",
    "PROMPT_TOO_LONG": "more tokens than the context were asked for",
}


@dataclass
class Run:
    seconds: float
    judge: Judge
    vitals: Vitals
    metrics: dict[str, float]
    counts: dict[str, Counter[str]]
    revisions_left: int = 0
    usage_lines: int = 0

    def text(self) -> str:
        return "\n".join([*self._facts(), "", *self._ends(), "", *self._events(), "", *self._memory(), ""])

    def _facts(self) -> Iterator[str]:
        judge, counts = self.judge, self.counts
        yield f"- **Violations: {len(judge.violations)}.**"
        yield from (f"  - {violation[:500]}" for violation in judge.violations[:20])
        yield (
            f"- Answers compared with what their revision is known to say: {judge.checked:,}, "
            f"of {judge.tokens_checked:,} tokens; wrong ones: "
            f"{sum('wrong' in violation for violation in judge.violations)}."
        )
        yield (
            f"- Requests that the server counts: {counts['server'].total():,}; ends that clients saw: "
            f"{counts['clients'].total():,}, and {counts['unsure'].total():,} cut short by their clients."
        )
        yield (
            f"- The usage log has {self.usage_lines:,} lines, each whole and there once, one for every "
            "answer that a client was given."
        )
        yield (
            f"- The books of pages, looked at {self.vitals.looks:,} times, add up to {PAGES}. Preempted "
            f"requests: {self.metrics['turret_preemptions_total']:,.0f}; adapters that gave their pages up: "
            f"{self.metrics['turret_adapter_evictions_total']:,.0f}, that were read again from the disk: "
            f"{self.metrics['turret_adapter_disk_reads_total']:,.0f}. At the end, with everything unloaded, "
            "none was anybody's."
        )
        most = self.vitals.most
        yield (
            f"- Adapters in host memory: at most {most['host'] / 1024:.0f} KiB of {HOST_BYTES / 1024:.0f}; "
            f"in the store: {most['store'] / 1024:.0f} KiB by a budget of {STORE_BYTES / 1024:.0f}, and "
            "of what loads at that moment. The "
            f"{self.revisions_left} revisions that were left in the store have the digests they are named "
            "after."
        )

    def _ends(self) -> Iterator[str]:
        by_outcome: Counter[str] = Counter()
        for (_, outcome), number in self.judge.outcomes.items():
            by_outcome[outcome] += number
        yield "| how requests ended | | why that is right |"
        yield "|---|---|---|"
        for outcome, number in by_outcome.most_common():
            why = "the whole answer of a revision that the name served then" if outcome == "ok" else ""
            yield f"| {outcome} | {number:,} | {why or _WHY.get(outcome, 'it is not')} |"

    def _events(self) -> Iterator[str]:
        yield "| what happened | | a minute |"
        yield "|---|---|---|"
        for event, number in sorted(self.judge.events.items()):
            yield f"| {event} | {number:,} | {60 * number / self.seconds:.1f} |"

    def _memory(self) -> Iterator[str]:
        yield "| of the last three quarters | mean | rise of the line through it |"
        yield "|---|---|---|"
        for what, mean, rise in slopes(self.vitals.samples):
            yield f"| {what} | {mean:.1f} | {rise:+.2f} ({100 * rise / mean:+.2f} %) |"
        last = self.vitals.samples[-1]
        yield ""
        yield f"Pools had {last.pooled_threads} of their {last.pool_capacity} threads at the end."


def _draw(run: Run) -> None:
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "turret"
    figure, axes = plt.subplots(figsize=(7, 3))
    samples = run.vitals.samples
    minutes = [sample.seconds / 60 for sample in samples]
    axes.plot(minutes, [sample.resident / MIB for sample in samples])
    axes.set(ylim=(0, None), xlabel="minutes", ylabel="resident memory (MiB)")
    figure.tight_layout()
    figure.savefig(_HERE / "memory.svg", metadata={"Date": None})
    plt.close(figure)


def _join(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def write(run: Run, minutes: float) -> str:
    _draw(run)
    about = f"""\
# A soak

`make soak`: {minutes:g} minutes of mixed load on {len(EVERY)} names in {DTYPE}, with pages for a few of their
adapters and some of the requests, while adapters come and go, clients leave and are killed, and files break.
Every answer is compared with what its revision answered a quiet server, alone. {platform.machine()},
{psutil.cpu_count(logical=False)} cores; {time.strftime("%Y-%m-%d")}.

"""
    text = about + run.text() + "\n![Resident memory of the server](memory.svg)\n"
    (_HERE / "RESULTS.md").write_text(text)
    return text
