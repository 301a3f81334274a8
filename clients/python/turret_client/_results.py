"""What a client's methods answer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """An end-of-sequence token or a stop string."""
    LENGTH = "length"
    """`max_tokens` was reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """An adapter that a request names.

    Attributes:
        name: Name of the adapter.
        weight: How much a LoRA counts.
        task: Which task of a multitask adapter, from 0.
    """

    name: str
    weight: float = 1.0
    task: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request.

    Attributes:
        prompt_tokens: Tokens of the prompt, without an adapter's virtual tokens.
        cached_tokens: Tokens found in the server's memory instead of computed: an adapter's virtual
            tokens and cached blocks of the prompt.
        generated_tokens: Tokens of the answer.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation. `revision` is that of its adapter; empty for the base model."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    revision: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new in a stream. `finish_reason` and `usage` are set in the last chunk only."""

    text: str
    token_ids: tuple[int, ...]
    revision: str
    finish_reason: FinishReason | None
    usage: Usage | None


class AdapterState(StrEnum):
    """Where an adapter is."""

    UNSPECIFIED = "unspecified"
    """A state that this version of the client does not know."""
    STAGED = "staged"
    """In host memory."""
    RESIDENT = "resident"
    """In the arena's pages, ready for the next step."""
    DRAINING = "draining"
    """Unloaded, with requests still running on it."""
    FAILED = "failed"
    """Could not be served when the server started, or when its folder changed."""
    UNLOADED = "unloaded"
    """Gone; only `unload_adapter` and `watch_adapters` answer it."""


class AdapterMethod(StrEnum):
    """How an adapter was trained."""

    UNSPECIFIED = "unspecified"
    """Unread, because the adapter FAILED; or one that this version of the client does not know."""
    LORA = "lora"
    PREFIX_TUNING = "prefix_tuning"
    PROMPT_TUNING = "prompt_tuning"
    P_TUNING = "p_tuning"
    MULTITASK_PROMPT_TUNING = "multitask_prompt_tuning"
    ADALORA = "adalora"
    VERA = "vera"
    IA3 = "ia3"
    LN_TUNING = "ln_tuning"


@dataclass(frozen=True, slots=True)
class AdapterRevision:
    """That a name came to serve a revision.

    Attributes:
        revision: Digest of its files; a request can name it as `name@revision`.
        source: Where it was loaded from, without what may be secret in a URL.
        published_at: When, in seconds since 1970 by the server's clock.
    """

    revision: str
    source: str
    published_at: float


@dataclass(frozen=True, slots=True)
class TrafficSplit:
    """That `percent` of an adapter's requests go to `revision`."""

    revision: str
    percent: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that the server has under a name.

    Attributes:
        name: Name that requests give.
        revision: Digest of its files; empty where it FAILED.
        state: Where it is.
        method: How it was trained.
        num_parameters: Numbers in its tensors.
        max_rank: Largest rank among its modules; 0 where it has no LoRA.
        num_virtual_tokens: Virtual tokens before the prompt; 0 where it has none.
        file_bytes: Size of its safetensors file.
        arena_bytes: What it takes in the arena when resident, in whole pages.
        active_requests: Requests that wait or run on this revision now.
        draining_revisions: Other revisions that requests run on: replaced ones, and earlier ones that
            requests name.
        error: Why it FAILED; otherwise empty.
        num_tasks: Tasks that a request chooses from; 0 where it has none to choose.
        history: What the name serves and served, the latest first.
        traffic_split: Where some of its requests go besides; None where all go to `revision`.
    """

    name: str
    revision: str
    state: AdapterState
    method: AdapterMethod
    num_parameters: int
    max_rank: int
    num_virtual_tokens: int
    file_bytes: int
    arena_bytes: int
    active_requests: int
    draining_revisions: tuple[str, ...]
    error: str
    num_tasks: int
    history: tuple[AdapterRevision, ...]
    traffic_split: TrafficSplit | None


@dataclass(frozen=True, slots=True)
class Download:
    """An adapter on its way from its source.

    Attributes:
        name: Under which it is to be served.
        done_bytes: What has come of it.
        total_bytes: All of it; None while nobody knows.
    """

    name: str
    done_bytes: int
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class PinnedPrompt:
    """A prompt whose blocks the server keeps in memory.

    Attributes:
        name: Name that it was pinned under.
        revision: That of its adapter; empty for the base model.
        prompt_tokens: Tokens of the prompt, without an adapter's virtual tokens.
    """

    name: str
    revision: str
    prompt_tokens: int
