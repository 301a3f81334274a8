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

from turret_adapters.spec import HeadTask
from turret_server.engine.step import VIRTUAL_TOKEN, SequenceStep, Step
from turret_server.kernels import AttentionBatch
from turret_server.model.deltas import DeltaBatch, GatheredRows, ResidentDeltas, Segment
from turret_server.model.encoder import Encoder


@dataclass(frozen=True, slots=True)
class Batch:
    """`logits_R` are the indices of the tokens whose logits are computed: the last of each sequence that
    samples, and all that have `targets`. `sampled` are the sequences that sample a token, `scored` those with
    targets and the rows of these; `sampled_S` are the rows of the sampled, or None if that are all.

    Segments of `deltas` index the batch, those of `head_deltas` index `logits_R`, or on an encoder the texts
    for SEQ_CLS heads. `virtual` lists the tokens
    that take an adapter's prompt embedding: (index, revision, row). `pooled` are the sequences whose hidden
    states are wanted, and where their tokens are. `token_type_ids_T` is None if all are 0.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    attention: AttentionBatch
    deltas: DeltaBatch | None
    head_deltas: DeltaBatch | None
    sampled: tuple[SequenceStep, ...]
    sampled_S: torch.Tensor | None
    scored: tuple[tuple[SequenceStep, slice], ...]
    logits_R: torch.Tensor
    virtual: tuple[tuple[int, str, int], ...]
    pooled: tuple[tuple[SequenceStep, slice], ...] = ()
    token_type_ids_T: torch.Tensor | None = None


def make_batch(
    step: Step,
    resident: Mapping[str, ResidentDeltas],
    gathered: GatheredRows,
    *,
    block_size: int,
    device: torch.device,
    encoder: Encoder | None = None,
) -> Batch:
    """Packs a step. `resident` are the adapters with rows in the arena, by revision; `encoder` is set if the
    model is one.
    """
    sequences = sorted(step.sequences, key=lambda sequence: sequence.adapters)
    starts_Q = np.array([sequence.start for sequence in sequences])
    counts_Q = np.array([len(sequence.token_ids) for sequence in sequences])
    bounds = np.concatenate([[0], np.cumsum(counts_Q)])
    token_ids_T = np.fromiter(chain.from_iterable(each.token_ids for each in sequences), np.int64, bounds[-1])
    block_tables_QM = _block_tables(sequences, -(-(starts_Q + counts_Q) // block_size))
    sequence_T = np.repeat(np.arange(len(sequences)), counts_Q)
    positions_T = np.arange(bounds[-1]) + (starts_Q - bounds[:-1])[sequence_T]
    samples_Q = np.array([sequence.sampling is not None for sequence in sequences])
    # Targets are those of all tokens, or of all but the last, which samples. For an encoder's pooler, a text
    # has one row.
    rows_Q = np.array(
        [
            len(each.token_ids) if each.targets else bool(each.sampling or (encoder and _classifies(each)))
            for each in sequences
        ]
    )
    row_bounds = np.concatenate([[0], np.cumsum(rows_Q)])

    def to_device(array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        token_ids_T=to_device(token_ids_T.clip(min=0)),
        positions_T=to_device(
            positions_T
            if encoder is None or encoder.padding_id is None
            else _after_padding(positions_T, token_ids_T, sequences, bounds, encoder.padding_id)
        ),
        attention=AttentionBatch(
            query_bounds=torch.from_numpy(bounds),
            context_lengths_Q=torch.from_numpy(starts_Q + counts_Q),
            block_tables_QM=to_device(block_tables_QM),
            pages_T=to_device(block_tables_QM[sequence_T, positions_T // block_size]),
            slots_T=to_device(positions_T % block_size),
        ),
        deltas=_deltas(_active(sequences, starts_Q, bounds), resident, gathered),
        head_deltas=_deltas(_active(sequences, starts_Q + counts_Q - rows_Q, row_bounds), resident, gathered),
        sampled=tuple(sequence for sequence in sequences if sequence.sampling),
        sampled_S=None if samples_Q.sum() == row_bounds[-1] else to_device(row_bounds[1:][samples_Q] - 1),
        scored=tuple(
            (each, slice(start, start + len(each.targets)))
            for each, start in zip(sequences, row_bounds.tolist(), strict=False)
            if each.targets
        ),
        logits_R=to_device(np.arange(row_bounds[-1]) + np.repeat(bounds[1:] - row_bounds[1:], rows_Q)),
        virtual=tuple(
            (int(index), sequences[sequence_T[index]].prompt or "", int(positions_T[index]))
            for index in np.flatnonzero(token_ids_T == VIRTUAL_TOKEN)
        ),
        pooled=tuple(
            (each, slice(start, start + len(each.token_ids)))
            for each, start in zip(sequences, bounds.tolist(), strict=False)
            if each.pooling
        ),
        token_type_ids_T=to_device(_token_types(sequences, bounds))
        if any(each.token_type_ids for each in sequences)
        else None,
    )


def _classifies(sequence: SequenceStep) -> bool:
    return sequence.pooling is not None and sequence.pooling.task is HeadTask.SEQ_CLS


def _token_types(sequences: list[SequenceStep], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    types_T = np.zeros(bounds[-1], np.int64)
    for each, start, end in zip(sequences, bounds, bounds[1:], strict=False):
        if each.token_type_ids:
            types_T[start:end] = each.token_type_ids
    return types_T


def _after_padding(
    positions_T: NDArray[np.int64],
    token_ids_T: NDArray[np.int64],
    sequences: list[SequenceStep],
    bounds: NDArray[np.int64],
    padding_id: int,
) -> NDArray[np.int64]:
    """Positions as RoBERTa numbers them: from after the padding token, which has its own number wherever it
    stands in a text; not beside virtual tokens, where the model sees embeddings only.
    """
    is_padding_T = token_ids_T == padding_id
    for each, start, end in zip(sequences, bounds, bounds[1:], strict=False):
        if each.prompt is not None:
            is_padding_T[start:end] = False
    before_T = np.cumsum(is_padding_T)
    counts = np.diff(bounds)
    before_T -= np.repeat((before_T - is_padding_T)[bounds[:-1]], counts)
    return np.where(is_padding_T, padding_id, positions_T + padding_id + 1 - before_T)


def _block_tables(sequences: list[SequenceStep], num_pages_Q: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pages of every context, [Q, M]; shorter ones are padded with page 0, which is not read."""
    tables_QM = np.zeros((len(sequences), num_pages_Q.max()), np.int64)
    for table_M, sequence, num_pages in zip(tables_QM, sequences, num_pages_Q, strict=True):
        table_M[:num_pages] = sequence.block_table[:num_pages]
    return tables_QM


_Active = tuple[int, int, tuple[tuple[str, float], ...]]


def _active(
    sequences: list[SequenceStep], positions_Q: NDArray[np.int64], bounds: NDArray[np.int64]
) -> Iterator[_Active]:
    """The range of rows in which the adapters of each sequence apply; it may be empty. The rows between two
    `bounds` are a sequence's, from this position on.
    """
    for sequence, position, start, end in zip(
        sequences, positions_Q.tolist(), bounds.tolist(), bounds[1:].tolist(), strict=False
    ):
        active = start + min(max(sequence.active_from - position, 0), end - start)
        yield active, end, sequence.adapters


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
