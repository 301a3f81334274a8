"""From a step's plain data to the tensors of one forward.

The tokens of all sequences lie end to end. Sequences of one adapter lie next to each other, so that its
LoRA rows are applied once, to one segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch

from turret_server.engine.step import VIRTUAL_TOKEN, SequenceStep, Step
from turret_server.kernels import AttentionBatch
from turret_server.model.lora import LoraBatch, ResidentRows


@dataclass(frozen=True, slots=True)
class Batch:
    """`sampled` are the sequences that want a token, `last_S` where in the batch their last token is.

    `virtual` says which tokens take an adapter's prompt embedding: (index, revision, row).
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    attention: AttentionBatch
    lora: LoraBatch | None
    sampled: tuple[SequenceStep, ...]
    last_S: torch.Tensor
    virtual: tuple[tuple[int, str, int], ...]


def make_batch(
    step: Step, rows: Mapping[str, Mapping[str, ResidentRows]], *, block_size: int, device: torch.device
) -> Batch:
    """Pack a step. `rows` are the LoRA rows of the resident adapters, by revision and linear."""
    sequences = sorted(step.sequences, key=lambda sequence: sequence.revision or "")
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
    positions_T = torch.tensor(positions, device=device)
    return Batch(
        token_ids_T=torch.tensor(token_ids, device=device).clamp_(min=0),
        positions_T=positions_T,
        attention=AttentionBatch(
            query_bounds=tuple(bounds),
            context_lengths=tuple(sequence.start + len(sequence.token_ids) for sequence in sequences),
            block_tables=tuple(
                torch.tensor(
                    sequence.block_table[: -(-(sequence.start + len(sequence.token_ids)) // block_size)],
                    device=device,
                )
                for sequence in sequences
            ),
            pages_T=torch.tensor(pages, device=device),
            slots_T=positions_T % block_size,
        ),
        lora=_lora(sequences, bounds, rows),
        sampled=tuple(sequence for sequence in sequences if sequence.sampling),
        last_S=torch.tensor(
            [end - 1 for sequence, end in ends if sequence.sampling], device=device, dtype=torch.long
        ),
        virtual=tuple(
            (bounds[index] + offset, sequence.revision or "", sequence.start + offset)
            for index, sequence in enumerate(sequences)
            for offset, token in enumerate(sequence.token_ids)
            if token == VIRTUAL_TOKEN
        ),
    )


def _lora(
    sequences: list[SequenceStep], bounds: list[int], rows: Mapping[str, Mapping[str, ResidentRows]]
) -> LoraBatch | None:
    segments = []
    for revision, group in groupby(range(len(sequences)), key=lambda index: sequences[index].revision):
        indices = list(group)
        if revision in rows:
            segments.append((bounds[indices[0]], bounds[indices[-1] + 1], rows[revision]))
    return LoraBatch(segments) if segments else None
