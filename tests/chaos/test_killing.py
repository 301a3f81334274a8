"""The kill test of `make chaos` with two kills."""

from __future__ import annotations

import random

import pytest

from chaos.fork_server import ForkServer
from chaos.killing import Chaos
from soak.judge import Judge
from soak.known import Content, record_answers
from soak.setting import DTYPE
from soak.timeline import Timeline
from soak.usage import check_usage_log

QUESTIONS = (0, 4, 6, 8)


@pytest.fixture(scope="module")
def fork_server():
    with ForkServer() as fork_server:
        yield fork_server


@pytest.fixture
def contents(adapter_of):
    return [Content.read(kind, adapter_of("llama", kind)) for kind in ("lora", "prefix", "ia3")]


@pytest.mark.slow
def test_a_killed_server_serves_the_same_after_a_restart(fork_server, base_of, contents, tmp_path):
    model, cache = base_of("llama"), tmp_path / "cache"
    where = ("--model", str(model), "--cache", str(cache), "--device", "cpu", "--dtype", DTYPE)
    with fork_server.server(*where, "--store", str(tmp_path / "idle-store"), "--memory", "8MiB") as server:
        server.wait_until_it_serves()
        answers = record_answers(server.address, contents, tmp_path / "reference", QUESTIONS)
    judge = Judge(answers, Timeline(), forbidden={}, queue_full=set(), quota=set())
    chaos = Chaos(
        tmp_path, model, contents, judge, random.Random(3), fork_server, questions=QUESTIONS, max_seconds=1.0
    )
    for _ in range(2):
        chaos.one_kill()
    chaos.restart_from_fork()
    assert judge.violations == []
    assert judge.checked > 0
    assert check_usage_log(tmp_path / "usage.jsonl", judge, exact=()) > 0
    assert judge.violations == []
