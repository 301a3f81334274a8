"""A job inside the engine: its tokens, its pages, how far it is computed."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field, replace

from turret_adapters.spec import AdapterSpec
from turret_server.engine.kv.prefix_cache import block_key
from turret_server.engine.pooling import Rows
from turret_server.engine.request import (
    LogitAdjustment,
    Logprob,
    Matcher,
    PoolingRequest,
    PromptPin,
    Request,
    SamplingParams,
)
from turret_server.engine.residency.resident import Resident
from turret_server.engine.step import VIRTUAL_TOKEN, PoolingStep, SequenceStep

# For the token after a pinned prompt. The token is not used, but the sampler fails if the logits are not
# finite, and such keys and values must not be pinned.
_PROBE = SamplingParams(max_tokens=1)

# Beyond every position.
NEVER = 2**62

# In its tenant's queue, a job counts as having arrived so much earlier for each unit of priority: it
# overtakes those that arrived shortly before it, and none is overtaken for ever.
HEAD_START_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` are an adapter's virtual tokens, the prompt, and the generated tokens.

    The keys and values of the first `num_computed` tokens are in the pages of `block_table`. The adapters'
    rows apply from position `active_from` on. `residents` are its adapters while it runs, `awaited` those
    that it last waited for. Of a tenant's sequences, the one with the lowest `order` is served first. The
    tenant was charged for the first `num_charged` tokens. `dequeued` is True once the job has left the queue
    for the first time; a preempted sequence does not count as queued. `scores_prompt` is True while the
    prompt must be computed for the log probabilities of its tokens, and `prompt_logprobs` are those so far,
    until the first token is emitted. `rows` are the numbers of a pooling request so far. `matcher` has
    accepted the generated tokens.
    """

    job: Request | PromptPin | PoolingRequest
    tokens: list[int]
    order: tuple[float, int]
    active_from: int
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    residents: tuple[Resident, ...] = ()
    awaited: tuple[Resident, ...] = ()
    num_cached: int | None = None
    num_charged: int = 0
    num_preempted: int = 0
    dequeued: bool = False
    scores_prompt: bool = False
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    matcher: Matcher | None = None
    _keys: list[bytes] = field(default_factory=list)
    # The tokens of prompt and answer, if the logits of the next one depend on them.
    _history: array[int] | None = None

    @classmethod
    def of(cls, job: Request | PromptPin | PoolingRequest, arrival: float = 0.0) -> Sequence:
        """The sequence of a job that arrived at this time of the engine's clock."""
        tokens = [VIRTUAL_TOKEN] * job.num_virtual_tokens + list(job.prompt_token_ids)
        starts = [_active_from(use.spec, tokens) for use in job.adapters]
        sampling = _sampling(job) or _PROBE
        has_penalties = sampling.adjustment is not None and sampling.adjustment.has_penalties
        return cls(
            job=job,
            tokens=tokens,
            order=(arrival - HEAD_START_SECONDS * job.priority, job.request_id),
            active_from=max(starts, default=0),
            scores_prompt=sampling.prompt_logprobs is not None,
            matcher=job.grammar.start() if isinstance(job, Request) and job.grammar else None,
            _history=array("q", job.prompt_token_ids) if has_penalties else None,
        )

    @property
    def tenant(self) -> str:
        return self.job.tenant

    @property
    def num_virtual(self) -> int:
        return self.job.num_virtual_tokens

    @property
    def num_prefix(self) -> int:
        """Virtual tokens whose keys and values are in the adapters' pages."""
        return sum(use.spec.num_prefix_tokens for use in self.job.adapters)

    @property
    def needs_every_token(self) -> bool:
        """Whether no token of the prompt may be taken from the prefix cache."""
        pools = isinstance(self.job, PoolingRequest) and self.job.params.needs_every_token
        return self.scores_prompt or pools

    @property
    def num_prompt(self) -> int:
        """Virtual tokens and tokens of the prompt."""
        return self.num_virtual + len(self.job.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def leader(self) -> int | None:
        """The request whose prompt it shares, see `Request`."""
        return self.job.leader if isinstance(self.job, Request) else None

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.tokens.append(token_id)
        self.scores_prompt = False
        if self._history is not None:
            self._history.append(token_id)

    def keys(self, count: int, block_size: int) -> list[bytes]:
        """Prefix-cache keys of the first `count` blocks, all of which must be whole.

        Blocks before the one in which the adapters begin to apply have the keys of the base model, so that
        they are shared with it; with virtual tokens, there are none.
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
        """The start of the chain. The salt is hashed: a client could choose one that equals a revision."""
        salt = self.job.cache_salt.encode()
        return hashlib.blake2b(salt, digest_size=16).digest() if salt else b""

    @property
    def _salt(self) -> bytes:
        """Tells blocks apart that adapters change. It includes the position from which the rows apply: the
        same tokens activate a LoRA in a prompt, but not if they were generated.
        """
        if not self.job.adapters:
            return b""
        named = ",".join(f"{use.spec.revision}*{use.weight!r}" for use in self.job.adapters)
        return f"{named}@{self.active_from}".encode()

    def step(self, num_tokens: int) -> SequenceStep:
        """The step that computes the next `num_tokens` tokens; a token is sampled after the last one."""
        end = self.num_computed + num_tokens
        sampling = _sampling(self.job)
        part = SequenceStep(
            sequence_id=self.job.request_id,
            token_ids=tuple(self.tokens[self.num_computed : end]),
            start=self.num_computed,
            block_table=tuple(self.block_table),
            adapters=tuple((use.spec.revision, use.weight) for use in self.job.adapters),
            prompt=self._prompt,
            active_from=self.active_from,
            sampling=sampling if end == len(self.tokens) else None,
            num_generated=self.num_generated,
            vocab_size=self.job.vocab_size,
        )
        if part.sampling and part.sampling.adjustment is not None:
            part = self._adjusted(part, part.sampling.adjustment)
        if part.sampling and self.matcher:
            part = replace(part, allowed=self.matcher.allowed)
        if self.scores_prompt and sampling:
            targets = tuple(self.tokens[self.num_computed + 1 : end + 1])
            part = replace(part, targets=targets, num_top=sampling.prompt_logprobs or 0)
        if isinstance(self.job, PoolingRequest):
            part = self._pooled(part, self.job)
        return part

    @property
    def _prompt(self) -> str | None:
        """The revision with the embeddings of the virtual tokens that the sequence computes itself."""
        specs = (use.spec for use in self.job.adapters if use.spec.prefix)
        return next((spec.revision for spec in specs if not spec.num_prefix_tokens), None)

    def _pooled(self, part: SequenceStep, job: PoolingRequest) -> SequenceStep:
        """The step with what it adds to the numbers, if anything."""
        params, positions = job.params, range(part.start, part.start + len(part.token_ids))
        if job.token_type_ids:
            types = (0,) * self.num_virtual + job.token_type_ids
            part = replace(part, token_type_ids=types[positions.start : positions.stop])
        if params.task is None:
            num_tokens = len(job.prompt_token_ids)
            indices = (position - self.num_virtual for position in positions)
            weights = tuple(params.pooling.weight(index, num_tokens) for index in indices)
            return replace(part, pooling=PoolingStep(weights=weights)) if any(weights) else part
        if not params.task.by_token and positions.stop < len(self.tokens):
            return part
        head = next((use.spec.revision for use in job.adapters if use.spec.head), None)
        return replace(part, pooling=PoolingStep(task=params.task, head=head))

    def _adjusted(self, part: SequenceStep, adjustment: LogitAdjustment) -> SequenceStep:
        assert isinstance(self.job, Request)
        ends = self.num_generated >= adjustment.min_tokens
        return replace(
            part,
            excluded=frozenset() if ends else self.job.stop_token_ids,
            history=None if self._history is None else self._history[:],
        )


def _sampling(job: Request | PromptPin | PoolingRequest) -> SamplingParams | None:
    match job:
        case Request():
            return job.sampling
        case PromptPin():
            return _PROBE
        case PoolingRequest():
            return None


def _active_from(spec: AdapterSpec, tokens: list[int]) -> int:
    """The position from which an adapter's rows apply: that of the last occurrence of its invocation tokens,
    `NEVER` if there is none, and 0 if the adapter has no such tokens (activated LoRA, arXiv 2504.12397).
    """
    wanted = list(spec.invocation_tokens)
    if not wanted:
        return 0
    for start in range(len(tokens) - len(wanted), -1, -1):
        if tokens[start : start + len(wanted)] == wanted:
            return start
    return NEVER
