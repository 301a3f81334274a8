"""Builds the tensors of one forward from a step.

The tokens of all sequences lie end to end. Sequences with the same adapters are neighbours, so that LoRA rows
are applied once, to one segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from turret_server.engine.step import VIRTUAL_TOKEN, SequenceStep, Step
from turret_server.kernels import AttentionBatch
from turret_server.model.deltas import DeltaBatch, GatheredRows, ResidentDeltas, Segment


@dataclass(frozen=True, slots=True)
class Batch:
    """`sampled` are the sequences that sample a token, `last_S` the indices of their last tokens.

    Segments of `deltas` index the batch, those of `head_deltas` index `sampled`. `virtual` lists the tokens
    that take an adapter's prompt embedding: (index, revision, row).
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    attention: AttentionBatch
    deltas: DeltaBatch | None
    head_deltas: DeltaBatch | None
    sampled: tuple[SequenceStep, ...]
    last_S: torch.Tensor
    virtual: tuple[tuple[int, str, int], ...]


def make_batch(
    step: Step,
    resident: Mapping[str, ResidentDeltas],
    gathered: GatheredRows,
    *,
    block_size: int,
    device: torch.device,
) -> Batch:
    """Packs a step. `resident` are the adapters with rows in the arena, by revision."""
    sequences = sorted(step.sequences, key=lambda sequence: sequence.adapters)
    starts_Q = np.array([sequence.start for sequence in sequences])
    counts_Q = np.array([len(sequence.token_ids) for sequence in sequences])
    bounds = np.concatenate([[0], np.cumsum(counts_Q)])
    token_ids_T = np.fromiter(chain.from_iterable(each.token_ids for each in sequences), np.int64, bounds[-1])
    block_tables_QM = _block_tables(sequences, -(-(starts_Q + counts_Q) // block_size))
    sequence_T = np.repeat(np.arange(len(sequences)), counts_Q)
    positions_T = np.arange(bounds[-1]) + (starts_Q - bounds[:-1])[sequence_T]
    samples_Q = np.array([sequence.sampling is not None for sequence in sequences])
    sampled = tuple(sequence for sequence in sequences if sequence.sampling)

    def to_device(array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        token_ids_T=to_device(token_ids_T.clip(min=0)),
        positions_T=to_device(positions_T),
        attention=AttentionBatch(
            query_bounds=torch.from_numpy(bounds),
            context_lengths_Q=torch.from_numpy(starts_Q + counts_Q),
            block_tables_QM=to_device(block_tables_QM),
            pages_T=to_device(block_tables_QM[sequence_T, positions_T // block_size]),
            slots_T=to_device(positions_T % block_size),
        ),
        deltas=_deltas(_active(sequences, bounds.tolist()), resident, gathered),
        head_deltas=_deltas(_active_samples(sampled), resident, gathered),
        sampled=sampled,
        last_S=to_device(bounds[1:][samples_Q] - 1),
        virtual=tuple(
            (int(index), sequences[sequence_T[index]].prompt or "", int(positions_T[index]))
            for index in np.flatnonzero(token_ids_T == VIRTUAL_TOKEN)
        ),
    )


def _block_tables(sequences: list[SequenceStep], num_pages_Q: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pages of every context, [Q, M]; shorter ones are padded with page 0, which is not read."""
    tables_QM = np.zeros((len(sequences), num_pages_Q.max()), np.int64)
    for table_M, sequence, num_pages in zip(tables_QM, sequences, num_pages_Q, strict=True):
        table_M[:num_pages] = sequence.block_table[:num_pages]
    return tables_QM


_Active = tuple[int, int, tuple[tuple[str, float], ...]]


def _active(sequences: list[SequenceStep], bounds: list[int]) -> Iterator[_Active]:
    """The range of the batch in which the adapters of each sequence apply; it may be empty."""
    for sequence, start, end in zip(sequences, bounds, bounds[1:], strict=False):
        active = start + min(max(sequence.active_from - sequence.start, 0), end - start)
        yield active, end, sequence.adapters


def _active_samples(sampled: tuple[SequenceStep, ...]) -> Iterator[_Active]:
    for index, sequence in enumerate(sampled):
        last = sequence.start + len(sequence.token_ids) - 1
        yield index, index + (last >= sequence.active_from), sequence.adapters


def _deltas(
    active: Iterator[_Active], resident: Mapping[str, ResidentDeltas], gathered: GatheredRows
) -> DeltaBatch | None:
    """The segments. Adjacent ranges with the same adapters become one; an activated LoRA leaves gaps."""
    segments: list[Segment] = []
    last_adapters: tuple[tuple[str, float], ...] = ()
    for start, end, adapters in active:
        own = tuple((resident[revision], weight) for revision, weight in adapters if revision in resident)
        if not own or start == end:
            continue
        if segments and last_adapters == adapters and segments[-1].end == start:
            start = segments.pop().start  # noqa: PLW2901 (extends the segment)
        segments.append(Segment(start, end, own))
        last_adapters = adapters
    return DeltaBatch(segments, gathered) if segments else None
