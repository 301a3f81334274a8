from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gpu.first_run import Stage, run, stages
from support.prompts import until

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
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    stage = Stage("late", 5, [sys.executable, "-c", program])
    found = run(stage, 3, tmp_path, seconds=5, dry=False)
    assert (found["stage"], found["status"], found["limit"]) == ("late", "out of time", 5)
    pid = int((tmp_path / "03-late.txt").read_text())
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_the_stages_take_five_minutes(tmp_path):
    assert sum(stage.seconds for stage in stages(tmp_path)) == 300


def test_a_stage_that_fails_says_how(tmp_path):
    stage = Stage("bad", 9, [sys.executable, "-c", "print('why'); raise SystemExit(3)"])
    assert run(stage, 1, tmp_path, seconds=9, dry=False)["status"] == 3
    assert (tmp_path / "01-bad.txt").read_text() == "why\n"
