from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from turret_server.kernels.cpu.cores import CORES
from turret_server.kernels.cpu.waiting import OWN, SHARED, Waiting, _times


class Machine:
    """Cores that this process and others use."""

    def __init__(self) -> None:
        self.now = self.busy = self.own = 0.0
        self.is_out_of_files = False

    def waiting(self) -> Waiting:
        waiting = Waiting(self.times, lambda: self.now)
        waiting.adjust()
        return waiting

    def times(self) -> tuple[float, float]:
        if self.is_out_of_files:
            raise OSError(errno.EMFILE, "Too many open files")
        return self.busy, self.own

    def passes(self, seconds: float, own: float, others: float) -> None:
        """Time in which each used this part of all cores."""
        self.now += seconds
        self.own += own * seconds * CORES
        self.busy += (own + others) * seconds * CORES


@pytest.fixture
def machine():
    return Machine()


def test_threads_sleep_while_others_use_the_cores(machine, caplog):
    caplog.set_level("INFO")
    waiting = machine.waiting()
    for others, sleeps in (
        (OWN / 2, False),
        (SHARED * 0.9, False),
        (SHARED * 1.1, True),
        (OWN * 1.1, True),  # between the two it stays as it is
        (OWN * 0.9, False),
        (0.5, True),
    ):
        machine.passes(1.0, own=0.5, others=others)
        waiting.adjust()
        assert waiting.is_sleeping is sleeps, others
    waiting.close()
    assert not waiting.is_sleeping
    assert len([each for each in caplog.messages if "give the server cores of its own" in each]) == 1


def test_it_looks_once_a_second(machine):
    waiting = machine.waiting()
    machine.passes(0.9, own=0.1, others=0.9)
    waiting.adjust()
    assert not waiting.is_sleeping
    machine.passes(0.1, own=0.1, others=0.9)
    waiting.adjust()
    assert waiting.is_sleeping
    waiting.close()


def test_what_happened_in_a_long_time_without_a_step_does_not_count(machine):
    waiting = machine.waiting()
    machine.passes(60.0, own=0.0, others=0.9)
    waiting.adjust()
    assert not waiting.is_sleeping
    machine.passes(1.0, own=0.1, others=0.9)
    waiting.adjust()
    assert waiting.is_sleeping
    waiting.close()


def test_where_no_file_can_be_opened_it_stays_as_it_is(machine):
    waiting = machine.waiting()
    machine.passes(1.0, own=0.1, others=0.9)
    machine.is_out_of_files = True
    waiting.adjust()
    assert not waiting.is_sleeping
    machine.is_out_of_files = False
    waiting.adjust()
    assert waiting.is_sleeping
    machine.passes(1.0, own=0.1, others=0.0)
    machine.is_out_of_files = True
    waiting.adjust()
    assert waiting.is_sleeping
    waiting.close()


def test_where_no_thread_can_be_started_threads_spin_on(machine, monkeypatch):
    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    waiting = machine.waiting()
    machine.passes(1.0, own=0.1, others=0.9)
    monkeypatch.setattr(threading.Thread, "start", start)
    waiting.adjust()
    assert not waiting.is_sleeping


def test_the_systems_times_are_read():
    busy, own = _times()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    later_busy, later_own = _times()
    assert later_own - own >= 0.25
    assert later_busy - busy >= 0.2  # in ticks of a hundredth of a second


SCRIPT = """
import ctypes, os, threading
import torch
from turret_server.kernels.cpu.cores import claim_cores
from turret_server.kernels.cpu.waiting import _IdlePool

claim_cores()
gomp = ctypes.CDLL(None)
torch.ones(1 << 20).exp_()
managed = lambda: len(os.listdir("/proc/self/task"))
before = managed()
pool = _IdlePool()
while managed() < before + 2:
    pass
pool.close()
while managed() > before:
    pass
print("ended")
"""


def test_the_idle_pool_has_threads_and_ends_them():
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "ended\n", done.stderr
