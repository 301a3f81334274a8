"""Checks the usage log: exactly one line for every answer that a client received."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from soak.judge import Judge

_ANSWERED = {"stop", "length"}


def check_usage_log(path: Path, judge: Judge, exact: Collection[str]) -> int:
    """Compare the log with the answers that clients received; `exact` tenants must have no other entries.
    Returns the number of lines.
    """
    content = path.read_bytes()
    judge.expect(content.endswith(b"\n"), "the last line of the usage log is truncated")
    entries = []
    for line in content.splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            judge.violation(f"a truncated line in the usage log: {line[:200]!r}")
    ids = {entry["id"] for entry in entries}
    judge.expect(len(ids) == len(entries), f"{len(entries) - len(ids)} requests are in the usage log twice")
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
    judge.expect(not lost, f"answers missing from the usage log: {list(lost.items())[:5]}")
    others = [entry for entry in logged - judge.answered if entry[0] in exact]
    judge.expect(not others, f"entries of the usage log without an answer: {others[:5]}")
    return len(entries)
