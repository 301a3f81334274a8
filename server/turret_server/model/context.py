"""The step that a running forward computes, for its linears and its attention.

It is passed in a thread-local, not as arguments: some model families drop keyword arguments on the way to the
attention function. A thread has one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from turret_server.kernels import AttentionBatch, Ops
from turret_server.model.arena import Arena
from turret_server.model.deltas import DeltaBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """`deltas` are the adapters' changes for the step's tokens, `head_deltas` those for tokens whose logits
    are computed.

    `attention_calls` collects the layer of every call of the attention, `hidden_states` what the base model
    returns, [T, hidden].
    """

    ops: Ops
    arena: Arena
    attention: AttentionBatch
    deltas: DeltaBatch | None
    head_deltas: DeltaBatch | None
    attention_calls: list[int]
    hidden_states: list[torch.Tensor] = field(default_factory=list)


class _Slot(threading.local):
    context: StepContext | None = None


_slot = _Slot()


@contextmanager
def step_context(context: StepContext) -> Iterator[None]:
    """Within it, `current_step` returns `context`."""
    assert _slot.context is None, "a forward must not run inside another"
    _slot.context = context
    try:
        yield
    finally:
        _slot.context = None


def current_step() -> StepContext:
    assert _slot.context is not None, "the model runs only inside step_context"
    return _slot.context
