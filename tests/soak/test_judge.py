"""The judge of the soak lets nothing pass that is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from soak.asking import Asked
from soak.judge import Judge
from soak.known import QUESTIONS, Answer, Content, KnownAnswers
from soak.timeline import State, Timeline

ONE, TWO = Content("one", b"{}", b"1"), Content("two", b"{}", b"2")
NEWER = ONE.variant(1)
ANSWERS = {
    "one": {index: Answer((5, index), "x", "length") for index in range(len(QUESTIONS))},
    "two": {index: Answer((6, index), "y", "length") for index in range(len(QUESTIONS))},
}


@pytest.fixture
def judge():
    """The name `poet` has served `NEWER` for long, and `ONE` before."""
    timeline = Timeline()
    timeline.put("poet", State().loaded(ONE.revision).loaded(NEWER.revision))
    answers = KnownAnswers([ONE, TWO], ANSWERS)
    answers.add(NEWER)
    return Judge(answers, timeline, forbidden={"acme": "bolt-"}, queue_full={"small"}, quota={"poor"})


RIGHT = Asked(
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
    judge.take(RIGHT)
    assert judge.violations == []
    assert judge.checked == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": [5, 4]}, "wrong answer"),
        ({"tokens": [5]}, "wrong answer"),
        ({"tokens": [5, 3, 3]}, "wrong answer"),
        ({"text": "z"}, "wrong answer"),
        ({"finish": "stop"}, "wrong answer"),
        ({"ends": 0}, "one end"),
        ({"ends": 2}, "one end"),
        ({"usage": (1, 2)}, "usage"),
        ({"revision": TWO.revision, "tokens": [6, 3], "text": "y"}, "not served"),
        ({"revision": ONE.revision}, "not served"),
        ({"revision": ""}, "other adapters"),
        ({"revision": None}, "without a revision"),
        ({"names": (f"poet@{ONE.revision[:8]}",)}, "another revision"),
        ({"too_long": True}, "must refuse"),
        ({"outcome": "left", "tokens": [4]}, "wrong tokens"),
        ({"outcome": "ADAPTER_NOT_FOUND"}, "nothing explains"),
        ({"outcome": "REVISION_NOT_FOUND"}, "nothing explains"),
        ({"outcome": "QUEUE_FULL"}, "nothing explains"),
        ({"outcome": "QUOTA_EXCEEDED"}, "nothing explains"),
        ({"outcome": "PROMPT_TOO_LONG"}, "nothing explains"),
        ({"outcome": "DEADLINE_EXCEEDED"}, "nothing explains"),
        ({"outcome": "UNAVAILABLE"}, "nothing explains"),
        ({"outcome": "GENERATION_FAILED"}, "nothing explains"),
    ],
    ids=str,
)
def test_what_is_wrong_does_not(judge, change, said):
    judge.take(replace(RIGHT, **change))
    assert len(judge.violations) == 1
    assert said in judge.violations[0]


@pytest.mark.parametrize(
    "change",
    [
        {"outcome": "left", "tokens": [5]},
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
def test_what_may_come_of_a_request_passes(judge, change):
    judge.take(replace(RIGHT, **change))
    assert judge.violations == []


def test_a_killed_server_is_unavailable_afterwards_alone(judge):
    judge.killed_at = 5.5
    judge.take(replace(RIGHT, outcome="UNAVAILABLE", tokens=[5]))
    assert judge.violations == []
    judge.take(replace(RIGHT, outcome="UNAVAILABLE", ended=5.4))
    assert len(judge.violations) == 1


def test_the_same_key_goes_to_the_same_revision_of_a_split(judge):
    judge.timeline.put("poet", State((NEWER.revision, ONE.revision), (ONE.revision, 50)))
    judge.take(replace(RIGHT, routing_key="me"))
    judge.take(replace(RIGHT, routing_key="you", revision=ONE.revision))
    assert judge.violations == []
    judge.take(replace(RIGHT, routing_key="me", revision=ONE.revision))
    assert "routed" in judge.violations[0]
