from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.first_run import Stage, run, stages

SCRIPT = Path(__file__).with_name("first_run.sh")


@pytest.mark.slow
def test_every_stage_runs_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON", sys.executable)
    done = subprocess.run(  # noqa: S603 (our own script)
        ["/usr/bin/env", "bash", SCRIPT, tmp_path, "--dry-run"], capture_output=True, text=True, check=False
    )
    texts = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert done.returncode == 0, (done.stdout, done.stderr, texts)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(each["stage"], each["status"]) for each in results] == [
        (stage.name, "ok") for stage in stages(tmp_path)
    ]
    assert (tmp_path / "bench-1.json").exists()


def test_what_is_out_of_time_ends_with_all_that_it_started(tmp_path):
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    stage = Stage("late", 1, [sys.executable, "-c", program])
    found = run(stage, 3, tmp_path, seconds=1, dry=False)
    assert (found["stage"], found["status"], found["limit"]) == ("late", "out of time", 1)
    assert (tmp_path / "03-late.txt").exists()


def test_a_stage_that_fails_says_how(tmp_path):
    stage = Stage("bad", 9, [sys.executable, "-c", "print('why'); raise SystemExit(3)"])
    assert run(stage, 1, tmp_path, seconds=9, dry=False)["status"] == 3
    assert (tmp_path / "01-bad.txt").read_text() == "why\n"
