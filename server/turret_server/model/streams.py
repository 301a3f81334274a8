"""The streams of a device: steps run on one, copies of adapters on another.

Pages and tensors pass between them. A page that a step used goes to a copy, which waits for the step with an
event; a page that a copy wrote goes to a step once the host has waited for the copy. What is allocated on the
copies' stream and read by steps is freed between steps, so a step ends before the host goes on; the event
guards what is launched between steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A block in which a GPU is the thread's current device: on it, Triton launches kernels whatever device
    their arguments are on. Every thread begins on the first.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Streams:
    """Streams of a CPU, where each operation has ended when its call returns."""

    def step(self) -> AbstractContextManager[None]:
        """A block that computes. Afterwards, also after an exception, the device has computed it."""
        return nullcontext()

    def launched(self) -> torch.cuda.Event | None:
        """An event that follows all that blocks of `step` have launched."""
        return None

    def copy(self, after: torch.cuda.Event | None) -> AbstractContextManager[None]:  # noqa: ARG002
        """A block that copies to the device, beside steps, after the event. The copy has finished on exit."""
        return nullcontext()


class CudaStreams(Streams):
    """Streams of a GPU, which in both blocks is the thread's current device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # not typed in torch

    @contextmanager
    def step(self) -> Iterator[None]:
        with on_device(self._device):
            try:
                yield
            finally:
                torch.cuda.current_stream(self._device).synchronize()

    def launched(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    @contextmanager
    def copy(self, after: torch.cuda.Event | None) -> Iterator[None]:
        assert after is not None
        self._copies.wait_event(after)
        try:
            with torch.cuda.stream(self._copies):
                yield
        finally:
            self._copies.synchronize()


def make_streams(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else Streams()
