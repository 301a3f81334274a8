"""Gathers the LoRA rows of a step's adapters on the GPU, for every linear at once.

A CUDA graph reads from fixed addresses. So each resident adapter has a directory, written once, and a step
passes only which directories its tokens use; a kernel in the graph copies their entries to the buffers that
the graph's LoRA kernels read. A step passes a few hundred bytes, however many linears and rows there are.

Shape suffixes: M linears, N tiles, P pairs of a tile's and an adapter, R rows, W rows of the largest linear
of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton.language as tl

from turret_server.kernels.gpu.jit import kernel
from turret_server.kernels.gpu.lora import TiledRows

# Rows of all adapters of a tile in one linear.
MAX_TILE_ROWS = 128

_COPIED_ROWS = 64  # that a program copies at a time


@dataclass(frozen=True, slots=True)
class LinearRows:
    """An adapter's rows in one linear: arena offsets of the rows of A and of B, int64 [R]."""

    scaling: float
    a_offsets_R: torch.Tensor
    b_offsets_R: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Directory:
    """An adapter's rows in every linear, int64 [M, 2 + 2 · width]: their number, the bits of the scaling in
    float64, offsets of A, offsets of B. `width` is the largest number of rows in a linear.
    """

    table_MX: torch.Tensor
    width: int


def make_directory(linears: Sequence[LinearRows | None], device: torch.device) -> Directory:
    """`linears` are in the model's order, None where the adapter has no rows."""
    found = [each for each in linears if each]
    width = max(len(each.a_offsets_R) for each in found)
    # The host waits for the device once, and not for each linear.
    offsets = (
        torch.cat([part for each in found for part in (each.a_offsets_R, each.b_offsets_R)]).cpu().numpy()
    )
    table_MX, done = np.zeros((len(linears), 2 + 2 * width), np.int64), 0
    for row_X, each in zip(table_MX, linears, strict=True):
        if each is not None:
            rank = len(each.a_offsets_R)
            row_X[:2] = rank, float_bits(each.scaling)
            row_X[2 : 2 + rank] = offsets[done : done + rank]
            row_X[2 + width : 2 + width + rank] = offsets[done + rank : done + 2 * rank]
            done += 2 * rank
    return Directory(torch.from_numpy(table_MX).to(device), width)


def float_bits(number: float) -> int:
    """The bits of a float64 as an int64."""
    return int(np.float64(number).view(np.int64))


@dataclass(frozen=True, slots=True)
class StepRows:
    """The output of `gather`: the rows of tile n in linear m begin at (m · N + n) · `MAX_TILE_ROWS`."""

    tiles_MN4: torch.Tensor
    a_offsets_R: torch.Tensor
    b_offsets_R: torch.Tensor
    weights_R: torch.Tensor

    @classmethod
    def empty(cls, num_linears: int, num_tiles: int, device: torch.device) -> StepRows:
        num_rows = num_linears * num_tiles * MAX_TILE_ROWS
        return cls(
            torch.zeros(num_linears, num_tiles, 4, dtype=torch.int32, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
            torch.zeros(num_rows, dtype=torch.float32, device=device),
        )

    @property
    def num_bytes(self) -> int:
        tensors = (self.tiles_MN4, self.a_offsets_R, self.b_offsets_R, self.weights_R)
        return sum(each.nbytes for each in tensors)

    def of_tiles(self, num_tiles: int) -> StepRows:
        """A view for fewer tiles, in the same memory."""
        num_linears = len(self.tiles_MN4)
        tiles = self.tiles_MN4.view(-1)[: num_linears * num_tiles * 4]
        return replace(self, tiles_MN4=tiles.view(num_linears, num_tiles, 4))

    def of_linear(self, index: int) -> TiledRows:
        return TiledRows(
            token_starts=(),
            token_ends=(),
            row_bounds=(0,),
            a_offsets_R=self.a_offsets_R,
            b_offsets_R=self.b_offsets_R,
            weights_R=self.weights_R,
            tiles_N4=self.tiles_MN4[index],
            max_rank=MAX_TILE_ROWS,
        )


def gather(into: StepRows, tiles_N4: torch.Tensor, pairs_P3: torch.Tensor) -> None:
    """Gathers the rows of every tile in every linear.

    `tiles_N4` are int32: first token, end of the tokens, first pair, end of the pairs. `pairs_P3` are int64:
    the address of a directory's table, its width, the bits of the adapter's weight in float64.
    """
    _gather[into.tiles_MN4.shape[:2]](
        into.tiles_MN4,
        into.a_offsets_R,
        into.b_offsets_R,
        into.weights_R,
        tiles_N4,
        pairs_P3,
        MOST=MAX_TILE_ROWS,
        COUNT=_COPIED_ROWS,
        num_warps=2,
    )


@kernel()
def _gather(
    tiles_MN4: tl.tensor,
    a_offsets_R: tl.tensor,
    b_offsets_R: tl.tensor,
    weights_R: tl.tensor,
    tiles_N4: tl.tensor,
    pairs_P3: tl.tensor,
    MOST: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    module, tile = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(tiles_N4 + tile * 4), tl.load(tiles_N4 + tile * 4 + 1)
    first, last = tl.load(tiles_N4 + tile * 4 + 2), tl.load(tiles_N4 + tile * 4 + 3)
    place = module.to(tl.int64) * tl.num_programs(1) + tile
    done = 0
    for pair in range(first, last):
        width = tl.load(pairs_P3 + pair * 3 + 1)
        directory = tl.load(pairs_P3 + pair * 3).to(tl.pointer_type(tl.int64)) + module * (2 + 2 * width)
        rank = tl.load(directory).to(tl.int32)
        weight = tl.load(pairs_P3 + pair * 3 + 2).to(tl.float64, bitcast=True)
        scale = (weight * tl.load(directory + 1).to(tl.float64, bitcast=True)).to(tl.float32)
        for above in range(0, rank, COUNT):
            row = above + tl.arange(0, COUNT)
            here = row < rank
            into = place * MOST + done + row
            tl.store(a_offsets_R + into, tl.load(directory + 2 + row, here, 0), here)
            tl.store(b_offsets_R + into, tl.load(directory + 2 + width + row, here, 0), here)
            tl.store(weights_R + into, tl.zeros((COUNT,), tl.float32) + scale, here)
        done += rank
    tl.store(tiles_MN4 + place * 4, start)
    # A tile without rows has no tokens.
    tl.store(tiles_MN4 + place * 4 + 1, tl.where(done > 0, end, start))
    tl.store(tiles_MN4 + place * 4 + 2, place * MOST)
    tl.store(tiles_MN4 + place * 4 + 3, place * MOST + done)
