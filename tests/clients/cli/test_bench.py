"""Output and exit status of `turret bench`; `tests/service/test_bench.py` runs it against the real server."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING

import grpc
import pytest
from click.testing import Result

from support import scripted_server as script

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def bench(turret) -> Callable[..., Result]:
    return functools.partial(turret, "bench", "--requests", "2", "--warm-up", "0")


def test_results_are_printed_and_written(bench, tmp_path):
    file = tmp_path / "run.json"
    result = bench("--output", str(file))
    assert result.exit_code == 0, result.stderr
    assert "2 succeeded, 0 failed" in result.stdout
    assert json.loads(file.read_text())["succeeded"] == 2


@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_an_unwritable_file_is_refused_before_anything_is_sent(bench, server, option):
    result = bench(option, "/nowhere/run.svg")
    assert result.exit_code == 2
    words = " ".join(result.stderr.split())
    assert "/nowhere/run.svg cannot be written: No such file or directory; choose another file" in words
    assert server.requests == []


def test_a_refused_run_leaves_no_file(bench, server, tmp_path):
    file = tmp_path / "run.json"
    server.failure = script.failure(grpc.StatusCode.UNAUTHENTICATED, "no", reason="KEY_INVALID")
    assert bench("--output", str(file), "--adapters", "1").exit_code == 1
    assert not file.exists()


def test_an_existing_file_keeps_its_content_until_the_results_are_there(bench, server, tmp_path):
    file = tmp_path / "run.json"
    file.write_text("old")
    server.failure = script.failure(grpc.StatusCode.UNAUTHENTICATED, "no", reason="KEY_INVALID")
    assert bench("--output", str(file), "--adapters", "1").exit_code == 1
    assert file.read_text() == "old"


def test_the_table_is_printed_although_the_file_cannot_be_written(bench):
    result = bench("--output", "/dev/full")
    assert result.exit_code == 1
    assert "2 succeeded" in result.stdout
    assert "error: /dev/full was not written: No space left on device" in result.stderr


def test_a_run_without_success_fails(bench, server):
    server.failure = script.failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL")
    result = bench()
    assert result.exit_code == 1
    assert "2 failed (QUEUE_FULL 2)" in result.stdout
    assert "error: no request succeeded; the table counts the errors by reason" in result.stderr
