"""Which thread computes: one has all cores, every other one only the core that it runs on.

GNU's OpenMP keeps threads for each thread that opened a parallel region. While all of them together are no
more than the cores, they wait for their next region spinning; else they go to sleep almost at once (its
`gomp_throttled_spin_count_var`), and waking one takes 50 µs, five times what a LoRA's product takes. So no
thread but the one that runs the steps may have any.
"""

from __future__ import annotations

import ctypes
import threading

import torch

CORES = torch.get_num_threads()

_SOFTLY = 1  # omp_pause_soft
_own = threading.local()


def take_cores() -> None:
    """The thread that calls this computes on all cores from now on."""
    if getattr(_own, "taken", False):
        return
    torch.get_num_threads()  # torch sets up a thread when it is first asked on it, and what was said is lost
    torch.set_num_threads(CORES)
    # Torch's word holds for the thread that says it, and for all that have not computed before.
    saying = threading.Thread(target=torch.set_num_threads, args=(1,))
    saying.start()
    saying.join()
    _own.taken = True


def give_back_cores() -> None:
    """The thread that calls this has used the cores, and needs them no more."""
    torch.set_num_threads(1)
    # Of LLVM's or Microsoft's OpenMP there is nothing to end: they count each thread's own alone.
    end_threads = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if end_threads:
        end_threads(_SOFTLY)
    _own.taken = False
