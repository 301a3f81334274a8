"""From a step's plain data to the tensors of one forward.

The tokens of all sequences lie end to end. Sequences of one adapter lie next to each other, so that its
LoRA rows are applied once, to one segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from turret_server.engine.step import VIRTUAL_TOKEN, SequenceStep, Step
from turret_server.kernels import AttentionBatch
from turret_server.model.deltas import DeltaBatch, GatheredRows, ResidentDeltas, Segment


@dataclass(frozen=True, slots=True)
class Batch:
    """`sampled` are the sequences that want a token, `last_S` where in the batch their last token is.

    `deltas` are in places of the batch, `head_deltas` in places of `sampled`. `virtual` says which tokens
    take an adapter's prompt embedding: (index, revision, row).
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
    """Pack a step. `resident` are the adapters in the arena that have rows, by revision."""
    sequences = sorted(step.sequences, key=lambda sequence: sequence.adapters)
    bounds = [0]
    for sequence in sequences:
        bounds.append(bounds[-1] + len(sequence.token_ids))
    token_ids = [token for sequence in sequences for token in sequence.token_ids]
    positions = [
        position
        for sequence in sequences
        for position in range(sequence.start, sequence.start + len(sequence.token_ids))
    ]
    pages = [
        sequence.block_table[position // block_size]
        for sequence in sequences
        for position in range(sequence.start, sequence.start + len(sequence.token_ids))
    ]
    ends = list(zip(sequences, bounds[1:], strict=True))
    sampled = tuple(sequence for sequence in sequences if sequence.sampling)
    positions_T = torch.tensor(positions, device=device)
    return Batch(
        token_ids_T=torch.tensor(token_ids, device=device).clamp_(min=0),
        positions_T=positions_T,
        attention=AttentionBatch(
            query_bounds=torch.tensor(bounds),
            context_lengths_Q=torch.tensor([_context_length(sequence) for sequence in sequences]),
            block_tables_QM=_block_tables(sequences, block_size).to(device),
            pages_T=torch.tensor(pages, device=device),
            slots_T=positions_T % block_size,
        ),
        deltas=_deltas(_active(sequences, bounds), resident, gathered),
        head_deltas=_deltas(_active_samples(sampled), resident, gathered),
        sampled=sampled,
        last_S=torch.tensor(
            [end - 1 for sequence, end in ends if sequence.sampling], device=device, dtype=torch.long
        ),
        virtual=tuple(
            (bounds[index] + offset, sequence.prompt or "", sequence.start + offset)
            for index, sequence in enumerate(sequences)
            for offset, token in enumerate(sequence.token_ids)
            if token == VIRTUAL_TOKEN
        ),
    )


def _context_length(sequence: SequenceStep) -> int:
    return sequence.start + len(sequence.token_ids)


def _block_tables(sequences: list[SequenceStep], block_size: int) -> torch.Tensor:
    """The pages of every context, [Q, M]; a shorter one is filled up with page 0, which it never reads."""
    tables = [
        torch.tensor(sequence.block_table[: -(-_context_length(sequence) // block_size)])
        for sequence in sequences
    ]
    return torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)


_Active = tuple[int, int, tuple[tuple[str, float], ...]]


def _active(sequences: list[SequenceStep], bounds: list[int]) -> Iterator[_Active]:
    """From where to where in the batch the adapters of each sequence apply."""
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
    """Neighbours with the same adapters become one segment."""
    segments: list[Segment] = []
    names: tuple[tuple[str, float], ...] = ()
    for start, end, adapters in active:
        own = tuple((resident[revision], weight) for revision, weight in adapters if revision in resident)
        if not own or start == end:
            continue
        if segments and names == adapters and segments[-1].end == start:
            start = segments.pop().start  # noqa: PLW2901 (the segment goes on)
        segments.append(Segment(start, end, own))
        names = adapters
    return DeltaBatch(segments, gathered.of(segments)) if segments else None
