"""A job inside the engine: its tokens, its pages, how far it is computed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from turret_adapters.spec import AdapterSpec
from turret_server.engine.kv.prefix_cache import block_key
from turret_server.engine.request import PromptPin, Request, SamplingParams
from turret_server.engine.residency.resident import Resident
from turret_server.engine.step import VIRTUAL_TOKEN, SequenceStep

# How the token after a prompt pin is sampled. Nobody gets it, but the sampler fails where logits are not
# finite, and such keys and values must not be pinned.
_PROBE = SamplingParams(max_tokens=1)

# A position that no context reaches.
NEVER = 2**62

# A request stands in its tenant's queue as if it had come so much earlier for each step of priority. So a
# more important one passes those that came a while before it, and nobody is passed for ever.
HEAD_START_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` are an adapter's virtual tokens, the prompt and what was generated.

    The keys and values of the first `num_computed` of them are in the pages of `block_table`. The adapters'
    rows apply from position `active_from` on. `awaited` are the residences that it last waited for. `order`
    is its place among its tenant's: the lowest is served first. The tenant was charged for the first
    `num_charged` tokens.
    """

    job: Request | PromptPin
    tokens: list[int]
    order: tuple[float, int] = (0.0, 0)
    active_from: int = 0
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    residents: tuple[Resident, ...] = ()
    awaited: tuple[Resident, ...] = ()
    num_cached: int | None = None
    num_charged: int = 0
    num_preempted: int = 0
    started: bool = False
    _keys: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, job: Request | PromptPin, arrival: float = 0.0) -> Sequence:
        """The sequence of a job that arrived at this time of the engine's clock."""
        tokens = [VIRTUAL_TOKEN] * job.num_virtual_tokens + list(job.prompt_token_ids)
        starts = [_active_from(use.spec, tokens) for use in job.adapters]
        return cls(
            job=job,
            tokens=tokens,
            order=(arrival - HEAD_START_SECONDS * job.priority, job.request_id),
            active_from=max(starts, default=0),
        )

    @property
    def tenant(self) -> str:
        return self.job.tenant

    @property
    def num_virtual(self) -> int:
        return self.job.num_virtual_tokens

    @property
    def num_prompt(self) -> int:
        """Virtual tokens and those of the prompt."""
        return self.num_virtual + len(self.job.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    def keys(self, count: int, block_size: int) -> list[bytes]:
        """Prefix-cache keys of the first `count` blocks, all of which must be whole.

        The chain begins as the base's; the block in which the adapters' rows begin to apply, or their
        prefix stands, and all after it are theirs alone.
        """
        for index in range(len(self._keys), count):
            parent = self._keys[-1] if index else self._root
            end = (index + 1) * block_size
            if index == (0 if self.num_virtual else self.active_from // block_size):
                parent += self._salt
            self._keys.append(block_key(parent, self.tokens[end - block_size : end]))
        return self._keys[:count]

    @property
    def _root(self) -> bytes:
        """Where the chain begins. A salt is hashed, so that it cannot be chosen to look like a revision."""
        salt = self.job.cache_salt.encode()
        return hashlib.blake2b(salt, digest_size=16).digest() if salt else b""

    @property
    def _salt(self) -> bytes:
        """What sets blocks apart that adapters change. Where the rows begin to apply is part of it: the same
        tokens may be a prompt, which activates, or an answer, which does not.
        """
        if not self.job.adapters:
            return b""
        named = ",".join(f"{use.spec.revision}*{use.weight!r}" for use in self.job.adapters)
        return f"{named}@{self.active_from}".encode()

    def step(self, num_tokens: int) -> SequenceStep:
        """The step that computes the next `num_tokens` tokens; a token is sampled after the last one."""
        end = self.num_computed + num_tokens
        sampling = self.job.sampling if isinstance(self.job, Request) else _PROBE
        return SequenceStep(
            sequence_id=self.job.request_id,
            token_ids=tuple(self.tokens[self.num_computed : end]),
            start=self.num_computed,
            block_table=tuple(self.block_table),
            adapters=tuple((use.spec.revision, use.weight) for use in self.job.adapters),
            active_from=self.active_from,
            sampling=sampling if end == len(self.tokens) else None,
            num_generated=self.num_generated,
        )


def _active_from(spec: AdapterSpec, tokens: list[int]) -> int:
    """Where an adapter's rows begin to apply: at the last place where its invocation tokens stand, beyond
    every position without them, and at 0 where it needs none (activated LoRA, arXiv 2504.12397).
    """
    wanted = list(spec.invocation_tokens)
    if not wanted:
        return 0
    for start in range(len(tokens) - len(wanted), -1, -1):
        if tokens[start : start + len(wanted)] == wanted:
            return start
    return NEVER
