"""LoRA rows applied straight from the arena, to each token those of its segment (Punica's SGMV,
arXiv 2310.18547, with ragged ranks and scattered rows).

The work is a table of tiles of up to 16 tokens of one segment. A token's result does not depend on its tile:
its product with a row is summed over the in features in parts that depend on their number alone, then over
the rows in order, then with the base's output.

Nothing here synchronises with the device. A CUDA graph can be captured around it with `TiledRows` in static
buffers, whose unused tiles have no tokens.

For shape suffixes see `ops.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from turret_server.kernels.gpu.jit import EXACT, dot_type, inlined, kernel, to_device
from turret_server.kernels.ops import LoraRows

TOKENS = 16  # of a tile
_ROWS = 16  # of one tensor core product
_MAX_GROUPS = 4  # of rows with programs of their own; these go through further groups in turn
_SHRUNK = 128  # in features that a program loads at a time
_EXPANDED = 128  # out features of a program
_PER_PART = 512  # in features of one part of a sum
_MAX_PARTS = 16


@dataclass(frozen=True, slots=True, eq=False)
class TiledRows(LoraRows):
    """Rows whose tiles are on the device already; the segments on the host are not read.

    `tiles_N4` are int32: first token, end of the tokens, first row, end of the rows. A tile has at most 16
    tokens and `max_rank` rows.
    """

    tiles_N4: torch.Tensor
    max_rank: int


def lora_add(y_TO: torch.Tensor, x_TI: torch.Tensor, arena: torch.Tensor, rows: LoraRows) -> None:
    """See `ops.Ops`."""
    if isinstance(rows, TiledRows):
        add_tiles(y_TO, x_TI, arena, rows.tiles_N4, rows.max_rank, rows)
        return
    tiles_N4, max_rank = _tiles(rows.token_starts, rows.token_ends, rows.row_bounds, x_TI.device)
    if len(tiles_N4):
        add_tiles(y_TO, x_TI, arena, tiles_N4, max_rank, rows)


@lru_cache(maxsize=1 << 12)
def _tiles(
    token_starts: tuple[int, ...],
    token_ends: tuple[int, ...],
    row_bounds: tuple[int, ...],
    device: torch.device,
) -> tuple[torch.Tensor, int]:
    """The tiles, and the largest number of rows of one.

    Cached: they are the same for every layer, and for every decode step until the batch changes. Experts have
    tiles of their own, hundreds in a layer, among which those of the layer's linears must stay.
    """
    starts, ends, bounds = (np.array(each, np.int64) for each in (token_starts, token_ends, row_bounds))
    ranks = np.diff(bounds)
    counts = np.where(ranks > 0, -(-(ends - starts) // TOKENS), 0)
    segment = np.repeat(np.arange(len(counts)), counts)
    inside = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[segment] + inside * TOKENS
    last = np.minimum(first + TOKENS, ends[segment])
    tiles_N4 = np.stack((first, last, bounds[segment], bounds[segment + 1]), axis=1)
    return to_device(tiles_N4, device), int(ranks.max(initial=0))


def add_tiles(
    y_TO: torch.Tensor,
    x_TI: torch.Tensor,
    arena: torch.Tensor,
    tiles_N4: torch.Tensor,
    max_rank: int,
    rows: LoraRows,
) -> None:
    """`lora_add` for tiles as in `TiledRows`; only the tensors of `rows` are read."""
    assert y_TO.is_contiguous()
    x_TI = x_TI.contiguous()
    num_tokens, num_in = x_TI.shape
    num_out = y_TO.shape[1]
    parts = min(_MAX_PARTS, triton.next_power_of_2(triton.cdiv(num_in, _PER_PART)))
    shrunk_PTR = torch.empty(parts, num_tokens, max_rank, dtype=torch.float32, device=x_TI.device)
    groups = min(_MAX_GROUPS, triton.cdiv(max_rank, _ROWS))
    _shrink[(len(tiles_N4), groups, parts)](
        shrunk_PTR,
        x_TI,
        arena,
        tiles_N4,
        rows.a_offsets_R,
        rows.weights_R,
        num_tokens,
        num_in,
        max_rank,
        TOKENS=TOKENS,
        ROWS=_ROWS,
        COLUMNS=_SHRUNK,
        DOT=dot_type(x_TI.dtype),
        num_warps=4,
        num_stages=3,
    )
    _expand[(len(tiles_N4), triton.cdiv(num_out, _EXPANDED))](
        y_TO,
        shrunk_PTR,
        arena,
        tiles_N4,
        rows.b_offsets_R,
        num_tokens,
        num_out,
        max_rank,
        TOKENS=TOKENS,
        ROWS=_ROWS,
        COLUMNS=_EXPANDED,
        PARTS=parts,
        PRECISION=EXACT if x_TI.dtype == torch.float32 else "tf32",
        num_warps=4,
    )


@kernel("num_tokens", "max_rank")
def _shrink(
    shrunk_PTR: tl.tensor,
    x_TI: tl.tensor,
    arena: tl.tensor,
    tiles_N4: tl.tensor,
    a_offsets_R: tl.tensor,
    weights_R: tl.tensor,
    num_tokens: tl.tensor,
    num_in: tl.tensor,
    max_rank: tl.tensor,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """shrunk[p, t, r] = weights[r] · (A_r · x[t]) over one part of the in features, r from the tile's first
    row on.
    """
    tile = tiles_N4 + tl.program_id(0) * 4
    start, end, first, last = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if start >= end:
        return
    part = tl.program_id(2)
    width = tl.cdiv(tl.cdiv(num_in, COLUMNS), tl.num_programs(2)) * COLUMNS
    low, high = part * width, tl.minimum((part + 1) * width, num_in)
    token = start + tl.arange(0, TOKENS)
    x_in = x_TI + token.to(tl.int64)[:, None] * num_in
    has_token = token[:, None] < end
    for above in range(tl.program_id(1) * ROWS, last - first, tl.num_programs(1) * ROWS):
        row = above + tl.arange(0, ROWS)
        has_row = first + row < last
        offsets = tl.load(a_offsets_R + first + row, has_row, 0)
        # A row can begin at any element of the arena. If all begin at multiples of 8, loads are wide.
        if tl.max(offsets % 8, 0) == 0:
            a_in = arena + tl.multiple_of(offsets, 8)[None, :]
            product = _dots(x_in, a_in, has_token, has_row, low, high, TOKENS, ROWS, COLUMNS, DOT)
        else:
            a_in = arena + offsets[None, :]
            product = _dots(x_in, a_in, has_token, has_row, low, high, TOKENS, ROWS, COLUMNS, DOT)
        product *= tl.load(weights_R + first + row, has_row, 0.0)[None, :]
        into = shrunk_PTR + (part * num_tokens + token[:, None]).to(tl.int64) * max_rank + row[None, :]
        tl.store(into, product, has_token & has_row[None, :])


@inlined
def _dots(
    x_in: tl.tensor,
    a_in: tl.tensor,
    has_token: tl.tensor,
    has_row: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """Products of tokens and rows over in features low … high - 1."""
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(low, high, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < high
        x = tl.load(x_in + column[None, :], has_token & inside[None, :], 0.0)
        a = tl.load(a_in + column[:, None], inside[:, None] & has_row[None, :], 0.0)
        total = tl.dot(x.to(DOT), a.to(DOT), total, input_precision=EXACT)
    return total


@kernel("num_tokens", "max_rank")
def _expand(
    y_TO: tl.tensor,
    shrunk_PTR: tl.tensor,
    arena: tl.tensor,
    tiles_N4: tl.tensor,
    b_offsets_R: tl.tensor,
    num_tokens: tl.tensor,
    num_out: tl.tensor,
    max_rank: tl.tensor,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """y[t] += Σ_r shrunk[t, r] · B_r for some columns."""
    tile = tiles_N4 + tl.program_id(0) * 4
    start, end, first, last = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if start >= end:
        return
    token = start + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_out
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for above in range(0, last - first, ROWS):
        row = above + tl.arange(0, ROWS)
        has_row = first + row < last
        here = (token[:, None] < end) & has_row[None, :]
        scale = tl.zeros((TOKENS, ROWS), tl.float32)
        for part in tl.static_range(PARTS):
            place = (part * num_tokens + token[:, None]).to(tl.int64) * max_rank + row[None, :]
            scale += tl.load(shrunk_PTR + place, here, 0.0)
        offsets = tl.load(b_offsets_R + first + row, has_row, 0)
        there = has_row[:, None] & inside[None, :]
        if tl.max(offsets % 8, 0) == 0:
            b = tl.load(arena + tl.multiple_of(offsets, 8)[:, None] + column[None, :], there, 0.0)
        else:
            b = tl.load(arena + offsets[:, None] + column[None, :], there, 0.0)
        total = tl.dot(scale, b.to(tl.float32), total, input_precision=PRECISION)
    into = y_TO + token.to(tl.int64)[:, None] * num_out + column[None, :]
    here = (token[:, None] < end) & inside[None, :]
    tl.store(into, tl.load(into, here, 0.0).to(tl.float32) + total, here)
