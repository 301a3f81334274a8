"""A request inside the engine: its tokens, its pages, how far it is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

from turret_server.engine.prefix_cache import block_keys
from turret_server.engine.request import Request
from turret_server.engine.residency import Resident
from turret_server.engine.step import VIRTUAL_TOKEN, SequenceStep


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` are the adapter's virtual tokens, the prompt and what was generated.

    The keys and values of the first `num_computed` of them are in the pages of `block_table`. `awaited` is
    the adapter's residence that it last waited for.
    """

    request: Request
    tokens: list[int]
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    resident: Resident | None = None
    awaited: Resident | None = None
    num_cached: int | None = None
    _keys: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request) -> Sequence:
        num_virtual = request.adapter.num_virtual_tokens if request.adapter else 0
        return cls(request=request, tokens=[VIRTUAL_TOKEN] * num_virtual + list(request.prompt_token_ids))

    @property
    def revision(self) -> str | None:
        return self.request.adapter.revision if self.request.adapter else None

    @property
    def num_virtual(self) -> int:
        return self.request.adapter.num_virtual_tokens if self.request.adapter else 0

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_virtual - len(self.request.prompt_token_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    def keys(self, count: int, block_size: int) -> list[bytes]:
        """Prefix-cache keys of the first `count` blocks, all of which must be whole."""
        if count > len(self._keys):
            known = len(self._keys)
            parent = self._keys[-1] if known else (self.revision or "").encode()
            fresh = block_keys(parent, self.tokens[known * block_size :], block_size)
            self._keys.extend(islice(fresh, count - known))
        return self._keys[:count]

    def step(self, num_tokens: int) -> SequenceStep:
        """Compute the next `num_tokens` tokens, and sample one if none of them remains."""
        end = self.num_computed + num_tokens
        return SequenceStep(
            sequence_id=self.request.request_id,
            token_ids=tuple(self.tokens[self.num_computed : end]),
            start=self.num_computed,
            block_table=tuple(self.block_table),
            revision=self.revision,
            sampling=self.request.sampling if end == len(self.tokens) else None,
            num_generated=self.num_generated,
        )
