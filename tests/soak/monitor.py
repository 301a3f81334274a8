"""Samples a running server: pages, memory, threads, open files, store."""

from __future__ import annotations

import os
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from soak.pools import read_pools

MIB = 2**20
SAMPLE_SECONDS = 10.0
_CHECK_SECONDS = 1.0
# A scrape may fall between two of the gauges that belong together.
_TRIES = 10
# Allowed growth over the last three quarters of the run, as a share of the mean.
MAX_GROWTH = 0.03


@dataclass(frozen=True)
class Sample:
    seconds: float
    resident: int
    threads: int
    files: int
    pooled_threads: int = 0
    pool_capacity: int = 0

    @property
    def other_threads(self) -> int:
        """Threads outside pools. Each has a fixed purpose, so growth is a leak."""
        return self.threads - self.pooled_threads


def read_metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url) as response:  # noqa: S310 (loopback)
        lines = response.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def pages_of(metrics: dict[str, float]) -> dict[str, float]:
    mark = 'turret_arena_pages{owner="'
    return {key.removeprefix(mark)[:-2]: value for key, value in metrics.items() if key.startswith(mark)}


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; files may vanish meanwhile."""
    total = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(inner) / name).stat().st_size
    return total


class Monitor(threading.Thread):
    """Checks the server every second until it is stopped, and keeps a sample every ten seconds."""

    def __init__(
        self,
        *,
        pid: int,
        url: str,
        store: Path,
        pools: Path,
        num_pages: int,
        host_budget: int,
        store_budget: int,
        violation: Callable[[str], None],
    ) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self.num_checks = 0
        self.maxima: dict[str, float] = {}
        self._process = psutil.Process(pid)
        self._url = url
        self._adapters = store / "adapters"
        self._pools = pools
        self._num_pages = num_pages
        self._host_budget = host_budget
        self._store_budget = store_budget
        self._violation = violation
        self._over = threading.Event()

    def run(self) -> None:
        try:
            self._monitor()
        except Exception as error:
            self._violation(f"the monitor failed: {type(error).__name__}: {error}")
            raise

    def _monitor(self) -> None:
        started = time.monotonic()
        while not self._over.wait(_CHECK_SECONDS):
            self.check()
            seconds = time.monotonic() - started
            if not self.samples or seconds - self.samples[-1].seconds >= SAMPLE_SECONDS:
                self.samples.append(self._sample(seconds))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _sample(self, seconds: float) -> Sample:
        pools = read_pools(self._pools)
        with self._process.oneshot():
            return Sample(
                seconds,
                self._process.memory_info().rss,
                self._process.num_threads(),
                self._process.num_fds(),
                pools.threads,
                pools.capacity,
            )

    def check(self) -> None:
        """Check that every page has an owner and that budgets are kept."""
        for _ in range(_TRIES):
            metrics = read_metrics(self._url)
            pages = pages_of(metrics)
            consistent = sum(pages.values()) == self._num_pages and min(pages.values()) >= 0
            if consistent:
                break
        else:
            self._violation(f"pages do not add up to {self._num_pages}: {pages}")
        self.num_checks += 1
        for name, value in {**pages, "host": metrics["turret_host_adapter_bytes"]}.items():
            self.maxima[name] = max(self.maxima.get(name, 0), value)
        if metrics["turret_host_adapter_bytes"] > self._host_budget:
            self._violation(f"{metrics['turret_host_adapter_bytes']} bytes of adapters in host memory")
        store = size_of(self._adapters)
        self.maxima["store"] = max(self.maxima.get("store", 0), store)
        if store > self._store_budget:
            self._violation(f"{store} bytes in the store, expected at most {self._store_budget}")


def late(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The last three quarters of the run, in which a server that does not leak does not grow."""
    return samples[len(samples) // 4 :]


def slope(samples: Sequence[Sample], what: Callable[[Sample], float]) -> tuple[float, float]:
    """The mean, and the growth of a linear fit from the first sample to the last."""
    seconds = np.array([sample.seconds for sample in samples])
    values = np.array([what(sample) for sample in samples])
    growth = np.polyfit(seconds, values, 1)[0] * (seconds[-1] - seconds[0]) if len(samples) > 1 else 0.0
    return float(values.mean()), float(growth)


def slopes(samples: Sequence[Sample]) -> list[tuple[str, float, float]]:
    """Mean and growth, in the last three quarters, of each quantity that must not grow."""
    return [
        ("resident memory, MiB", *slope(late(samples), lambda sample: sample.resident / MIB)),
        ("threads outside pools", *slope(late(samples), lambda sample: sample.other_threads)),
        ("maximum pool threads", *slope(late(samples), lambda sample: sample.pool_capacity)),
        ("open files", *slope(late(samples), lambda sample: sample.files)),
    ]


def leaks(samples: Sequence[Sample]) -> list[str]:
    """The quantities that grew. Pools may fill up to their maxima; maxima and other threads must not grow."""
    return [
        f"{what} grew by {growth:.3g} from a mean of {mean:.3g}"
        for what, mean, growth in slopes(samples)
        if growth > MAX_GROWTH * mean
    ]
