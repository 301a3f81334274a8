"""An adapter that has pages of the arena, and how it was used."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from turret_adapters.spec import AdapterSpec

# In how many steps half of an adapter's past uses are forgotten.
_HALF_LIFE = 5000


@dataclass(slots=True, eq=False)
class Resident:
    """A revision that has pages. It is ready when neither its copy nor its virtual tokens are pending.

    `tenant` asked for it last; `users` are those of the requests that use it. In ticks of the pool: somebody
    who waits looked at it at `needed`, or used it until `last_used`; at `last_begun` requests had begun on it
    `num_begun` times, the older ones counting less. One that is `pinned` is never idle. Once it is `gone`, it
    has no pages any more; with an `error`, because filling them failed.
    """

    spec: AdapterSpec
    slab_pages: list[int]
    prefix_pages: list[int]
    tenant: str
    copying: bool
    num_virtual_computed: int
    num_users: int = 0
    users: Counter[str] = field(default_factory=Counter)
    needed: int = 0
    last_used: int = 0
    last_begun: int = 0
    num_begun: float = 0.0
    pinned: bool = False
    gone: bool = False
    error: str | None = None

    @property
    def ready(self) -> bool:
        return not self.copying and self.num_virtual_computed == self.spec.num_virtual_tokens

    @property
    def pages(self) -> list[int]:
        return self.slab_pages + self.prefix_pages

    @property
    def num_pages(self) -> int:
        return len(self.slab_pages) + len(self.prefix_pages)

    def uses(self, clock: int) -> float:
        """How often requests began on it, as far as that is not forgotten."""
        return self.num_begun * math.exp2((self.last_begun - clock) / _HALF_LIFE)

    def age(self, clock: int) -> float:
        """How long nobody used it, in proportion to how long that may be expected to be: one that was used
        often will be again the sooner (hyperbolic caching, Blankstein et al., ATC 2017).
        """
        return (clock - self.last_used) / (1 + self.uses(clock))

    def is_held_by(self, tenant: str) -> bool:
        """Whether the tenant uses it, or was the last to ask for it and nobody else uses it. What is pinned
        is nobody's.
        """
        uses = self.users[tenant] > 0 or (self.tenant == tenant and not self.num_users)
        return uses and not self.pinned

    def is_idle(self, clock: int) -> bool:
        """Whether it may go: nobody uses it, and the step of this tick has not looked at it."""
        return not (self.num_users or self.pinned or self.gone) and self.needed < clock and self.ready
