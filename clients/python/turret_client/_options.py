"""What a generation may be told, once for every method that generates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypedDict

from turret_client._results import AdapterRef

# One name, one name with its weight and task, or several of either.
AdapterArgument: TypeAlias = str | AdapterRef | Sequence[str | AdapterRef] | None


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; all may be left out.

    Attributes:
        adapter: Name of the adapter, or an `AdapterRef`; several are composed; None is the base model.
        max_tokens: Most tokens to generate; None is 256, or what the context leaves if less.
        temperature: 0, the default, is greedy.
        top_p: Nucleus sampling, 0 < top_p <= 1; None is 1.
        top_k: Sample among the k likeliest tokens; 0 is all.
        seed: Same seed, prompt, adapter revision and parameters: same tokens. None: the server's choice.
        stop: Generation ends before the first of these strings; at most 16.
        priority: From -10 to 10. The request stands in its tenant's queue as if it had come 10 seconds
            earlier for each step; against other tenants it counts for nothing.
        cache_salt: Cached blocks of the prompt are shared only among requests with the same salt, so that
            nobody without it learns from answering times what was asked before; at most 128 characters.
        routing_key: Where some of an adapter's requests go to another revision, all with the same key go to
            the same one; at most 128 characters. Without it that is drawn for each request.
    """

    adapter: AdapterArgument
    max_tokens: int | None
    temperature: float
    top_p: float | None
    top_k: int
    seed: int | None
    stop: Sequence[str]
    priority: int
    cache_salt: str
    routing_key: str
