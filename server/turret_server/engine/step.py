"""The interface between engine and model: steps and their results, as plain data."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from turret_adapters.spec import HeadTask
from turret_server.engine.pooling import Rows
from turret_server.engine.request import Logprob, SamplingParams
from turret_server.errors import TurretError

# Placeholder for a virtual token of the sequence's adapter; its index there is its position.
VIRTUAL_TOKEN = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingStep:
    """What a step adds to the numbers of a pooling request: the sum of the hidden states by the `weights` of
    the step's tokens, or if there is a `task` the rows of a head for them, that of the revision `head` or the
    base model's.
    """

    task: HeadTask | None = None
    weights: tuple[float, ...] = ()
    head: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStep:
    """The tokens that one sequence computes in one step.

    `start` is the position of the first. Position p is in page `block_table[p // block_size]`.
    `adapters` are the revisions whose rows apply from position `active_from` on, and their weights.
    `prompt` is the revision whose embeddings replace virtual tokens.
    `sampling` is None if no token is sampled after the last one. `vocab_size` is the number of tokens to
    sample from, if it is not the model's. `excluded` are not sampled. `history` are the tokens of prompt and
    answer, the last `num_generated` of which are the answer's, if its logits depend on them. `targets` are
    the tokens after those that are computed, up to the prompt's last, if their log probabilities are wanted,
    with so many of the likeliest tokens in their places as `num_top`. `allowed` computes the tokens that may
    be sampled, see `Matcher.allowed`; it may be called on another thread, until the step has ended.
    `pooling` is what is wanted of the hidden states, and `token_type_ids` are those of the tokens, if not all
    are 0.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    adapters: tuple[tuple[str, float], ...] = ()
    active_from: int = 0
    prompt: str | None = None
    sampling: SamplingParams | None = None
    num_generated: int = 0
    vocab_size: int | None = None
    excluded: frozenset[int] = frozenset()
    history: array[int] | None = None
    targets: tuple[int, ...] = ()
    num_top: int = 0
    allowed: Callable[[], bytes] | None = None
    pooling: PoolingStep | None = None
    token_type_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PageCopy:
    source: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The page copies are made before the sequences are computed, since these write to the copies."""

    sequences: tuple[SequenceStep, ...]
    copies: tuple[PageCopy, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The token of every sequence that samples one, or its error; and the log probabilities that sequences
    want, of their token and of their `targets`; and the numbers that pooling requests want.
    """

    token_ids: Mapping[int, int]
    errors: Mapping[int, TurretError] = field(default_factory=dict)
    logprobs: Mapping[int, Logprob] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, tuple[Logprob, ...]] = field(default_factory=dict)
    rows: Mapping[int, Rows] = field(default_factory=dict)


class DeviceLostError(Exception):
    """The device fails every step from now on; only a new process can use it again."""
