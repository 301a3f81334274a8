"""How the threads of OpenMP wait for each other's part of a product: they spin, or sleep.

A thread that spins goes on at once; one that sleeps takes 50 µs to wake. But spinning is computing to the
system: where other programs want the same cores, it takes the cores away from threads that spin as soon as
from those that compute, and a step then takes many times as long. So threads sleep while others use the
cores, which is seen once a second.

GNU's OpenMP has no call for this. It spins no more when all pools together have more threads than there are
cores (see `cores`), so a second pool that does nothing makes the first one sleep.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from turret_server.kernels.cpu.cores import CORES

log = logging.getLogger(__name__)

# Parts of the time of all cores that other programs use, from which threads sleep, and below which they spin.
SHARED, OWN = 0.05, 0.02
_SECONDS = 1.0
_GAP_SECONDS = 3.0
_STAT = Path("/proc/stat")
# Columns of /proc/stat: user, nice, system, irq, softirq, and steal, which other machines have used.
_BUSY = (1, 2, 3, 6, 7, 8)


class Waiting:
    """Lets threads sleep while other programs use the cores. Used on the thread that runs the steps."""

    def __init__(
        self,
        times: Callable[[], tuple[float, float]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`times` gives the seconds for which the cores were busy, and those of this process among them."""
        self._times = times or _times
        self._clock = clock
        self._seen = -math.inf, 0.0, 0.0  # the first look has nothing to compare with
        self._pool: _IdlePool | None = None
        self._has_told = False

    @property
    def is_sleeping(self) -> bool:
        return self._pool is not None

    def adjust(self) -> None:
        """Called before each step; looks once a second."""
        now = self._clock()
        seconds = now - self._seen[0]
        if seconds < _SECONDS:
            return
        try:
            busy, own = self._times()
        except OSError:  # no file can be opened, or there is none: the step goes on
            return
        others = (busy - self._seen[1]) - (own - self._seen[2])
        self._seen = now, busy, own
        if seconds > _GAP_SECONDS:  # no step for long: what others did then says nothing of now
            return
        share = others / (seconds * CORES)
        if share > SHARED and self._pool is None:
            self._tell(share)
            with suppress(RuntimeError):  # no thread can be started: the step goes on
                self._pool = _IdlePool()
        elif share < OWN:
            self.close()

    def _tell(self, share: float) -> None:
        if not self._has_told:
            self._has_told = True
            log.info(
                "other programs use %.0f %% of the cores, and steps take longer; for full speed, give the "
                "server cores of its own (taskset, cpusets)",
                share * 100,
            )

    def close(self) -> None:
        """Let threads spin again."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class _IdlePool:
    """A thread with a pool of its own."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="turret-waiting", daemon=True)
        self._thread.start()

    def _hold(self) -> None:
        libraries = ctypes.CDLL(None)
        if hasattr(libraries, "GOMP_parallel"):
            # With those of the first pool one thread more than there are cores. Each calls free(NULL), which
            # does nothing.
            num_threads = len(os.sched_getaffinity(0)) - CORES + 2
            libraries.GOMP_parallel(libraries.free, None, num_threads, 0)
        self._ended.wait()

    def close(self) -> None:
        """End the pool's threads."""
        self._ended.set()
        self._thread.join()


def _times() -> tuple[float, float]:
    """Seconds for which the cores that this process may use were busy, and those that it used itself."""
    ticks, cores = 0, {f"cpu{core}" for core in os.sched_getaffinity(0)}
    for line in _STAT.read_text().splitlines():
        fields = line.split()
        if fields[0] in cores:
            ticks += sum(int(fields[column]) for column in _BUSY)
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system
