"""Checks the usage log: exactly one line for every answer that a client received."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from soak.judge import Judge

_ANSWERED = {"stop", "length"}


def check_usage_log(path: Path, judge: Judge, exact: Collection[str]) -> int:
    """Compare it with the answers that were given; of tenants that are `exact` there must be no other. How
    many lines there are.
    """
    content = path.read_bytes()
    judge.expect(content.endswith(b"\n"), "the usage log ends in a torn line")
    entries = []
    for line in content.splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            judge.complain(f"a torn line in the usage log: {line[:200]!r}")
    ids = {entry["id"] for entry in entries}
    judge.expect(len(ids) == len(entries), f"{len(entries) - len(ids)} requests are twice in the usage log")
    logged = Counter(
        (
            entry["tenant"],
            tuple(entry["adapters"]),
            tuple(entry["revisions"]),
            entry["prompt_tokens"],
            entry["generated_tokens"],
        )
        for entry in entries
        if entry["finish_reason"] in _ANSWERED
    )
    lost = judge.answered - logged
    judge.expect(not lost, f"answers that the usage log lacks: {list(lost.items())[:5]}")
    others = [entry for entry in logged - judge.answered if entry[0] in exact]
    judge.expect(not others, f"answers that nobody got are in the usage log: {others[:5]}")
    return len(entries)
