"""A GPU's streams without a GPU: what is launched goes on until something is known to have waited for it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from support.fake_device import PAGE_ELEMENTS, FakeDevice
from turret_adapters.host import HostAdapter, ModuleDelta
from turret_adapters.spec import AdapterSpec, Part, PrefixKind
from turret_server.engine.step import SequenceStep, Step, StepResult
from turret_server.model.batch import Batch
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler
from turret_server.model.streams import CudaStreams


class Stream:
    """Launches are numbered. `ended` are known to the host to have ended, `seen` are those of other streams
    that precede what this one launches next.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.launched = self.ended = 0
        self.seen: Counter[Stream] = Counter()

    def record_event(self) -> tuple[Stream, int]:
        return self, self.launched

    def wait_event(self, event: tuple[Stream, int]) -> None:
        stream, number = event
        self.seen[stream] = max(self.seen[stream], number)

    def synchronize(self) -> None:
        self.ended = self.launched


class FakeCuda:
    """What `CudaStreams` uses of `torch.cuda`. `steps` is the stream of threads that chose no other."""

    Stream = Stream

    def __init__(self) -> None:
        self.steps = Stream()
        self._local = threading.local()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("Stream", "current_stream", "stream", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def current_device(self) -> torch.device | None:
        return getattr(self._local, "device", None)

    def current_stream(self, device: torch.device | None = None) -> Stream:  # noqa: ARG002
        return getattr(self._local, "stream", self.steps)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        outer, self._local.stream = self.current_stream(), stream
        try:
            with self.device(stream.device):
                yield
        finally:
            self._local.stream = outer

    @contextmanager
    def device(self, device: torch.device | None) -> Iterator[None]:
        outer, self._local.device = self.current_device(), device
        try:
            yield
        finally:
            self._local.device = outer


class TracedArena:
    """Pages in flight: for each, the stream that used it last, and the number of that launch."""

    flat = torch.empty(0)
    page_elements = PAGE_ELEMENTS

    def __init__(self, num_pages: int, block_size: int, cuda: FakeCuda) -> None:
        self.num_pages = num_pages
        self.block_size = block_size
        self.copies_fail = False
        self._cuda = cuda
        self._used: dict[int, tuple[Stream, int]] = {}

    def use(self, pages: Iterable[int]) -> None:
        """Launch something that reads or writes pages, on the current stream."""
        stream = self._cuda.current_stream()
        stream.launched += 1
        for page in pages:
            other, number = self._used.get(page, (stream, 0))
            if stream is self._cuda.steps and other is not stream:
                assert other.ended >= number, f"a step uses page {page}, to which is still copied"
            elif other is not stream:
                assert stream.seen[other] >= number, f"no event is between page {page}'s step and its copy"
            self._used[page] = stream, stream.launched

    def copy_page(self, source: int, target: int) -> None:
        self.use((source, target))

    def write_rows(self, offset: int, rows_NX: torch.Tensor) -> None:
        self._copy(range(offset // PAGE_ELEMENTS, (offset + rows_NX.numel()) // PAGE_ELEMENTS))

    def write_prefix(self, pages: tuple[int, ...], _: torch.Tensor) -> None:
        self._copy(pages)

    def _copy(self, pages: Iterable[int]) -> None:
        self.use(pages)
        if self.copies_fail:
            raise OSError("this copy fails")


class StreamedDevice(FakeDevice):
    """A `FakeDevice` whose steps and copies are also those of a `ModelRunner` with the streams of a GPU. Its
    model only uses the pages.
    """

    def __init__(self, num_pages: int, block_size: int, cuda: FakeCuda, *, immediate: bool = False) -> None:
        super().__init__(num_pages, block_size, immediate=immediate)
        self.arena = TracedArena(num_pages, block_size, cuda)
        self._cuda = cuda
        self._specs: dict[str, AdapterSpec] = {}
        self._jobs: list[Callable[[], None]] = []
        self._readers: dict[str, int] = {}  # the last launch that read an adapter
        cpu = torch.device("cpu")
        base = SimpleNamespace(of_kind=lambda *_: {})
        loaded = SimpleNamespace(base=base, device=cpu, dtype=torch.float32, vocab_size=1, encoder=None)
        self.runner = ModelRunner(loaded, self.arena, self, Unsampled())
        self.runner.close()
        self.runner._loaders = SimpleNamespace(submit=self._jobs.append)
        self.runner._streams = CudaStreams(torch.device("cuda", 1))
        self.runner._forward = self._forward
        self.runner._score = lambda *_: StepResult(token_ids={})
        self.runner._pool = lambda *_: StepResult(token_ids={})

    def tensors(self, revision: str) -> HostAdapter:
        spec = self._specs[revision]
        rows = {Part.LORA_A: torch.zeros(spec.max_rank, PAGE_ELEMENTS)}
        kind = spec.prefix.kind if spec.prefix else None
        return HostAdapter(
            spec=spec,
            deltas={"m": ModuleDelta(rows=rows)} if spec.rows else {},
            prefix_kv=torch.zeros(1) if kind is PrefixKind.KEY_VALUE else None,
            prompt_embeddings=torch.zeros(1) if kind is PrefixKind.EMBEDDING else None,
        )

    def copy_to_device(
        self,
        spec: AdapterSpec,
        slab_pages: tuple[int, ...],
        prefix_pages: tuple[int, ...],
        done: Callable[[str | None], None],
    ) -> None:
        self._specs[spec.revision] = spec
        self.runner.copy_to_device(spec, slab_pages, prefix_pages, self._copied)
        super().copy_to_device(spec, slab_pages, prefix_pages, done)

    def _copied(self, error: str | None) -> None:
        assert error is None or self.arena.copies_fail, error

    def complete(self, index: int = 0, error: str | None = None) -> AdapterSpec:
        self.arena.copies_fail = error is not None
        self._jobs.pop(index)()
        return super().complete(index, error)

    def forget(self, revision: str) -> None:
        ended = self._cuda.steps.ended
        assert ended >= self._readers.get(revision, 0), f"{revision} is freed while a step may read it"
        self.runner.forget(revision)
        super().forget(revision)

    def run(self, step: Step) -> StepResult:
        self.runner.run(step)
        return super().run(step)

    def _forward(self, batch: Batch, *_: object) -> torch.Tensor:
        """Launches one use of the pages of every context and of the adapters' rows."""
        attention, size = batch.attention, self.block_size
        pages: set[int] = set()
        for table, length in zip(attention.block_tables_QM, attention.context_lengths_Q, strict=True):
            pages.update(table[: -(-length // size)].tolist())
        read = {revision for _, revision, _ in batch.virtual}
        for segment in batch.deltas.segments if batch.deltas else ():
            for deltas, _ in segment.adapters:
                pages.update((deltas.others["m"].parts[Part.LORA_A].offsets_N // PAGE_ELEMENTS).tolist())
                read.update(name for name, resident in self.runner._deltas.items() if resident is deltas)
        self.arena.use(pages)
        self._readers |= dict.fromkeys(read, self._cuda.steps.launched)
        return torch.zeros(len(batch.logits_R), 1)


class Unsampled(Sampler):
    """Waits for nothing, as if nothing had been sampled."""

    def sample(self, logits_SV: torch.Tensor, sequences: Sequence[SequenceStep]) -> StepResult:  # noqa: ARG002
        return StepResult(token_ids={})
