"""The inputs of a replayed decode step, in buffers with fixed addresses.

Shape suffixes: T rows of the bucket, P pairs of a LoRA tile and an adapter; others as in `kernels/ops.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from turret_server.engine.step import SequenceStep
from turret_server.kernels.gpu.rows import Directory, float_bits

# Pairs of a LoRA tile and an adapter, for each row of a bucket.
_PAIRS = 8


@dataclass(frozen=True, slots=True)
class LoraTile:
    """Consecutive rows with the same adapters, each with a weight."""

    start: int
    end: int
    adapters: tuple[tuple[Directory, float], ...]


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Views of one int64 buffer.

    `attention_T4` and `lora_T4` are int32 tiles, as in `AttentionTiles` and `rows.gather`; `pairs_P3` as in
    `rows.gather`. `block_tables` are those of all sequences end to end, and last, so that a copy can end with
    the used part.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    pages_T: torch.Tensor
    slots_T: torch.Tensor
    attention_T4: torch.Tensor
    lora_T4: torch.Tensor
    pairs_P3: torch.Tensor
    block_tables: torch.Tensor

    @classmethod
    def of(cls, buffer: torch.Tensor, num_rows: int) -> DecodeInputs:
        sizes = [*[num_rows] * 4, 2 * num_rows, 2 * num_rows, 3 * _PAIRS * num_rows]
        *plain, attention, lora, pairs, block_tables = buffer.split_with_sizes(
            [*sizes, len(buffer) - sum(sizes)]
        )
        token_ids_T, positions_T, pages_T, slots_T = plain
        return cls(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            pages_T=pages_T,
            slots_T=slots_T,
            attention_T4=attention.view(torch.int32).view(num_rows, 4),
            lora_T4=lora.view(torch.int32).view(num_rows, 4),
            pairs_P3=pairs.view(-1, 3),
            block_tables=block_tables,
        )


class DecodeBuffers:
    """The inputs on the device, and on the host, where they are written before one copy transfers them.

    The host's buffer may be written again once the step has ended, see `Streams.step`.
    """

    def __init__(self, max_rows: int, max_pages: int, *, block_size: int, device: torch.device) -> None:
        """For up to `max_rows` sequences of up to `max_pages` pages each."""
        size = (8 + 3 * _PAIRS + max_pages) * max_rows
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        self._block_size = block_size

    def inputs(self, num_rows: int) -> DecodeInputs:
        """The inputs on the device for a bucket of this size. All buckets share the buffer."""
        return DecodeInputs.of(self._device, num_rows)

    def fill(self, sequences: Sequence[SequenceStep], tiles: Sequence[LoraTile], num_rows: int) -> bool:
        """Writes a step, padded to `num_rows`, and starts its copy; False if it has too many adapters."""
        into = DecodeInputs.of(self._host, num_rows)
        pairs = [
            (directory.table_MX.data_ptr(), directory.width, float_bits(weight))
            for tile in tiles
            for directory, weight in tile.adapters
        ]
        if len(pairs) > len(into.pairs_P3):
            return False
        count = len(sequences)
        starts = np.fromiter((each.start for each in sequences), np.int64, count)
        num_pages = starts // self._block_size + 1
        ends = num_pages.cumsum()
        total = int(num_pages.sum())
        tables = into.block_tables.numpy()
        tables[:total] = np.fromiter(
            chain.from_iterable(
                each.block_table[:pages] for each, pages in zip(sequences, num_pages.tolist(), strict=True)
            ),
            np.int64,
            total,
        )
        for part, values, padding in (
            (into.token_ids_T, [each.token_ids[0] for each in sequences], 0),
            (into.positions_T, starts, 0),
            (into.pages_T, tables[ends - 1], -1),
            (into.slots_T, starts % self._block_size, 0),
            (into.attention_T4, _attention_tiles(ends - num_pages, starts), 0),
            (into.lora_T4, _lora_tiles(tiles), 0),
            (into.pairs_P3, np.array(pairs, np.int64).reshape(-1, 3), 0),
        ):
            array = part.numpy()
            array[: len(values)] = values
            array[len(values) :] = padding
        used = len(self._host) - len(tables) + total
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        return True


def _attention_tiles(tables: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """One token each, [S, 4]; the index of a sequence is where its block table begins."""
    return np.stack((tables, np.arange(len(starts)), np.ones_like(starts), starts), axis=1)


def _lora_tiles(tiles: Sequence[LoraTile]) -> np.ndarray:
    ends = np.cumsum([len(tile.adapters) for tile in tiles], dtype=np.int64)
    begins = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    bounds = np.array([(tile.start, tile.end) for tile in tiles], np.int64).reshape(-1, 2)
    return np.column_stack((bounds, begins, ends))
