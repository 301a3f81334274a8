"""Runs steps on the device, and keeps the adapters that are in its arena."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from turret_adapters.host import HostAdapter
from turret_adapters.spec import AdapterSpec, ModuleKind
from turret_server.engine.step import PageCopy, SequenceStep, Step, StepResult
from turret_server.errors import UnsupportedModelError
from turret_server.model.arena import Arena
from turret_server.model.batch import Batch, make_batch
from turret_server.model.context import StepContext, step_context
from turret_server.model.deltas import GatheredRows, ResidentDeltas, write_slab
from turret_server.model.load import LoadedModel
from turret_server.model.sampler import Sampler

log = logging.getLogger(__name__)

# While one waits for the disk, another copies; more would only take cores from the steps.
_NUM_LOADERS = 2


class HostAdapters(Protocol):
    """Brings the tensors of a revision, from host memory or from further away."""

    def tensors(self, revision: str) -> HostAdapter: ...


class ModelRunner:
    """The engine's `Runner` and `AdapterMemory`: computes steps, fills pages with adapters.

    `run` is called on the engine's thread. `place` brings adapters from wherever they are on threads of its
    own, and copies them into pages that nobody else reads yet.
    """

    def __init__(self, loaded: LoadedModel, arena: Arena, adapters: HostAdapters, sampler: Sampler) -> None:
        self._loaded = loaded
        self._arena = arena
        self._adapters = adapters
        self._sampler = sampler
        self._linears = loaded.base.of_kind(ModuleKind.LINEAR, ModuleKind.EXPERT)
        self._deltas: dict[str, ResidentDeltas] = {}
        self._gathered = GatheredRows()
        self._prompts: dict[str, torch.Tensor] = {}
        self._loaders = ThreadPoolExecutor(max_workers=_NUM_LOADERS, thread_name_prefix="turret-load")
        on_gpu = loaded.device.type == "cuda"
        self._copies = torch.cuda.Stream(loaded.device) if on_gpu else None  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._loaders.shutdown(cancel_futures=True)

    def check(self) -> None:
        """Run one token and see that every layer came through our attention; warms the kernels as well.

        Raises:
            UnsupportedModelError: a layer did not.
        """
        token = SequenceStep(sequence_id=0, token_ids=(0,), start=0, block_table=(0,))
        seen: set[int] = set()
        self._forward(self._batch(Step(sequences=(token,))), seen)
        if len(seen) != self._loaded.base.num_layers:
            raise UnsupportedModelError(
                f"{self._loaded.model.config.model_type} models are not served: of their "
                f"{self._loaded.base.num_layers} layers, {len(seen)} use the attention they are given"
            )

    def run(self, step: Step) -> StepResult:
        for copy in step.copies:
            self._copy_page(copy)
        batch = self._batch(step)
        logits_SV = self._forward(batch, set())
        if not batch.sampled:
            return StepResult(token_ids={})
        return self._sampler.sample(logits_SV, batch.sampled)

    def place(
        self,
        spec: AdapterSpec,
        slab_pages: tuple[int, ...],
        prefix_pages: tuple[int, ...],
        done: Callable[[str | None], None],
    ) -> None:
        def copy() -> None:
            try:
                self._place(self._adapters.tensors(spec.revision), slab_pages, prefix_pages)
            except Exception as error:
                log.exception("adapter %s could not be copied to the arena", spec.revision)
                done(f"{type(error).__name__}: {error}")
            else:
                done(None)

        self._loaders.submit(copy)

    def forget(self, revision: str) -> None:
        self._deltas.pop(revision, None)
        self._prompts.pop(revision, None)

    @torch.inference_mode()
    def _place(
        self, adapter: HostAdapter, slab_pages: tuple[int, ...], prefix_pages: tuple[int, ...]
    ) -> None:
        revision = adapter.spec.revision
        with torch.cuda.stream(self._copies):
            if slab_pages:
                self._deltas[revision] = write_slab(self._arena, adapter, slab_pages, self._linears)
            if adapter.prefix_kv is not None:
                self._arena.write_prefix(prefix_pages, adapter.prefix_kv)
            if adapter.prompt_embeddings is not None:
                prompt = adapter.prompt_embeddings.to(self._loaded.device, self._loaded.dtype)
                self._prompts[revision] = prompt
        if self._copies:
            self._copies.synchronize()

    def _copy_page(self, copy: PageCopy) -> None:
        self._arena.copy_page(copy.source, copy.target)

    def _batch(self, step: Step) -> Batch:
        return make_batch(
            step,
            self._deltas,
            self._gathered,
            block_size=self._arena.block_size,
            device=self._loaded.device,
        )

    @torch.inference_mode()
    def _forward(self, batch: Batch, layers_seen: set[int]) -> torch.Tensor:
        """Logits of the last token of every sequence that samples, [S, vocabulary]."""
        model = self._loaded.model
        context = StepContext(
            ops=self._loaded.ops,
            arena=self._arena,
            attention=batch.attention,
            deltas=batch.deltas,
            head_deltas=batch.head_deltas,
            layers_seen=layers_seen,
        )
        with step_context(context):
            if batch.virtual:
                inputs = {"inputs_embeds": self._embed(batch)}
            else:
                inputs = {"input_ids": batch.token_ids_T[None]}
            output = model(
                **inputs, position_ids=batch.positions_T[None], use_cache=False, logits_to_keep=batch.last_S
            )
        logits_SV: torch.Tensor = output.logits[0]
        return logits_SV

    def _embed(self, batch: Batch) -> torch.Tensor:
        """Token embeddings with those of virtual tokens in their places, as peft hands them to the model."""
        embeddings_1TE: torch.Tensor = self._loaded.model.get_input_embeddings()(batch.token_ids_T[None])
        for index, revision, row in batch.virtual:
            embeddings_1TE[0, index] = self._prompts[revision][row]
        return embeddings_1TE
