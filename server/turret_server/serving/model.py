"""The model that a server serves."""

from __future__ import annotations

from dataclasses import dataclass

from turret_adapters.spec import Method
from turret_server.serving.validation import MAX_ADAPTERS, MAX_MESSAGES, MAX_TOOLS
from turret_server.tenancy.auth import Caller


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What clients must know of the base model. `max_context` counts the tokens of a prompt and its answer,
    `vocab_size` the logits. `calls_tools` is whether calls in its answers are found.
    """

    name: str
    max_context: int
    vocab_size: int
    has_chat_template: bool
    calls_tools: bool
    adapter_methods: tuple[Method, ...] = tuple(Method)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a tenant may ask for. `max_queued_requests` and the tokens in them are those that wait at once;
    `max_pinned_tokens` is None without a limit.
    """

    max_adapters: int = MAX_ADAPTERS
    max_messages: int = MAX_MESSAGES
    max_tools: int = MAX_TOOLS
    max_queued_requests: int
    max_queued_tokens: int
    max_pinned_tokens: int | None


class ModelService:
    """What a server serves, and to whom how much."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def limits(self, caller: Caller) -> Limits:
        tenant = caller.tenant
        return Limits(
            max_queued_requests=tenant.limits.max_queued_requests,
            max_queued_tokens=tenant.limits.max_queued_tokens,
            max_pinned_tokens=tenant.max_pinned_tokens,
        )
