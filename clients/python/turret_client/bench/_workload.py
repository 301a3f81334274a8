"""The requests of a load test and their times, determined by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

# Ids that every vocabulary contains. Latencies do not depend on which tokens a prompt contains.
_TOKEN_IDS = range(16, 256)


@dataclass(frozen=True, slots=True)
class Popularity:
    """Distribution of requests over adapters.

    Attributes:
        zipf: Exponent of the Zipf distribution: the k-th adapter, from 1, is chosen in proportion to
            1 / k**zipf. 0 is uniform.
        turns: Round robin instead, so that concurrent requests use different adapters.
    """

    zipf: float = 0.0
    turns: bool = False

    @classmethod
    def parse(cls, text: str) -> Popularity:
        """Parses "uniform", "turns" or "zipf:S".

        Raises:
            ValueError: The text is none of these, or S is not above 0.
        """
        if text in ("uniform", "turns"):
            return cls(turns=text == "turns")
        name, _, exponent = text.partition(":")
        with suppress(ValueError):
            if name == "zipf" and float(exponent) > 0:
                return cls(zipf=float(exponent))
        raise ValueError(f"expected uniform, turns or zipf:S with S above 0, found {text!r}")

    def choices(self, adapters: tuple[str, ...], rng: random.Random) -> Iterator[str | None]:
        """Endless choices; None, the base model, if there are no adapters."""
        weights = list(accumulate((rank + 1) ** -self.zipf for rank in range(len(adapters))))
        turn = 0
        while True:
            if not adapters:
                yield None
            elif self.turns:
                yield adapters[turn % len(adapters)]
            else:
                yield rng.choices(adapters, cum_weights=weights)[0]
            turn += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A load on a server.

    Set exactly one of `concurrency` and `rate`, and at least one of `num_requests` and `duration`.

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
        assert (self.concurrency is None) != (self.rate is None)
        assert self.num_requests is not None or self.duration is not None

    def requests(self) -> Iterator[Planned]:
        """The requests in order; endless if `num_requests` is None."""
        return self._planned("load", self.num_requests)

    def warm_up(self, count: int) -> Iterator[Planned]:
        """Requests with the same distribution and other prompts, so that the prefix cache stays cold."""
        return self._planned("warm-up", count)

    def _planned(self, purpose: str, count: int | None) -> Iterator[Planned]:
        rng = random.Random(f"{self.seed} {purpose}")  # noqa: S311 (a load, not a secret)
        names = self.popularity.choices(self.adapters, rng)
        index, due = 0, 0.0
        while count is None or index < count:
            length = rng.randint(*self.prompt_tokens)
            prompt = tuple(rng.choices(_TOKEN_IDS, k=length))
            yield Planned(index=index, due=due, adapter=next(names), prompt=prompt)
            index += 1
            due += rng.expovariate(self.rate) if self.rate else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A request to send. `due` is in seconds after the start; 0 in a closed loop."""

    index: int
    due: float
    adapter: str | None
    prompt: tuple[int, ...]
