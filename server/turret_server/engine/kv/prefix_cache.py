"""Blocks of keys and values that outlive their request, found again by what they were computed from.

A block's key chains the key of the block before it with its own tokens, and the chain starts from the
adapter's revision: equal keys mean equal keys and values (vLLM's automatic prefix caching, salted).
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence

from turret_server.engine.kv.pages import PagePool


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a whole block of `token_ids` that follows the block with the key `parent`."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class PrefixCache:
    """Holds one count of every page in it; gives up the least recently used that nobody else holds.

    Users give a chain back from its end, so the end of a chain is always older than its start and
    goes first.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: dict[bytes, int] = {}
        # When the pages that only the cache holds were given back, by key, the earliest first.
        self._idle: dict[bytes, int] = {}
        pool.add_reclaimer(self)

    @property
    def pages(self) -> tuple[int, ...]:
        return tuple(self._pages.values())

    @property
    def num_idle(self) -> int:
        """Pages that only the cache holds."""
        return len(self._idle)

    @property
    def oldest(self) -> float:
        return next(iter(self._idle.values()), math.inf)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest cached run of `keys` from its start, now also held by the caller."""
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
        """Keep a computed block that the caller holds; a key that is there already keeps its page."""
        if key not in self._pages:
            self._pool.share([page])
            self._pages[key] = page

    def forget(self, keys: Sequence[bytes]) -> None:
        """Find these blocks no more. Who holds their pages keeps them."""
        for key in keys:
            page = self._pages.pop(key, None)
            if page is not None:
                self._idle.pop(key, None)
                self._pool.release([page])

    def given_back(self, keys: Sequence[bytes]) -> None:
        """A holder has released its pages of a chain: what nobody else holds was just used, its end first."""
        for key in reversed(keys):
            page = self._pages.get(key)
            if page is not None and self._pool.num_holders(page) == 1:
                self._idle.pop(key, None)
                self._idle[key] = self._pool.clock

    def evict(self) -> int:
        """Give the page back that was used longest ago of those that nobody else holds."""
        key = next(iter(self._idle))
        del self._idle[key]
        self._pool.release([self._pages.pop(key)])
        return 1

    def check_integrity(self) -> None:
        """Prove that exactly the pages that nobody else holds count as idle.

        Raises:
            AssertionError: one could never be evicted, or could be while somebody reads it.
        """
        alone = {key for key, page in self._pages.items() if self._pool.num_holders(page) == 1}
        assert self._idle.keys() == alone, "the cache is wrong about which of its pages others hold"
