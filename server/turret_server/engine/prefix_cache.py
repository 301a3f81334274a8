"""Blocks of keys and values that outlive their request, found again by what they were computed from.

A block's key chains the key of the block before it with its own tokens, and the chain starts from the
adapter's revision: equal keys mean equal keys and values (vLLM's automatic prefix caching, salted).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice

from turret_server.engine.pages import PagePool


def block_keys(parent: bytes, token_ids: Sequence[int], block_size: int) -> Iterator[bytes]:
    """The key of each whole block of `token_ids`, which follow the block with the key `parent`."""
    key = parent
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        block = array("q", token_ids[start : start + block_size])
        key = hashlib.blake2b(key + block.tobytes(), digest_size=16).digest()
        yield key


class PrefixCache:
    """Holds one count of every page in it; gives up the least recently used that nobody else holds.

    Users release a chain from its end, so the end of a chain is always older than its start and
    goes first.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: OrderedDict[bytes, int] = OrderedDict()
        pool.add_reclaimer(self.evict)

    @property
    def pages(self) -> tuple[int, ...]:
        return tuple(self._pages.values())

    @property
    def num_idle(self) -> int:
        """Pages that only the cache holds."""
        return sum(self._pool.num_holders(page) == 1 for page in self._pages.values())

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest cached run of `keys` from its start, now also held by the caller."""
        pages = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            pages.append(page)
        for key in reversed(keys[: len(pages)]):
            self._pages.move_to_end(key)
        self._pool.share(pages)
        return pages

    def insert(self, key: bytes, page: int) -> None:
        """Keep a computed block; a key that is there already keeps its page."""
        if key not in self._pages:
            self._pool.share([page])
            self._pages[key] = page

    def touch(self, keys: Sequence[bytes]) -> None:
        """Mark a chain as just used, its end as the older part."""
        for key in reversed(keys):
            if key in self._pages:
                self._pages.move_to_end(key)

    def evict(self, count: int) -> None:
        """Give up to `count` pages back that nobody else holds, the least recently used first."""
        idle = (key for key, page in self._pages.items() if self._pool.num_holders(page) == 1)
        for key in list(islice(idle, count)):
            self._pool.release([self._pages.pop(key)])
