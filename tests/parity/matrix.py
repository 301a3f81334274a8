"""Run the parity tests and print what they measured, adapters by families, as `MATRIX.md` beside this.

    python tests/parity/matrix.py

A cell is the largest difference of a logit from peft's, alone / in one batch of everything.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_FIRST_LINES = """\
# Parity with peft

Largest absolute difference of a logit between the server and peft on the same NF4 base, in float32:
alone / in one batch of all adapters below. Logits have a standard deviation above 1; the tests allow
{tolerance:g}. Made by `make parity` with {versions}.
"""


class Collector:
    """Takes the properties that the tests record."""

    def __init__(self) -> None:
        self.alone: dict[tuple[str, str], float] = {}
        self.mixed: dict[tuple[str, str], float] = {}
        self.families: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or "[" not in report.nodeid:
            return
        name, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
        for family in self.families_of(parameters):
            for key, value in report.user_properties:
                if name == "test_alone":
                    case = parameters.removeprefix(f"{family}-").partition("]")[0]
                    self.alone[case, family] = float(value)
                else:
                    self.mixed[key, family] = float(value)

    def families_of(self, parameters: str) -> list[str]:
        from support.models import FAMILIES  # noqa: PLC0415 (pytest puts it on the path)

        self.families = list(FAMILIES)
        named = parameters.partition("]")[0].partition("@")[0]
        found = [family for family in FAMILIES if named == family or named.startswith(f"{family}-")]
        return sorted(found, key=len)[-1:]


def main() -> int:
    collector = Collector()
    status = pytest.main(
        [str(_HERE / "test_peft_parity.py"), "-q", "-n", "2", "--dist", "loadgroup"], plugins=[collector]
    )
    table = defaultdict(dict)
    for (case, family), alone in collector.alone.items():
        mixed = collector.mixed.get((case, family))
        table[case][family] = f"{alone:.0e} / {mixed:.0e}" if mixed is not None else f"{alone:.0e}"
    from test_peft_parity import CASES, TOLERANCE  # noqa: PLC0415 (pytest puts it on the path)

    packages = ("peft", "transformers", "bitsandbytes", "torch")
    lines = [
        _FIRST_LINES.format(
            tolerance=TOLERANCE, versions=", ".join(f"{name} {version(name)}" for name in packages)
        ),
        f"| adapter | {' | '.join(collector.families)} |",
        f"|---|{'---|' * len(collector.families)}",
    ]
    lines += [
        f"| {case.name} | {' | '.join(table[case.name].get(family, '') for family in collector.families)} |"
        for case in CASES
    ]
    text = "\n".join(lines) + "\n"
    (_HERE / "MATRIX.md").write_text(text)
    sys.stdout.write(text)
    return int(status)


if __name__ == "__main__":
    sys.path[:0] = [str(_HERE), str(_HERE.parent)]
    sys.exit(main())
