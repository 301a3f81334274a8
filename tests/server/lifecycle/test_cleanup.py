"""Clean-up jobs run off the event loop, and one that fails is neither lost nor in the way of others."""

from __future__ import annotations

import threading

import pytest

from support.prompts import until
from turret_server.lifecycle import cleanup
from turret_server.lifecycle.cleanup import CleanupWorker

PATIENCE = 60


@pytest.fixture
def worker():
    worker = CleanupWorker()
    yield worker
    worker.close()


def failing(times: int, done: threading.Event):
    """A job that fails so often before it succeeds."""
    left = [times]

    def run() -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError("the disk is away")
        done.set()

    return run


def test_jobs_run_in_order_on_a_thread_of_their_own(worker):
    ran, done = [], threading.Event()
    for number in range(5):
        worker.submit(
            f"job {number}", lambda number=number: ran.append((number, threading.current_thread().name))
        )
    worker.submit("end", done.set)
    assert done.wait(PATIENCE)
    assert ran == [(number, "turret-cleanup") for number in range(5)]


def test_to_submit_waits_for_no_job(worker):
    gate, done = threading.Event(), threading.Event()
    worker.submit("stuck", lambda: gate.wait(PATIENCE))
    worker.submit("behind", done.set)
    assert not done.is_set()
    gate.set()
    assert done.wait(PATIENCE)


def test_a_job_that_fails_is_logged_and_retried_and_others_go_on_meanwhile(worker, caplog):
    failed_first, other = threading.Event(), threading.Event()
    order: list[str] = []
    fails = failing(3, failed_first)

    def run() -> None:
        order.append("failing")
        fails()

    worker.submit("releasing files", run)
    worker.submit("another", lambda: (order.append("another"), other.set()))
    assert other.wait(PATIENCE)
    assert failed_first.wait(PATIENCE)
    assert order[:2] == ["failing", "another"]
    assert order.count("failing") == 4
    said = [record.message for record in caplog.records if "releasing files" in record.message]
    assert len(said) == 3
    assert "will be retried" in said[0]
    assert "the disk is away" in said[0]


def test_retries_come_later_and_later(worker, caplog):
    done = threading.Event()
    worker.submit("releasing files", failing(3, done))
    assert done.wait(PATIENCE)
    assert [record.args[1] for record in caplog.records] == [0.01, 0.02, 0.04]


def test_a_job_that_is_queued_already_is_not_queued_again(worker):
    gate, done, ran = threading.Event(), threading.Event(), []
    worker.submit("stuck", lambda: gate.wait(PATIENCE))
    for _ in range(3):
        worker.submit("same", lambda: ran.append("same"))
    worker.submit("end", done.set)
    gate.set()
    assert done.wait(PATIENCE)
    assert ran == ["same"]
    again = threading.Event()
    worker.submit("same", again.set)
    assert again.wait(PATIENCE)


def test_what_runs_now_runs_here_and_only_its_failure_goes_to_the_worker(worker, caplog):
    ran = []
    worker.run_now("ending", lambda: ran.append(threading.current_thread()))
    assert ran == [threading.current_thread()]
    done = threading.Event()
    worker.run_now("ending", failing(1, done))
    assert done.wait(PATIENCE)
    assert "ending failed and will be retried" in caplog.text


def test_closing_runs_what_is_queued_once_more_and_then_ends(caplog):
    worker = CleanupWorker()
    gate, ran = threading.Event(), []
    worker.submit("stuck", lambda: gate.wait(PATIENCE))
    worker.submit("waiting", lambda: ran.append("waiting"))
    worker.submit("broken", lambda: 1 // 0)
    closing = threading.Thread(target=worker.close)
    closing.start()
    gate.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert not worker._thread.is_alive()
    assert ran == ["waiting"]
    assert "broken failed" in caplog.text
    worker.submit("late", lambda: ran.append("late"))
    assert ran == ["waiting"]


def test_jobs_behind_a_stuck_one_are_left_to_the_next_start(monkeypatch, caplog):
    monkeypatch.setattr(cleanup, "_CLOSE_SECONDS", 0)
    worker, began, gate = CleanupWorker(), threading.Event(), threading.Event()

    def stuck() -> None:
        began.set()
        gate.wait(PATIENCE)

    worker.submit("stuck", stuck)
    worker.submit("waiting", lambda: None)
    assert began.wait(PATIENCE)
    worker.close()
    assert caplog.messages == ["2 clean-up jobs are left to the next start"]
    gate.set()
    worker._thread.join(PATIENCE)


def test_a_job_that_was_submitted_again_while_it_failed_is_retried_once(worker):
    tried, gate, began, done = [], threading.Event(), threading.Event(), threading.Event()

    def run() -> None:
        tried.append("try")
        began.set()
        gate.wait(PATIENCE)
        if len(tried) == 1:
            raise OSError("the disk is away")

    worker.submit("same", run)
    assert began.wait(PATIENCE)
    worker.submit("same", run)
    gate.set()
    # Longer than a retry waits: each failure of this one comes later than that of the first.
    worker.submit("end", failing(3, done))
    assert done.wait(PATIENCE)
    assert tried == ["try", "try"]


def test_a_job_that_comes_while_the_worker_closes_is_left_to_the_next_start():
    worker, began, gate, ran = CleanupWorker(), threading.Event(), threading.Event(), []

    def last() -> None:
        began.set()
        gate.wait(PATIENCE)
        worker.submit("late", lambda: ran.append("late"))

    worker.submit("last", last)
    assert began.wait(PATIENCE)
    closing = threading.Thread(target=worker.close)
    closing.start()
    until(lambda: worker._closing)
    gate.set()
    closing.join(PATIENCE)
    assert (ran, worker._jobs) == ([], [])
