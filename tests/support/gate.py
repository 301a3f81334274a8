"""A sampler at which a step can be held, so that a test decides what happens while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from turret_server.engine.step import SequenceStep, StepResult
from turret_server.model.sampler import Sampler


class GatedSampler(Sampler):
    """`reached` is set when a step stands before the gate; `order` has the requests by their first token."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.order: list[int] = []
        self._open = threading.Event()
        self._open.set()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Steps that sample do not end within the block."""
        self.reached.clear()
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def wait(self) -> None:
        """Until a step stands before the gate."""
        assert self.reached.wait(timeout=60), "no step came"

    def sample(self, logits_SV: torch.Tensor, sequences: Sequence[SequenceStep]) -> StepResult:
        if not self._open.is_set():
            self.reached.set()
            assert self._open.wait(timeout=60), "the gate was left closed"
        self.order += [each.sequence_id for each in sequences if each.num_generated == 0]
        return super().sample(logits_SV, sequences)
