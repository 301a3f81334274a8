"""A small chaos: what `make chaos` does fifty times, a few times."""

from __future__ import annotations

import random

import pytest

from chaos.killing import Chaos
from chaos.nursery import Nursery
from soak.judge import Judge
from soak.known import Content, learn
from soak.setting import DTYPE
from soak.timeline import Timeline
from soak.usage import check_usage_log

QUESTIONS = (0, 4, 6, 8)


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def contents(adapter_of):
    return [Content.read(kind, adapter_of("llama", kind)) for kind in ("lora", "prefix", "ia3")]


@pytest.mark.slow
def test_a_server_that_is_killed_at_work_serves_the_same_afterwards(nursery, base_of, contents, tmp_path):
    model, cache = base_of("llama"), tmp_path / "cache"
    where = ("--model", str(model), "--cache", str(cache), "--device", "cpu", "--dtype", DTYPE)
    with nursery.server(*where, "--store", str(tmp_path / "quiet"), "--memory", "8MiB") as server:
        server.wait_until_it_serves()
        answers = learn(server.address, contents, tmp_path / "learnt", QUESTIONS)
    judge = Judge(answers, Timeline(), forbidden={}, queue_full=set(), quota=set())
    chaos = Chaos(
        tmp_path, model, contents, judge, random.Random(3), nursery, questions=QUESTIONS, most_seconds=1.0
    )
    for _ in range(2):
        chaos.one_kill()
    chaos.last_look()
    assert judge.violations == []
    assert judge.checked > 0
    assert check_usage_log(tmp_path / "usage.jsonl", judge, exact=()) > 0
    assert judge.violations == []
