"""What the engine is asked for, and what it answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from turret_adapters.spec import AdapterSpec
from turret_server import logs
from turret_server.errors import TurretError

log = logging.getLogger(__name__)


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    PINNED = "pinned"  # the only good end of a prompt pin
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """`temperature` 0 is greedy; `top_k` 0 means all. The token at position n depends on (seed, n) alone."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One event of a request: a token, its end, or both.

    `cached_tokens` counts the tokens whose keys and values were found in memory when the request started.
    """

    token_id: int | None = None
    finish_reason: FinishReason | None = None
    error: TurretError | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """An adapter that a request names, and how much its LoRA counts."""

    spec: AdapterSpec
    weight: float = 1.0


@dataclass(slots=True)
class Times:
    """When a request left the queue, and from when to when it waited there for its adapters to be resident,
    in seconds of the engine's clock; None where it has not, or had not to.
    """

    awaited: float | None = None
    ready: float | None = None
    started: float | None = None

    def await_adapters(self, now: float) -> None:
        """Its turn has come, but its adapters are not there, or are gone again."""
        self.awaited = now if self.awaited is None else self.awaited
        self.ready = None

    def found_adapters(self, now: float) -> None:
        self.ready = now if self.ready is None else self.ready

    def start(self, now: float) -> None:
        """It has pages; when it gets pages again, it had started before."""
        self.started = now if self.started is None else self.started


# The tenant of a job that names none.
DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a generation and a prompt pin have in common: a prompt whose keys and values are computed.

    At most one of the adapters has virtual tokens. `deadline` is in seconds of the engine's clock; `sink` is
    called on the engine's thread. Cached blocks are shared only between jobs with the same `cache_salt`.
    `about` is added to every log line of the job.
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
        """The most tokens that it generates."""
        return 0

    @property
    def num_virtual_tokens(self) -> int:
        return sum(use.spec.num_virtual_tokens for use in self.adapters)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the longest answer, without virtual tokens."""
        return len(self.prompt_token_ids) + self.max_tokens

    def tell(self, output: Output) -> bool:
        """Hand an event to the sink; False where it raises, and so nobody listens any more."""
        try:
            self.sink(output)
        except Exception:
            with logs.about(self.about):
                log.exception("request %d: its sink failed", self.request_id)
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Job):
    """A generation. Its sink gets every token and exactly one end."""

    sampling: SamplingParams
    stop_token_ids: frozenset[int]

    @property
    def max_tokens(self) -> int:
        return self.sampling.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPin(Job):
    """A prompt whose whole blocks stay in the prefix cache until it is unpinned by its id.

    Its sink gets exactly one output: PINNED, or how it failed.
    """
