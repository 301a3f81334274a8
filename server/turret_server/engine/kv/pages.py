"""The arena's pages: how many holders each has, and a check that none is lost.

A page is free or has holders. A holder is a list that has it: a sequence's block table, the prefix cache, an
adapter. The pool counts holders and does not know them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol


class Reclaimer(Protocol):
    """Keeps pages that are not in use, and frees them when pages run out."""

    @property
    def num_idle(self) -> int:
        """Pages that it can free."""

    @property
    def oldest(self) -> float:
        """The tick at which the pages that it evicts next were last used; infinity if none is idle."""

    def evict(self) -> int:
        """Free the pages that are evicted next, and return their number."""


class PagePool:
    """`num_pages` pages of the arena, identified by number. `clock` counts the engine's steps."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.clock = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._reclaimers: list[Reclaimer] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def tick(self) -> None:
        """Begin a step: what is used from here on is newer than everything before."""
        self.clock += 1

    def add_reclaimer(self, reclaimer: Reclaimer) -> None:
        self._reclaimers.append(reclaimer)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` pages, evicting if needed; None, and nothing is evicted, if that frees too few."""
        if not self._reclaim(count - len(self._free)):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Count one more holder of each page."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Count one holder less of each page; a page without holders is free."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def num_holders(self, page: int) -> int:
        return self._holders[page]

    def check_integrity(self, held: Iterable[int]) -> None:
        """Check that `held`, the pages in all holders' lists, matches the pool's counts.

        Raises:
            AssertionError: a page leaked, was freed while held, or is free twice.
        """
        counted = Counter(held)
        for page, holders in enumerate(self._holders):
            assert counted[page] == holders, f"page {page}: {counted[page]} hold it, {holders} are counted"
        assert len(self._free) == len(set(self._free)), "a page is free twice"
        assert {page for page in self._free if self._holders[page]} == set(), "a free page has holders"
        assert len(self._free) + len(counted) == self.num_pages, "free and held pages do not add up"

    def _reclaim(self, missing: int) -> bool:
        """Evict the least recently used until `missing` more pages are free; nothing if there are too few."""
        num_idle = 0
        for reclaimer in self._reclaimers:
            if num_idle < missing:
                num_idle += reclaimer.num_idle
        if num_idle < missing:
            return False
        while missing > 0:
            missing -= min(self._reclaimers, key=lambda reclaimer: reclaimer.oldest).evict()
        return True
