"""Which tests run which line: recorded once, so that a mutant meets the tests that can notice it first.

Lines that numba compiles, that run in other processes or only at import are not known to any test.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from coverage import CoverageData

from mutants.mirrors import import_path
from mutants.sites import Mutant

_DATA, _TIMES = "lines", "times.xml"


class Covering:
    """The record in `folder`, of the tree at `root`."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._root = root
        self._data = CoverageData(str(folder / _DATA))
        self._data.read()
        self._files = {Path(file).relative_to(root).as_posix(): file for file in self._data.measured_files()}
        self._seconds = _read_times(folder / _TIMES)

    def tests(self, mutant: Mutant, near: list[str]) -> list[str]:
        """Node ids of the tests that run the mutated lines, grouped by file: the files in `near` first, then
        those that take the least time.
        """
        if mutant.path not in self._files:
            return []
        contexts = self._data.contexts_by_lineno(self._files[mutant.path])
        source = (self._root / mutant.path).read_bytes()
        names = {
            name.rpartition("|")[0] for line in _lines(mutant, source) for name in contexts.get(line, ())
        }
        files = defaultdict[str, list[str]](list)
        for name in sorted(names & self._seconds.keys(), key=self._seconds.__getitem__):
            files[name.partition("::")[0]].append(name)
        in_order = sorted(
            files, key=lambda file: (file not in near, sum(map(self._seconds.__getitem__, files[file])))
        )
        return [name for file in in_order for name in files[file]]


def record(root: Path, folder: Path) -> None:
    """Run the tests of `make test` once, and write which of them runs which line, also those that fail."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "--quiet", "--numprocesses=2"]
    command += ["--dist=loadgroup", "--cov=server", "--cov=adapters", "--cov-context=test", "--cov-report="]
    command += [f"--junitxml={folder / _TIMES}", "-o", "junit_duration_report=total"]
    environment = os.environ | {"COVERAGE_FILE": str(folder / _DATA), "PYTHONPATH": import_path(root)}
    status = subprocess.run(command, cwd=root, env=environment, check=False).returncode  # noqa: S603 (pytest)
    if status not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
        raise RuntimeError(f"pytest ended with status {status} without a mutant")


def _read_times(file: Path) -> dict[str, float]:
    """The seconds of each test, by its node id. Tests of ours stand in no class."""
    cases = ET.parse(file).getroot().iter("testcase")  # noqa: S314 (pytest wrote it)
    return {
        f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}": float(case.attrib["time"])
        for case in cases
    }


def _lines(mutant: Mutant, source: bytes) -> range:
    """The lines from the beginning of the innermost statement around the mutation to the mutation's end."""
    first, last = (source.count(b"\n", 0, end) + 1 for end in (mutant.site.start, mutant.site.end))
    around = (
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt | ast.ExceptHandler)
        and node.lineno <= first
        and (node.end_lineno or node.lineno) >= last
    )
    return range(max(around, default=first), last + 1)
