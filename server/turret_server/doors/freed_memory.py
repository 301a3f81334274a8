"""Gives the memory of requests back to the system once they have ended.

The C library keeps what is freed, in pieces between what is still used: hundreds of requests of megabytes
leave more behind than all else that an idle server takes.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

# Requests of so many bytes in all leave behind what is worth the milliseconds of looking for it.
_WORTH_BYTES = 16 * 2**20
# Meanwhile others end as well.
_SETTLE_SECONDS = 1.0


class FreedMemory:
    """Counts what requests took, and frees memory while they end and once more after the last. Used on one
    event loop.
    """

    def __init__(self, trim: Callable[[], object]) -> None:
        self._trim = trim
        self._num_bytes = 0
        self._is_settling = False

    def ended(self, num_bytes: int) -> None:
        """Count a request that has ended, or a part of one that has been used."""
        self._num_bytes += num_bytes
        if self._num_bytes >= _WORTH_BYTES and not self._is_settling:
            self._settle()

    def _settle(self) -> None:
        self._num_bytes, self._is_settling = 0, True
        asyncio.get_running_loop().call_later(_SETTLE_SECONDS, self._give_back)

    def _give_back(self) -> None:
        asyncio.get_running_loop().run_in_executor(None, self._trim)
        self._is_settling = False
        if self._num_bytes >= _WORTH_BYTES // 16:
            self._settle()


def _trim() -> None:
    """Give back what is free (glibc's malloc_trim). Other C libraries have no such function."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


# The process has one memory, whichever door a request came through.
freed_memory = FreedMemory(_trim)
