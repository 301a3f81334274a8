"""The prefix cache: blocks of keys and values that outlive their sequence, found again by their content.

A block's key hashes the key of the previous block and the block's own tokens; the chain is salted with the
adapters' revisions. Equal keys mean equal keys and values (vLLM's automatic prefix caching).
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence

from turret_server.engine.kv.pages import PagePool


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a whole block of `token_ids` after the block with the key `parent`."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class PrefixCache:
    """Holds one count of each of its pages, and evicts the least recently used that has no other holder.

    Sequences release a chain from its end, so that the end is evicted before the start.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: dict[bytes, int] = {}
        # Keys of the pages without another holder, and the tick of their release, the earliest first.
        self._idle: dict[bytes, int] = {}
        pool.add_reclaimer(self)

    @property
    def pages(self) -> tuple[int, ...]:
        return tuple(self._pages.values())

    @property
    def num_idle(self) -> int:
        """Pages without another holder."""
        return len(self._idle)

    @property
    def oldest(self) -> float:
        return next(iter(self._idle.values()), math.inf)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest cached run of `keys` from its start. The caller holds them, too, now."""
        pages = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            pages.append(page)
            self._idle.pop(key, None)
        self._pool.share(pages)
        return pages

    def insert(self, key: bytes, page: int) -> None:
        """Keep a computed block that the caller holds. A key that is cached already keeps its page."""
        if key not in self._pages:
            self._pool.share([page])
            self._pages[key] = page

    def invalidate(self, keys: Sequence[bytes]) -> None:
        """Remove blocks from the cache; other holders keep their pages."""
        for key in keys:
            page = self._pages.pop(key, None)
            if page is not None:
                self._idle.pop(key, None)
                self._pool.release([page])

    def mark_released(self, keys: Sequence[bytes]) -> None:
        """A holder of this chain has released its pages: those without another holder become idle, the end of
        the chain first.
        """
        for key in reversed(keys):
            page = self._pages.get(key)
            if page is not None and self._pool.num_holders(page) == 1:
                self._idle.pop(key, None)
                self._idle[key] = self._pool.clock

    def evict(self) -> int:
        """Free the least recently used idle page."""
        key = next(iter(self._idle))
        del self._idle[key]
        self._pool.release([self._pages.pop(key)])
        return 1

    def check_integrity(self) -> None:
        """Check that exactly the pages without another holder are idle.

        Raises:
            AssertionError: a page could never be evicted, or could be while it is read.
        """
        alone = {key for key, page in self._pages.items() if self._pool.num_holders(page) == 1}
        assert self._idle.keys() == alone, "the cache is wrong about which of its pages others hold"
