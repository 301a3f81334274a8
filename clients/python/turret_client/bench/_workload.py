"""What is sent, and when: all of it follows from the seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

# Ids that every vocabulary has. Which tokens a prompt holds does not change how long they take.
_TOKEN_IDS = range(16, 256)


@dataclass(frozen=True, slots=True)
class Popularity:
    """How requests choose among adapters.

    Attributes:
        zipf: The adapter of rank k, from 1 in the order given, is asked for in proportion to 1 / k**zipf.
            0 is uniform.
        turns: They take turns instead, so that requests that run together use different ones.
    """

    zipf: float = 0.0
    turns: bool = False

    @classmethod
    def parse(cls, text: str) -> Popularity:
        """From "uniform", "turns" or "zipf:S".

        Raises:
            ValueError: it is none of them, or S is not above 0.
        """
        if text in ("uniform", "turns"):
            return cls(turns=text == "turns")
        name, _, exponent = text.partition(":")
        with suppress(ValueError):
            if name == "zipf" and float(exponent) > 0:
                return cls(zipf=float(exponent))
        raise ValueError(f"expected uniform, turns or zipf:S with S above 0, found {text!r}")

    def choices(self, adapters: tuple[str, ...], rng: random.Random) -> Iterator[str | None]:
        """An endless row of adapters; of None, the base model, where there are none."""
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
    """A load to put on a server.

    Exactly one of `concurrency` and `rate` is given, and at least one of `num_requests` and `duration`.

    Attributes:
        concurrency: Closed loop: so many requests run at any moment; one that ends makes room for the next.
        rate: Open loop: requests arrive by a Poisson process, so many a second on average, whether or not
            the earlier ones have ended.
        num_requests: Most requests to send.
        duration: No request is sent after so many seconds; those that run may end.
        adapters: Names to choose among; none is the base model.
        popularity: How to choose.
        prompt_tokens: Fewest and most tokens of a prompt; lengths between are equally likely.
        max_tokens: Tokens to generate.
        seed: Same seed: same prompts, adapters and arrivals.
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
        """The requests in their order; without end where only `duration` bounds them."""
        return self._planned("load", self.num_requests)

    def warm_up(self, count: int) -> Iterator[Planned]:
        """Requests of the same kind with other prompts: what they leave in a prefix cache is of no use."""
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
    """A request to send. `due` is seconds after the start, and 0 in a closed loop."""

    index: int
    due: float
    adapter: str | None
    prompt: tuple[int, ...]
