"""Decode steps as CUDA graphs: captured once for each batch size, replayed for any adapters.

In a decode step every sequence has one token and samples the next. Such a step launches the same thousand
kernels whatever its numbers are, and the GPU would wait for the host to launch them. So its inputs are in
static buffers, its size is padded to a bucket's, and a captured forward is replayed as a whole.

Padding rows have no page to write to and no tiles of attention or LoRA. A bucket has two graphs, with and
without LoRA. A step with adapters that change more than LoRA rows of linears, or that does not fit otherwise,
is computed without a graph.

For shape suffixes see `decode_inputs.py`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from turret_adapters.spec import ModuleKind, Part
from turret_server.engine.step import VIRTUAL_TOKEN, SequenceStep, Step
from turret_server.kernels.gpu.attention import AttentionTiles, TiledBatch, max_splits, parts_bytes
from turret_server.kernels.gpu.lora import TOKENS, TiledRows
from turret_server.kernels.gpu.rows import (
    MAX_TILE_ROWS,
    Directory,
    LinearRows,
    StepRows,
    gather,
    make_directory,
)
from turret_server.model.arena import Arena, block_size_for
from turret_server.model.context import StepContext, step_context
from turret_server.model.decode_inputs import DecodeBuffers, LoraTile
from turret_server.model.deltas import DeltaBatch, GatheredRows, ResidentDeltas
from turret_server.model.load import LoadedModel

log = logging.getLogger(__name__)

# In larger batches the GPU is busy without graphs.
_MAX_SEQUENCES = 128
# Programs of attention for each key-value head, so that a small batch keeps a GPU busy.
_PROGRAMS = 512
# In place of the lengths on the host, which a graph does not have.
_UNKNOWN = torch.empty(0, dtype=torch.int64)

Forward = Callable[[], torch.Tensor]
# Captures a function; returns one that repeats its work on the device, with the output at the same address.
Record = Callable[[Forward], Forward]


class DecodeGraphs:
    """The graphs of a model, and the directories of its resident adapters.

    `add` and `forget` may be called while a step runs, for adapters that are not in it.
    """

    def __init__(self, loaded: LoadedModel, arena: Arena, *, max_sequences: int, record: Record) -> None:
        self._loaded = loaded
        self._arena = arena
        self._record = record
        self._linears = tuple(loaded.base.of_kind(ModuleKind.LINEAR))
        self._directories: dict[str, Directory | None] = {}
        self._sizes = _sizes(min(max_sequences, _MAX_SEQUENCES))
        self._max_context = min(_max_context(loaded), arena.num_pages * arena.block_size)
        max_rows = self._sizes[-1]
        self._buffers = DecodeBuffers(
            max_rows,
            -(-self._max_context // arena.block_size),
            block_size=arena.block_size,
            device=loaded.device,
        )
        self._rows = StepRows.empty(len(self._linears), max_rows, loaded.device)
        self._graphs: dict[tuple[int, bool], Forward] = {}

    @torch.inference_mode()
    def record(self) -> None:
        """Captures all graphs, the largest first: the others share its memory."""
        started = time.perf_counter()
        for size in reversed(self._sizes):
            self._buffers.fill((), (), size)
            for has_lora in (True, False):
                self._graphs[size, has_lora] = self._record(partial(self._forward, size, has_lora=has_lora))
        log.info(
            "%d CUDA graphs for up to %d sequences: captured in %.1f s",
            len(self._graphs),
            self._sizes[-1],
            time.perf_counter() - started,
        )

    def add(self, revision: str, deltas: ResidentDeltas) -> None:
        """Makes the directory of an adapter whose rows are in the arena."""
        directory = None
        if not deltas.others:
            linears = [self._linear_rows(deltas, name) for name in self._linears]
            directory = make_directory(linears, self._loaded.device)
        self._directories[revision] = directory

    def forget(self, revision: str) -> None:
        self._directories.pop(revision, None)

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[torch.Tensor, Sequence[SequenceStep]] | None:
        """Logits [S, vocabulary], valid until the next step, and the sequences in their order; None if the
        step must be computed without a graph.
        """
        if not self._only_decodes(step):
            return None
        sequences = sorted(step.sequences, key=lambda sequence: sequence.adapters)
        tiles = self._lora_tiles(sequences)
        size = next(size for size in self._sizes if size >= len(sequences))
        if tiles is None or not self._buffers.fill(sequences, tiles, size):
            return None
        return self._graphs[size, bool(tiles)]()[: len(sequences)], sequences

    def _only_decodes(self, step: Step) -> bool:
        return len(step.sequences) <= self._sizes[-1] and all(
            len(each.token_ids) == 1
            and each.token_ids[0] != VIRTUAL_TOKEN
            and each.sampling is not None
            and each.start < self._max_context
            for each in step.sequences
        )

    def _lora_tiles(self, sequences: Sequence[SequenceStep]) -> list[LoraTile] | None:
        """Tiles of neighbours with the same adapters; None if an adapter does not fit."""
        tiles: list[LoraTile] = []
        for index, sequence in enumerate(sequences):
            own: list[tuple[Directory, float]] = []
            for revision, weight in sequence.adapters if sequence.start >= sequence.active_from else ():
                if revision in self._directories:
                    directory = self._directories[revision]
                    if directory is None:
                        return None
                    own.append((directory, weight))
            if sum(directory.width for directory, _ in own) > MAX_TILE_ROWS:
                return None
            adapters, start = tuple(own), index
            last = tiles[-1] if tiles else None
            if last and last.end == index and last.adapters == adapters and index - last.start < TOKENS:
                start = tiles.pop().start
            if adapters:
                tiles.append(LoraTile(start, index + 1, adapters))
        return tiles

    def _linear_rows(self, deltas: ResidentDeltas, name: str) -> LinearRows | None:
        delta = deltas.lora.get(name)
        if delta is None:
            return None
        a, b = (delta.parts[part].offsets_N for part in (Part.LORA_A, Part.LORA_B))
        return LinearRows(delta.scaling, a, b)

    def _forward(self, size: int, *, has_lora: bool) -> torch.Tensor:
        """The forward that is captured: logits of every row, [T, vocabulary]."""
        inputs = self._buffers.inputs(size)
        deltas = None
        if has_lora:
            rows = self._rows.of_tiles(size)
            gather(rows, inputs.lora_T4, inputs.pairs_P3)
            deltas = _StaticDeltas({name: rows.of_linear(at) for at, name in enumerate(self._linears)})
        num_splits = max_splits(self._max_context)
        context = StepContext(
            ops=self._loaded.ops,
            arena=self._arena,
            attention=TiledBatch(
                query_bounds=_UNKNOWN,
                context_lengths_Q=_UNKNOWN,
                block_tables_QM=inputs.block_tables[:, None],
                pages_T=inputs.pages_T,
                slots_T=inputs.slots_T,
                tiles=AttentionTiles(
                    split_N4=inputs.attention_T4,
                    unsplit_N4=inputs.attention_T4[:0],
                    num_splits=num_splits,
                    num_programs=min(num_splits, -(-_PROGRAMS // size)),
                ),
            ),
            deltas=deltas,
            head_deltas=None,
            attention_calls=[],
        )
        with step_context(context):
            output = self._loaded.model(
                input_ids=inputs.token_ids_T[None], position_ids=inputs.positions_T[None], use_cache=False
            )
        logits_TV: torch.Tensor = output.logits[0]
        return logits_TV


class _StaticDeltas(DeltaBatch):
    """LoRA rows in static buffers, which `gather` fills for each replay; nothing else changes."""

    def __init__(self, rows: dict[str, TiledRows]) -> None:
        super().__init__((), GatheredRows())
        self._rows.update(rows)


def scratch_bytes(loaded: LoadedModel, max_sequences: int) -> int:
    """About as many bytes as all graphs take on the device: buffers, logits of each, and scratch of one."""
    base, num_linears = loaded.base, len(loaded.base.of_kind(ModuleKind.LINEAR))
    config = loaded.model.config.get_text_config(decoder=True)
    sizes = _sizes(min(max_sequences, _MAX_SEQUENCES))
    rows, context = sizes[-1], _max_context(loaded)
    parts = parts_bytes(
        rows, max_splits(context), config.num_attention_heads, base.num_kv_heads, base.head_dim
    )
    shapes = [(shape.in_features, shape.out_features) for shape in base.of_kind(ModuleKind.LINEAR).values()]
    weight = max(math.prod(shape) for shape in shapes)  # dequantised for many rows
    logits = 2 * sum(sizes) * loaded.vocab_size
    gathered = StepRows.empty(num_linears, rows, torch.device("meta")).num_bytes
    tables = rows * context // block_size_for(base) * torch.int64.itemsize
    return parts + (weight + logits) * loaded.dtype.itemsize + gathered + tables


def _max_context(loaded: LoadedModel) -> int:
    """Tokens of the longest sequence. Virtual tokens come in addition to the model's context."""
    return 2 * loaded.context.tokens


def _sizes(largest: int) -> tuple[int, ...]:
    """The sizes of buckets: powers of two below the largest, and the largest."""
    return (*(1 << power for power in range((largest - 1).bit_length())), largest)


def cuda_record(device: torch.device) -> Record:
    """Captures CUDA graphs that share memory, since only one is replayed at a time."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # not typed in torch

    def record(forward: Forward) -> Forward:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Compiles kernels and allocates the libraries' workspaces, neither of which can be captured.
            forward()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy adapters during the capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = forward()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay

    return record
