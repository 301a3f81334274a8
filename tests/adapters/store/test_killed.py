"""A process that is killed at any point leaves a whole store, and names that serve what they served."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
MEMORY = Path("/dev/shm")  # noqa: S108 -- a folder of its own is made in it


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: a kill loses nothing that a disk would have kept, so that waiting for
    one shows nothing.
    """
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else tmp_path) as folder:
        yield Path(folder) / "root"


def run(*arguments: str | Path) -> int:
    result = subprocess.run(  # noqa: S603 -- our own code
        [sys.executable, TESTS / "support" / "killing.py", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.slow
def test_killed_at_points_from_the_first_to_the_last(root: Path) -> None:
    # Every 13th of some 2000 points; `killing.py count-down ROOT 1 1` takes each.
    points = run("count-down", root, "1", "13")
    assert points > 1500


def test_killed_at_any_moment(root: Path) -> None:
    steps = run("at-random", root, "40", "1")
    assert steps > 40
