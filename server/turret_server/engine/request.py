"""The engine's input, requests and prompt pins, and its output."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from turret_adapters.spec import AdapterSpec
from turret_server import logs
from turret_server.engine.pooling import PoolingParams, Rows
from turret_server.errors import TurretError

log = logging.getLogger(__name__)


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    PINNED = "pinned"  # of a prompt pin
    POOLED = "pooled"  # of a pooling request
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitAdjustment:
    """How logits change before a token is chosen, in vLLM's order: before `min_tokens` tokens none that ends
    the generation is chosen, `logit_bias` is added by token id, tokens of prompt and answer are penalised by
    `repetition_penalty`, those of the answer by the others.
    """

    min_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether it depends on the tokens so far."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """`temperature` 0 is greedy; `top_k` 0 means all tokens. The draw of a request's nth token depends on
    `seed` and n alone.

    `logprobs` is how many of the likeliest tokens come with each token and its log probability, and
    `prompt_logprobs` the same for the tokens of the prompt; None is no log probabilities.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    adjustment: LogitAdjustment | None = None


class Matcher(Protocol):
    """Says for one answer which tokens may come next."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer ends here."""

    def allowed(self) -> bytes:
        """The tokens that may come next, one bit for each, the lowest first.

        Raises:
            TurretError: the answer cannot go on.
        """

    def accept(self, token_id: int) -> None:
        """Go on after a token.

        Raises:
            TurretError: the answer cannot go on.
        """


class Grammar(Protocol):
    """The form of an answer."""

    def start(self) -> Matcher: ...


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log probability of a token by the logits as the model gives them. `rank` is 1 for the likeliest.
    `top` are the likeliest tokens and their log probabilities, the likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One event of a job: a token, its end, or both.

    `cached_tokens` is the number of tokens whose keys and values were resident when the job started.
    `prompt_logprobs` come with the first token, for all tokens of the prompt but the first. `rows` are the
    numbers of a pooling request.
    """

    token_id: int | None = None
    finish_reason: FinishReason | None = None
    error: TurretError | None = None
    cached_tokens: int = 0
    logprob: Logprob | None = None
    prompt_logprobs: tuple[Logprob, ...] = ()
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """An adapter that a job names, and the weight of its LoRA."""

    spec: AdapterSpec
    weight: float = 1.0


@dataclass(slots=True)
class Times:
    """Times of a job in seconds of the engine's clock: from `awaited` to `ready` it waited for its adapters
    to be resident, at `started` it left the queue to run. None if that has not happened.
    """

    awaited: float | None = None
    ready: float | None = None
    started: float | None = None

    def await_adapters(self, now: float) -> None:
        """It is next to start, but its adapters are not resident, or were evicted again."""
        self.awaited = now if self.awaited is None else self.awaited
        self.ready = None

    def found_adapters(self, now: float) -> None:
        self.ready = now if self.ready is None else self.ready

    def start(self, now: float) -> None:
        """It has pages. A job that was preempted keeps the time of its first start."""
        self.started = now if self.started is None else self.started


# The tenant of a job that names none.
DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What requests, pooling requests and prompt pins have in common: a prompt that is computed.

    At most one of the adapters has virtual tokens. `deadline` is in seconds of the engine's clock. `sink` is
    called on the engine's thread. Cached blocks are shared only between jobs with the same `cache_salt`.
    `about` is added to the job's log lines.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    adapters: tuple[AdapterUse, ...] = ()
    deadline: float | None
    sink: Callable[[Output], None]
    tenant: str = DEFAULT_TENANT
    priority: int = 0
    cache_salt: str = ""
    about: Mapping[str, object] = field(default_factory=dict, compare=False)
    times: Times = field(default_factory=Times, compare=False)

    @property
    def max_tokens(self) -> int:
        """The most tokens that it may generate."""
        return 0

    @property
    def num_virtual_tokens(self) -> int:
        return sum(use.spec.num_virtual_tokens for use in self.adapters)

    @property
    def vocab_size(self) -> int | None:
        """The size of its adapter's own vocabulary, if it has one."""
        return next((use.spec.vocab_size for use in self.adapters if use.spec.vocab_size), None)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the most that may be generated, without virtual tokens."""
        return len(self.prompt_token_ids) + self.max_tokens

    def emit(self, output: Output) -> bool:
        """Pass an event to the sink; False if the sink raises, as its caller is gone then."""
        try:
            self.sink(output)
        except Exception:
            with logs.about(self.about):
                log.exception("the sink of request %d failed", self.request_id)
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Job):
    """A generation. Its sink gets every token and exactly one end.

    `leader` is the id of a request with the same prompt and adapters, which was submitted before: this one
    starts when the leader's prompt is computed, and shares its pages. `grammar` is the form of the answer.
    """

    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    leader: int | None = None
    grammar: Grammar | None = field(default=None, compare=False)

    @property
    def max_tokens(self) -> int:
        return self.sampling.max_tokens

    @property
    def num_tokens(self) -> int:
        """A prompt that is its leader's counts there."""
        return self.max_tokens + len(self.prompt_token_ids) * (self.leader is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPin(Job):
    """A prompt whose whole blocks stay in the prefix cache until it is unpinned by its `request_id`.

    Its sink gets exactly one output, with PINNED, CANCELLED, or FAILED and an error.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingRequest(Job):
    """A prompt of which a vector, or the numbers of a head, are wanted.

    The head is that of its adapter, or else the base model's. `token_type_ids` are those of a pair of texts;
    all are 0 if there are none. Its sink gets exactly one output, with POOLED and `rows`, with CANCELLED, or
    with FAILED and an error. The rows are one vector, or the logits of a SEQ_CLS head; or, for each token of
    the prompt, its logits (TOKEN_CLS) or those of an answer's start and end (QUESTION_ANS).
    """

    params: PoolingParams
    token_type_ids: tuple[int, ...] = ()
