"""A model runner whose decode steps can be computed with graphs and without, and adapters on their pages."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from support.adapters import save_adapter
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import HostAdapter
from turret_adapters.spec import slab_layout
from turret_server.engine.request import SamplingParams
from turret_server.engine.step import SequenceStep, Step
from turret_server.kernels.gpu.ops import GpuOps
from turret_server.model.arena import Arena
from turret_server.model.decode_graph import DecodeGraphs, Record
from turret_server.model.load import LoadedModel, ModelWeights, load_model
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler

GREEDY = SamplingParams(max_tokens=1)


class Recording(Sampler):
    """Keeps the logits of the last step by sequence."""

    def sample(self, logits_SV, sequences):
        self.logits = {each.sequence_id: row.clone() for each, row in zip(sequences, logits_SV, strict=True)}
        return super().sample(logits_SV, sequences)


@dataclass
class World:
    loaded: LoadedModel
    arena: Arena
    runner: ModelRunner
    sampler: Recording
    adapters: dict[str, HostAdapter] = field(default_factory=dict)
    used: int = 0
    pages_of_each: int = 8

    @property
    def graphs(self) -> DecodeGraphs:
        assert self.runner._graphs is not None
        return self.runner._graphs

    def copy_to_device(self, name: str) -> None:
        """Copy an adapter to pages that were not used yet."""
        adapter = self.adapters[name]
        num_pages = slab_layout(adapter.spec.rows, self.arena.page_elements).num_pages
        pages = tuple(range(self.used, self.used + num_pages))
        self.used += num_pages
        self.runner._copy(replace(adapter, prefix_kv=None), pages, ())

    def decoding(self, index: int, context: int, *adapters: tuple[str, float], **options) -> SequenceStep:
        """A sequence that decodes after `context` tokens, on pages of its own at the end of the arena."""
        first = self.arena.num_pages - self.pages_of_each * (index + 1)
        return SequenceStep(
            **{
                "sequence_id": index,
                "token_ids": (random.randrange(300),),
                "start": context,
                "block_table": tuple(range(first, first + context // self.arena.block_size + 1)),
                "adapters": tuple((self.adapters[name].spec.revision, weight) for name, weight in adapters),
                "sampling": GREEDY,
                **options,
            }
        )

    def step(self, mixture: Iterable[tuple[tuple[str, float], ...]]) -> Step:
        """One that decodes, each sequence with the adapters that the mixture names, after any context."""
        longest = self.pages_of_each * self.arena.block_size
        return Step(
            sequences=tuple(
                self.decoding(index, random.choice([0, 15, 16, random.randrange(longest)]), *adapters)
                for index, adapters in enumerate(mixture)
            )
        )

    def logits(self, step: Step, *, graphs: bool) -> dict[int, torch.Tensor]:
        """By sequence; the arena is left as the step left it."""
        if graphs:
            found = self.graphs.run(step)
            assert found is not None, "it was computed without a graph"
            self.sampler.sample(*found)
        else:
            with self.without_graphs():
                self.runner.run(step)
        return self.sampler.logits

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        kept, self.runner._graphs = self.runner._graphs, None
        yield
        self.runner._graphs = kept


@contextmanager
def world(
    base: Path,
    folder: Path,
    kinds: Iterable[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    record: Record,
    max_sequences: int,
    num_pages: int,
) -> Iterator[World]:
    """With an adapter of each kind, and keys and values everywhere as if prompts had been computed."""
    loaded = load_model(str(base), device=device, dtype=dtype, cache=folder / "cache", ops=GpuOps())
    page_bytes = Arena(loaded.base, 0, dtype=dtype, device=device).page_bytes
    arena = Arena(loaded.base, num_pages * page_bytes, dtype=dtype, device=device)
    arena.flat.normal_()
    sampler = Recording()
    runner = ModelRunner(loaded, arena, SimpleNamespace(), sampler)
    made = World(loaded, arena, runner, sampler)
    weights = ModelWeights(loaded.model, loaded.ops)
    for kind in kinds:
        files = save_adapter(kind, "llama", base, folder / kind)
        made.adapters[kind] = read_adapter(files, loaded.base, weights)
    runner.use_graphs(max_sequences, record)
    for kind in kinds:
        made.copy_to_device(kind)
    assert made.used + made.pages_of_each * max_sequences <= num_pages
    yield made
    runner.close()
