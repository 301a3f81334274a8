"""Which thread computes on all cores: the one that runs the steps; every other thread has one core.

GNU's OpenMP keeps a pool of threads for each thread that opened a parallel region. While all pools together
have no more threads than there are cores, waiting threads spin; otherwise they sleep almost at once (see
`gomp_throttled_spin_count_var` in libgomp). To wake one takes 50 µs, five times as long as a LoRA's product.
So only one thread may have a pool.
"""

from __future__ import annotations

import ctypes
import threading

import torch

CORES = torch.get_num_threads()

_OMP_PAUSE_SOFT = 1
_own = threading.local()


def claim_cores() -> None:
    """Lets the calling thread compute on all cores, and every thread that has not computed yet on one."""
    if getattr(_own, "claimed", False):
        return
    torch.get_num_threads()  # The first call on a thread initialises it and would undo the setting.
    torch.set_num_threads(CORES)
    # torch applies a setting to the thread that makes it, and to all threads that have not computed yet.
    setter = threading.Thread(target=torch.set_num_threads, args=(1,))
    setter.start()
    setter.join()
    _own.claimed = True


def release_cores() -> None:
    """Ends the pool of the calling thread, which computes on one core from now on."""
    torch.set_num_threads(1)
    # LLVM's and Microsoft's OpenMP have no such function, and need none: they count each pool alone.
    end_threads = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if end_threads:
        end_threads(_OMP_PAUSE_SOFT)
    _own.claimed = False
