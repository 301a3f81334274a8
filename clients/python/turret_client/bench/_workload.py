"""The requests of a load test and their times, determined by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, cycle, repeat

# Ids that every vocabulary contains. Latencies do not depend on which tokens a prompt contains.
_TOKEN_IDS = range(16, 256)


@dataclass(frozen=True, slots=True)
class Popularity:
    """Distribution of requests over adapters.

    Attributes:
        zipf: Exponent of the Zipf distribution: the k-th adapter, from 1, is chosen in proportion to
            1 / k**zipf. 0 is uniform.
        round_robin: Each adapter in turn instead, so that concurrent requests use different adapters.
    """

    zipf: float = 0.0
    round_robin: bool = False

    @classmethod
    def parse(cls, text: str) -> Popularity:
        """Parses "uniform", "round-robin" or "zipf:S".

        Raises:
            ValueError: The text is none of these, or S is not above 0.
        """
        if text in ("uniform", "round-robin"):
            return cls(round_robin=text == "round-robin")
        name, _, exponent = text.partition(":")
        with suppress(ValueError):
            if name == "zipf" and float(exponent) > 0:
                return cls(zipf=float(exponent))
        raise ValueError(f"expected uniform, round-robin or zipf:S with S above 0, found {text!r}")

    def choices(self, adapters: tuple[str, ...], rng: random.Random) -> Iterator[str | None]:
        """Endless choices; None, the base model, if there are no adapters."""
        if not adapters:
            yield from repeat(None)
        if self.round_robin:
            yield from cycle(adapters)
        weights = list(accumulate((rank + 1) ** -self.zipf for rank in range(len(adapters))))
        while True:
            yield rng.choices(adapters, cum_weights=weights)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A load on a server.

    Attributes:
        concurrency: Closed loop: number of requests in flight at any time.
        rate: Open loop: mean number of requests per second, which arrive by a Poisson process, independently
            of earlier requests.
        num_requests: Maximum number of requests.
        duration: No request is sent after this many seconds; requests in flight finish.
        adapters: Names of adapters to use; none is the base model.
        popularity: Distribution of the requests over the adapters.
        prompt_tokens: Smallest and largest length of a prompt; lengths are distributed uniformly.
        max_tokens: Maximum number of tokens to generate per request.
        seed: The same seed gives the same prompts, adapters and arrivals.

    Raises:
        ValueError: Not exactly one of `concurrency` and `rate` is set, or neither `num_requests` nor
            `duration`.
    """

    concurrency: int | None = None
    rate: float | None = None
    num_requests: int | None = None
    duration: float | None = None
    adapters: tuple[str, ...] = ()
    popularity: Popularity = Popularity()
    prompt_tokens: tuple[int, int] = (128, 128)
    max_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("set exactly one of concurrency and rate")
        if self.num_requests is None and self.duration is None:
            raise ValueError("set num_requests, duration or both")

    def requests(self) -> Iterator[Planned]:
        """The requests in order; endless if `num_requests` is None."""
        return self._planned("load", self.num_requests)

    def warm_up(self, count: int) -> Iterator[Planned]:
        """Requests with the same distribution and other prompts, so that the prefix cache stays cold."""
        return self._planned("warm-up", count)

    def _planned(self, purpose: str, count: int | None) -> Iterator[Planned]:
        rng = random.Random(f"{self.seed} {purpose}")  # noqa: S311 (a load, not a secret)
        names = self.popularity.choices(self.adapters, rng)
        due = 0.0
        for _ in repeat(None) if count is None else range(count):
            length = rng.randint(*self.prompt_tokens)
            prompt = tuple(rng.choices(_TOKEN_IDS, k=length))
            yield Planned(due=due, adapter=next(names), prompt=prompt)
            due += rng.expovariate(self.rate) if self.rate else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A request to send. `due` is in seconds after the start; 0 in a closed loop."""

    due: float
    adapter: str | None
    prompt: tuple[int, ...]
