"""A running engine, inside the test's process, whose logits can be looked at."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from turret_adapters.registry import Named
from turret_server.app.build import Parts
from turret_server.engine.request import AdapterUse, FinishReason, Output, Request, SamplingParams
from turret_server.engine.step import SequenceStep, StepResult
from turret_server.model.sampler import Sampler

_ids = itertools.count(1)


class RecordingSampler(Sampler):
    """Keeps every row of logits by request, and of every step which adapters sampled in it."""

    def __init__(self) -> None:
        self.logits: dict[int, list[torch.Tensor]] = defaultdict(list)
        self.revisions: list[set[tuple[tuple[str, float], ...]]] = []

    def sample(self, logits_SV: torch.Tensor, sequences: Sequence[SequenceStep]) -> StepResult:
        self.revisions.append({sequence.adapters for sequence in sequences})
        for row, sequence in zip(logits_SV, sequences, strict=True):
            # A row ends with those of other requests' vocabularies, which are minus infinity.
            own = row[: int(row.isneginf().logical_not().nonzero().max()) + 1]
            self.logits[sequence.sequence_id].append(own.float().clone())
        return super().sample(logits_SV, sequences)


@dataclass
class Running:
    """One submitted request. `reached` is set when it has `reach` tokens, `end` called when it ends."""

    prompt: tuple[int, ...]
    end: Callable[[], None]
    request_id: int = field(default_factory=lambda: next(_ids))
    token_ids: list[int] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)
    reach: int = 1

    def sink(self, output: Output) -> None:
        self.outputs.append(output)
        if output.token_id is not None:
            self.token_ids.append(output.token_id)
        if len(self.token_ids) >= self.reach or output.finish_reason:
            self.reached.set()
        if output.finish_reason:
            self.end()
            self.done.set()

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason


def submit(
    parts: Parts,
    prompt: Sequence[int],
    *named: Named,
    max_tokens: int = 12,
    temperature: float = 0.0,
    seed: int = 0,
    reach: int = 1,
    leader: int | None = None,
    **sampled: Any,
) -> Running:
    """`sampled` are other fields of `SamplingParams`."""
    lease = parts.registry.acquire(named)
    running = Running(prompt=tuple(prompt), end=lambda: parts.registry.release(lease), reach=reach)
    parts.engine.submit(
        Request(
            request_id=running.request_id,
            prompt_token_ids=running.prompt,
            adapters=tuple(AdapterUse(spec, weight) for spec, weight in lease.uses),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, **sampled),
            stop_token_ids=frozenset(),
            leader=leader,
            deadline=None,
            sink=running.sink,
        )
    )
    return running


def wait(*requests: Running) -> None:
    for running in requests:
        assert running.done.wait(timeout=120), "the request did not end"
