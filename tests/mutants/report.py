"""The report of a run of mutants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from mutants.sites import Mutant


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant; `killer` is the test that failed, or mypy; empty if it survived."""

    mutant: Mutant
    diff: str
    killer: str
    how: str
    seconds: float

    @property
    def package(self) -> str:
        """The first two folders of the module's package: `turret_server/engine`."""
        inner = PurePosixPath(self.mutant.path).relative_to(PurePosixPath(self.mutant.path).parts[0]).parent
        return "/".join(inner.parts[:2])


def report(about: str, outcomes: list[Outcome]) -> str:
    """Markdown: counts by package and by kind of mutation, survivors as diffs, and what killed the rest."""
    killed = [outcome for outcome in outcomes if outcome.killer]
    survivors = [outcome for outcome in outcomes if not outcome.killer]
    lines = ["# Mutants", "", f"{about}; {len(killed)} of {len(outcomes)} were killed.", ""]
    lines += _table("Package", ((outcome.package, bool(outcome.killer)) for outcome in outcomes))
    lines += _table("Mutation", ((outcome.mutant.site.kind, bool(outcome.killer)) for outcome in outcomes))
    lines += ["## Survivors", ""]
    for outcome in sorted(survivors, key=lambda outcome: outcome.mutant.path):
        lines += ["```diff", outcome.diff, "```", ""]
    lines += ["## Killed", "", "| module | mutation | by | seconds |", "|---|---|---|---|"]
    for outcome in sorted(killed, key=lambda outcome: outcome.mutant.path):
        by = f"{outcome.killer} ({outcome.how})".replace("|", "\\|")
        row = (outcome.mutant.path, outcome.mutant.site.kind, by, f"{outcome.seconds:.0f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _table(head: str, fates: Iterable[tuple[str, bool]]) -> list[str]:
    counts = Counter(fates)
    names = sorted({name for name, _ in counts})
    rows = [
        f"| {name} | {counts[name, True] + counts[name, False]} | {counts[name, False]} |" for name in names
    ]
    return [f"| {head} | mutants | survivors |", "|---|---|---|", *rows, ""]
