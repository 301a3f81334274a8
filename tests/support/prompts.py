"""Prompts for the small models, and patience."""

from __future__ import annotations

import time
from collections.abc import Callable

PROMPT = "the quick brown fox jumps over"
LONG = "the lazy dog and the other fox there then these those other " * 3


def until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    """Wait for something that must come; only what never comes is a failure."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
