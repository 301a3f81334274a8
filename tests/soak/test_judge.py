"""The judge of the soak reports every wrong outcome and accepts the allowed ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from soak.judge import Judge
from soak.known import QUESTIONS, Answer, Content, KnownAnswers
from soak.requests import Request
from soak.timeline import State, Timeline

ONE, TWO = Content("one", b"{}", b"1"), Content("two", b"{}", b"2")
NEWER = ONE.variant(1)
ANSWERS = {
    "one": {index: Answer((5, index), "x", "length") for index in range(len(QUESTIONS))},
    "two": {index: Answer((6, index), "y", "length") for index in range(len(QUESTIONS))},
}


@pytest.fixture
def judge():
    """The name `poet` serves `NEWER`, and served `ONE` before."""
    timeline = Timeline()
    timeline.put("poet", State().loaded(ONE.revision).loaded(NEWER.revision))
    answers = KnownAnswers([ONE, TWO], ANSWERS)
    answers.add(NEWER)
    return Judge(answers, timeline, forbidden={"acme": "bolt-"}, queue_full={"small"}, quota={"poor"})


RIGHT = Request(
    tenant="acme",
    names=("poet",),
    question=3,
    streamed=True,
    began=5.0,
    ended=6.0,
    outcome="ok",
    revision=NEWER.revision,
    tokens=[5, 3],
    text="x",
    finish="length",
    usage=(len(QUESTIONS[3].prompt), 2),
    ends=1,
)


def test_the_right_answer_passes(judge):
    judge.check(RIGHT)
    assert judge.violations == []
    assert judge.checked == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [5, 4]}, "wrong answer"),
        ({"tokens": [5]}, "wrong answer"),
        ({"tokens": [5, 3, 3]}, "wrong answer"),
        ({"text": "z"}, "wrong answer"),
        ({"finish": "stop"}, "wrong answer"),
        ({"ends": 0}, "one final message"),
        ({"ends": 2}, "one final message"),
        ({"usage": (1, 2)}, "the usage"),
        ({"revision": TWO.revision, "tokens": [6, 3], "text": "y"}, "not served"),
        ({"revision": ONE.revision}, "not served"),
        ({"revision": ""}, "does not match the adapters"),
        ({"revision": None}, "without a revision"),
        ({"names": (f"poet@{ONE.revision[:8]}",)}, "not the requested revision"),
        ({"too_long": True}, "must be refused"),
        ({"outcome": "cancelled", "tokens": [4]}, "wrong tokens"),
        ({"outcome": "ADAPTER_NOT_FOUND"}, "unexpected status"),
        ({"outcome": "REVISION_NOT_FOUND"}, "unexpected status"),
        ({"outcome": "QUEUE_FULL"}, "unexpected status"),
        ({"outcome": "QUOTA_EXCEEDED"}, "unexpected status"),
        ({"outcome": "PROMPT_TOO_LONG"}, "unexpected status"),
        ({"outcome": "DEADLINE_EXCEEDED"}, "unexpected status"),
        ({"outcome": "UNAVAILABLE"}, "unexpected status"),
        ({"outcome": "GENERATION_FAILED"}, "unexpected status"),
    ],
    ids=str,
)
def test_a_wrong_outcome_is_a_violation(judge, change, message):
    judge.check(replace(RIGHT, **change))
    assert len(judge.violations) == 1
    assert message in judge.violations[0]


@pytest.mark.parametrize(
    "change",
    [
        {"outcome": "cancelled", "tokens": [5]},
        {"outcome": "killed", "tokens": [], "revision": None},
        {"outcome": "DEADLINE_EXCEEDED", "tokens": [5], "timeout": 1.0},
        {"names": (f"poet@{ONE.revision[:8]}",), "revision": ONE.revision},
        {"names": ("nobody",), "outcome": "ADAPTER_NOT_FOUND"},
        {"names": ("bolt-one",), "outcome": "ADAPTER_NOT_FOUND"},
        {"names": ("poet@0123456789",), "outcome": "REVISION_NOT_FOUND"},
        {"tenant": "small", "outcome": "QUEUE_FULL"},
        {"tenant": "poor", "outcome": "QUOTA_EXCEEDED"},
        {"too_long": True, "outcome": "PROMPT_TOO_LONG"},
    ],
    ids=str,
)
def test_an_allowed_outcome_passes(judge, change):
    judge.check(replace(RIGHT, **change))
    assert judge.violations == []


def test_unavailable_is_allowed_only_after_the_server_was_killed(judge):
    judge.killed_at = 5.5
    judge.check(replace(RIGHT, outcome="UNAVAILABLE", tokens=[5]))
    assert judge.violations == []
    judge.check(replace(RIGHT, outcome="UNAVAILABLE", ended=5.4))
    assert len(judge.violations) == 1


def test_a_routing_key_must_use_one_revision_of_a_split(judge):
    judge.timeline.put("poet", State((NEWER.revision, ONE.revision), (ONE.revision, 50)))
    judge.check(replace(RIGHT, routing_key="me"))
    judge.check(replace(RIGHT, routing_key="you", revision=ONE.revision))
    assert judge.violations == []
    judge.check(replace(RIGHT, routing_key="me", revision=ONE.revision))
    assert "routed" in judge.violations[0]
