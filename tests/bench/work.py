"""What every system is given to do, and what is read off the times at which its tokens come."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

# For every request, when each of its tokens came: seconds since the batch was given.
TokenTimes = list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Requests that are sent at once; each with the adapter at its place, None the base model."""

    adapters: Sequence[str | None]
    prompt_tokens: int
    max_tokens: int
    seed: int

    def prompts(self) -> list[list[int]]:
        rng = random.Random(self.seed)
        return [rng.choices(range(300, 30000), k=self.prompt_tokens) for _ in self.adapters]


class NotRunError(Exception):
    """A system is not installed, or failed; the message stands in the table instead of a figure."""


class System(Protocol):
    def run(self, batch: Batch) -> TokenTimes:
        """Serve the batch.

        Raises:
            NotRunError: it failed.
        """

    def close(self) -> None: ...


def prefill_rate(batch: Batch, times: TokenTimes) -> float:
    """Tokens of prompts a second, until every request has its first token."""
    return batch.prompt_tokens * len(times) / max(request[0] for request in times)


def decode_rate(times: TokenTimes) -> float:
    """Tokens a second while every request of the batch generates.

    Where a system does not run the requests together, so that there is hardly such a time, it is the rate of
    the requests one after another: the tokens after each first one, by the sum of the times that they took.
    """
    began, ended = max(request[0] for request in times), min(request[-1] for request in times)
    together = sum(began < at <= ended for request in times for at in request)
    after_first = sum(len(request) - 1 for request in times)
    if together >= after_first / 2:
        return together / (ended - began)
    return after_first / sum(request[-1] - request[0] for request in times)


def middle(figures: Any, kind: str) -> float | None:
    """The median of the rounds; None where the system did not run."""
    return median(figures[kind]) if isinstance(figures, dict) and kind in figures else None
