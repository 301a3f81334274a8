"""Runs steps on the device, and holds the resident adapters."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from typing import TYPE_CHECKING, Protocol

import torch

from turret_adapters.host import HostAdapter
from turret_adapters.spec import AdapterSpec, ModuleKind
from turret_server.engine.request import Logprob
from turret_server.engine.step import DeviceLostError, SequenceStep, Step, StepResult
from turret_server.kernels import LoraRows, ReferenceOps
from turret_server.kernels.cpu.cores import claim_cores
from turret_server.kernels.cpu.waiting import Waiting
from turret_server.model.adjustment import to_device
from turret_server.model.arena import Arena
from turret_server.model.batch import Batch, make_batch
from turret_server.model.context import StepContext, step_context
from turret_server.model.deltas import DeltaBatch, GatheredRows, ResidentDeltas, write_slab
from turret_server.model.experts import has_experts
from turret_server.model.load import LoadedModel
from turret_server.model.logprobs import score, unpack
from turret_server.model.pooler import Pooler
from turret_server.model.sampler import Sampler, not_finite
from turret_server.model.self_check import check_encoder, check_model
from turret_server.model.streams import make_streams

if TYPE_CHECKING:
    from turret_server.model.decode_graph import DecodeGraphs, Record

log = logging.getLogger(__name__)

# One can copy while another waits for the disk; more would only take cores from the steps.
_NUM_LOADERS = 2
# Each of these numbers of tokens uses another GPU kernel.
_WARM_TOKENS = (1, 32, 64, 128)


class HostAdapters(Protocol):
    """Adapters on the host. `tensors` may read from disk; it raises KeyError for an unloaded revision."""

    def tensors(self, revision: str) -> HostAdapter: ...


@contextmanager
def _errors_of_the_device() -> Iterator[None]:
    """Raises MemoryError and DeviceLostError for the errors of torch that mean the same."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    except torch.AcceleratorError as error:
        # The driver returns the same error for every later call.
        raise DeviceLostError(str(error)) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):  # torch has no exception class for it
            raise MemoryError(str(error)) from error
        raise


def graph_bytes(loaded: LoadedModel, max_sequences: int) -> int:
    """About as many bytes of the device as `ModelRunner.warm_up` takes for CUDA graphs."""
    if not _has_gpu_kernels(loaded) or has_experts(loaded.model.config):
        return 0
    from turret_server.model.decode_graph import scratch_bytes  # noqa: PLC0415 (Triton is optional)

    return scratch_bytes(loaded, max_sequences)


def _has_gpu_kernels(loaded: LoadedModel) -> bool:
    return loaded.device.type == "cuda" and not isinstance(loaded.ops, ReferenceOps)


class ModelRunner:
    """The engine's `Runner` and `AdapterMemory`: computes steps, copies adapters into pages.

    `run` is called on the engine's thread. Adapters are copied by threads of the runner, into pages that no
    step reads yet.
    """

    def __init__(self, loaded: LoadedModel, arena: Arena, adapters: HostAdapters, sampler: Sampler) -> None:
        self._loaded = loaded
        self._arena = arena
        self._adapters = adapters
        self._sampler = sampler
        self._linears = loaded.base.of_kind(ModuleKind.LINEAR, ModuleKind.EXPERT)
        self._deltas: dict[str, ResidentDeltas] = {}
        self._gathered = GatheredRows()
        self._pooler = Pooler(loaded, arena)
        self._prompts: dict[str, torch.Tensor] = {}
        self._graphs: DecodeGraphs | None = None
        self._loaders = ThreadPoolExecutor(max_workers=_NUM_LOADERS, thread_name_prefix="turret-load")
        self._fillers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="turret-form")
        self._streams = make_streams(loaded.device)
        self._waiting = Waiting() if loaded.device.type == "cpu" else None

    def close(self) -> None:
        self._loaders.shutdown(cancel_futures=True)
        self._fillers.shutdown(cancel_futures=True)
        if self._waiting:
            self._waiting.close()

    def check(self) -> None:
        """Compares a first prompt with transformers' own attention; also warms the kernels.

        Raises:
            UnsupportedModelError: the model computes something else.
        """
        check = check_model if self._loaded.encoder is None else check_encoder
        check(
            self._loaded.model,
            self._all_logits,
            num_layers=self._loaded.base.num_layers,
            lengths=(7, 3 if self._arena.num_pages >= 2 else 0),
        )

    def warm_up(self, max_sequences: int) -> None:
        """Compiles the kernels of a GPU and captures its decode steps as graphs, before the first request."""
        if not _has_gpu_kernels(self._loaded):
            return
        from turret_server.model.decode_graph import cuda_record  # noqa: PLC0415 (Triton is optional)

        started = time.perf_counter()
        for num_tokens in _WARM_TOKENS:
            if num_tokens <= self._arena.num_pages * self._arena.block_size:
                self._all_logits([(0,) * num_tokens])
        self._warm_lora()
        log.info("GPU kernels: ready in %.1f s", time.perf_counter() - started)
        self.use_graphs(max_sequences, cuda_record(self._loaded.device))

    def _warm_lora(self) -> None:
        """Compiles the LoRA kernels for linears and experts of every shape: no prompt has adapters yet."""
        loaded, flat = self._loaded, self._arena.flat
        shapes = {(shape.in_features, shape.out_features) for shape in self._linears.values()}
        with torch.inference_mode(), _errors_of_the_device(), self._streams.step():
            zero = torch.zeros(1, dtype=torch.int64, device=loaded.device)
            rows = LoraRows((0,), (1,), (0, 1), zero, zero, zero.float())
            for num_in, num_out in shapes:
                x_TI, y_TO = (flat.new_zeros(1, width, dtype=loaded.dtype) for width in (num_in, num_out))
                loaded.ops.lora_add(y_TO, x_TI, flat, rows)

    def use_graphs(self, max_sequences: int, record: Record) -> None:
        """Computes decode steps as CUDA graphs from now on, if they can be captured.

        Raises:
            DeviceLostError: the capture lost the device.
        """
        from turret_server.model.decode_graph import DecodeGraphs  # noqa: PLC0415

        assert not self._deltas, "the graphs must know every adapter that becomes resident"
        if has_experts(self._loaded.model.config):  # the host reads the number of tokens of each expert
            return
        # A failed capture and a lost device raise the same class, but a lost one also at the block's end.
        with _errors_of_the_device(), self._streams.step():
            try:
                graphs = DecodeGraphs(self._loaded, self._arena, max_sequences=max_sequences, record=record)
                graphs.record()
            except RuntimeError as error:
                log.warning("decode steps run without CUDA graphs: %s: %s", type(error).__name__, error)
            else:
                self._graphs = graphs

    def run(self, step: Step) -> StepResult:
        with _errors_of_the_device(), self._streams.step():
            return self._run(step)

    def _run(self, step: Step) -> StepResult:
        claim_cores()
        if self._waiting:
            self._waiting.adjust()
        for copy in step.copies:
            self._arena.copy_page(copy.source, copy.target)
        step = self._filling(step)
        if self._graphs and (decoded := self._graphs.run(step)):
            return self._sample(*decoded)
        batch = self._batch(step)
        states: list[torch.Tensor] = []
        logits_RV = self._forward(batch, [], states)
        result = StepResult(token_ids={})
        if batch.sampled:
            logits_SV = logits_RV if batch.sampled_S is None else logits_RV[batch.sampled_S]
            result = self._sample(logits_SV, batch.sampled)
        if batch.scored:
            result = self._score(logits_RV, batch.scored, result)
        return self._pool(states, batch, result) if batch.pooled else result

    @torch.inference_mode()
    def _pool(self, states: list[torch.Tensor], batch: Batch, result: StepResult) -> StepResult:
        """The result with the numbers of pooling requests."""
        [states_TE] = states
        with step_context(self._context(batch, batch.head_deltas, [])):
            rows, errors = self._pooler.pool(states_TE, batch.pooled, self._deltas)
        return replace(result, rows=rows, errors={**result.errors, **errors})

    def _filling(self, step: Step) -> Step:
        """The step, while the tokens that the forms of answers allow are computed beside it."""
        if not any(each.allowed for each in step.sequences):
            return step
        sequences = (
            replace(each, allowed=self._fillers.submit(each.allowed).result) if each.allowed else each
            for each in step.sequences
        )
        return replace(step, sequences=tuple(sequences))

    @torch.inference_mode()
    def _score(
        self, logits_RV: torch.Tensor, scored: Sequence[tuple[SequenceStep, slice]], result: StepResult
    ) -> StepResult:
        """The result with the log probabilities of each sequence's targets, within its own vocabulary."""
        found: dict[int, tuple[Logprob, ...]] = {}
        errors = dict(result.errors)
        for sequence, rows in scored:
            own_RV = logits_RV[rows, : sequence.vocab_size or self._loaded.vocab_size]
            targets_R = to_device(torch.tensor(sequence.targets), own_RV.device)
            scores = score(own_RV, targets_R, with_top=sequence.num_top > 0).tolist()
            found[sequence.sequence_id] = tuple(
                unpack(row, token_id, sequence.num_top)
                for row, token_id in zip(scores, sequence.targets, strict=True)
            )
            if not all(math.isfinite(each.logprob) for each in found[sequence.sequence_id]):
                errors[sequence.sequence_id] = not_finite(sequence)
        return replace(result, errors=errors, prompt_logprobs=found)

    @torch.inference_mode()
    def _sample(self, logits_SV: torch.Tensor, sequences: Sequence[SequenceStep]) -> StepResult:
        """Samples from each sequence's own vocabulary: logits beyond it are another's, or the base's."""
        sizes = [sequence.vocab_size or self._loaded.vocab_size for sequence in sequences]
        if min(sizes) < logits_SV.shape[1]:
            tokens_V = torch.arange(logits_SV.shape[1], device=logits_SV.device)
            sizes_S1 = torch.tensor(sizes, device=logits_SV.device)[:, None]
            logits_SV.masked_fill_(tokens_V >= sizes_S1, -torch.inf)
            own = zip(sequences, sizes, strict=True)
            sequences = [replace(sequence, vocab_size=size) for sequence, size in own]
        return self._sampler.sample(logits_SV, sequences)

    def copy_to_device(
        self,
        spec: AdapterSpec,
        slab_pages: tuple[int, ...],
        prefix_pages: tuple[int, ...],
        done: Callable[[str | None], None],
    ) -> None:
        # Taken here, on the engine's thread: a step may still use the pages.
        launched = self._streams.launched()

        def copy() -> None:
            try:
                adapter = self._find(spec.revision)
                if adapter:
                    with self._streams.copy(after=launched):
                        self._copy(adapter, slab_pages, prefix_pages)
            except Exception as error:
                log.exception("copying adapter %s to the arena failed", spec.revision)
                done(f"{type(error).__name__}: {error}")
            else:
                done(None if adapter else "the adapter was unloaded before its copy began")

        self._loaders.submit(copy)

    def _find(self, revision: str) -> HostAdapter | None:
        """None for an adapter that was fetched ahead of requests and replaced before its copy began."""
        try:
            return self._adapters.tensors(revision)
        except KeyError:
            return None

    def forget(self, revision: str) -> None:
        self._deltas.pop(revision, None)
        if self._graphs:
            self._graphs.forget(revision)
        self._prompts.pop(revision, None)

    def _all_logits(
        self, prompts: Sequence[Sequence[int]], parts: Sequence[slice] | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Computes prompts on the first pages; hidden states on an encoder. See `self_check.Compute`."""
        sequences, pages = [], count()
        for index, token_ids in enumerate(prompts):
            table = tuple(islice(pages, -(-len(token_ids) // self._arena.block_size)))
            sequences.append(
                SequenceStep(
                    sequence_id=index,
                    token_ids=tuple(token_ids[parts[index]] if parts else token_ids),
                    start=parts[index].start if parts else 0,
                    block_table=table,
                )
            )
        batch = self._batch(Step(sequences=tuple(sequences)))
        every_token = torch.arange(len(batch.token_ids_T), device=self._loaded.device)
        attention_calls: list[int] = []
        states: list[torch.Tensor] = []
        with _errors_of_the_device(), self._streams.step():
            logits_TV = self._forward(replace(batch, logits_R=every_token), attention_calls, states)
        return logits_TV if self._loaded.encoder is None else states[0], attention_calls

    @torch.inference_mode()
    def _copy(self, adapter: HostAdapter, slab_pages: tuple[int, ...], prefix_pages: tuple[int, ...]) -> None:
        revision = adapter.spec.revision
        if slab_pages:
            deltas = write_slab(self._arena, adapter, slab_pages, self._linears)
            self._deltas[revision] = deltas
            if self._graphs:
                self._graphs.add(revision, deltas)
        if adapter.prefix_kv is not None:
            self._arena.write_prefix(prefix_pages, adapter.prefix_kv)
        if adapter.prompt_embeddings is not None:
            prompt = adapter.prompt_embeddings.to(self._loaded.device, self._loaded.dtype)
            self._prompts[revision] = prompt

    def _batch(self, step: Step) -> Batch:
        return make_batch(
            step,
            self._deltas,
            self._gathered,
            block_size=self._arena.block_size,
            device=self._loaded.device,
            encoder=self._loaded.encoder,
        )

    def _context(self, batch: Batch, deltas: DeltaBatch | None, attention_calls: list[int]) -> StepContext:
        return StepContext(
            ops=self._loaded.ops,
            arena=self._arena,
            attention=batch.attention,
            deltas=deltas,
            head_deltas=batch.head_deltas,
            attention_calls=attention_calls,
        )

    @torch.inference_mode()
    def _forward(self, batch: Batch, attention_calls: list[int], states: list[torch.Tensor]) -> torch.Tensor:
        """Logits of the tokens for which the batch wants them, [R, vocabulary]; none on an encoder. Adds the
        hidden states, [T, hidden], to `states`.
        """
        model, encoder = self._loaded.model, self._loaded.encoder
        context = self._context(batch, batch.deltas, attention_calls)
        with step_context(context):
            inputs: dict[str, torch.Tensor] = {"position_ids": batch.positions_T[None]}
            if batch.virtual:
                inputs["inputs_embeds"] = self._embed(batch)
            else:
                inputs["input_ids"] = batch.token_ids_T[None]
            if encoder is None:
                logits_RV: torch.Tensor = model(
                    **inputs, use_cache=False, logits_to_keep=batch.logits_R
                ).logits[0]
                states += context.hidden_states
                return logits_RV
            if batch.token_type_ids_T is not None:
                inputs["token_type_ids"] = batch.token_type_ids_T[None]
            states_TE: torch.Tensor = model(**inputs).last_hidden_state[0]
        states.append(states_TE)
        return states_TE[:0]

    def _embed(self, batch: Batch) -> torch.Tensor:
        """Token embeddings, with prompt embeddings for virtual tokens, as peft passes them to the model."""
        embeddings_1TE: torch.Tensor = self._loaded.model.get_input_embeddings()(batch.token_ids_T[None])
        for index, revision, row in batch.virtual:
            embeddings_1TE[0, index] = self._prompts[revision][row]
        return embeddings_1TE
