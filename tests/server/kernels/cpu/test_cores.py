"""In a process of its own: how many threads torch uses, it remembers for all threads to come."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import os, threading, time
import torch
from turret_server.kernels.cpu.cores import CORES, release_cores, claim_cores

def on_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

def compute():
    torch.ones(1 << 20).exp_()
    print(torch.get_num_threads(), end=" ")

def take_and_compute():
    claim_cores()
    compute()
    on_a_thread(compute)
    claim_cores()
    compute()

compute()
before = len(os.listdir("/proc/self/task"))
release_cores()
while len(os.listdir("/proc/self/task")) == before:  # a thread may need a moment to end
    time.sleep(0.01)
compute()
on_a_thread(take_and_compute)
compute()
"""


def test_one_thread_has_all_cores_and_every_other_one():
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.stdout.split() == ["2", "1", "2", "1", "2", "1"], done.stderr
