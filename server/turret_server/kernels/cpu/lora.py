"""LoRA rows applied straight from the arena, to each token those of its segment.

A decode step reads each row once; a long segment reads its rows once per block of tokens. A token's result is
summed in one order, whatever else is in the step: a row's product with the token lane by lane over the
features, then the rows one after another, then the base's output.

For shape suffixes see `ops.py`. Arrays without letters are flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from turret_server.kernels.cpu.llvm.jit import compiled
from turret_server.kernels.cpu.llvm.pairs import PAIR_WIDTH, dot_rows
from turret_server.kernels.cpu.llvm.parallel import run_parallel
from turret_server.kernels.cpu.llvm.vectors import (
    LANES,
    SPAN,
    add,
    broadcast,
    fma_outer,
    load_masked,
    load_span,
    reduce_add,
    store_span,
    zeros,
)
from turret_server.kernels.ops import LoraRows

_BLOCK = 64  # tokens of a segment that one thread takes at a time
_MIN_COLUMNS = 4 * SPAN  # out features that one thread takes at a time, at least
_TILE = 4  # tokens and rows whose products are in registers together


class _Tile(NamedTuple):
    """Tokens start … end - 1 of a segment, with its rows first … last - 1."""

    start: int
    end: int
    first: int
    last: int


def lora_add(y_TO: Any, x_TI: Any, arena: Any, rows: LoraRows) -> None:
    """`Ops.lora_add` on arrays."""
    _lora_add(y_TO, x_TI, arena, _arrays(rows, y_TO.shape[1]))


@lru_cache(maxsize=2048)
def prefetch_offsets(rows: LoraRows, in_features: int, out_features: int, run: int) -> Any:
    """The rows, cut into runs of `run` elements: where each begins, in the order of reading."""
    starts = [(rows.a_offsets_R[:, None] + torch.arange(0, in_features, run)).flatten()]
    for (first, last), segment in zip(_columns(rows, out_features), _row_slices(rows), strict=True):
        offsets_R = rows.b_offsets_R[segment]
        starts.append((offsets_R[:, None] + torch.arange(0, last - first, run)).flatten())
    return torch.cat(starts).numpy()


def _columns(rows: LoraRows, out_features: int) -> Sequence[tuple[int, int]]:
    return rows.columns or ((0, out_features),) * len(rows.token_starts)


def _row_slices(rows: LoraRows) -> list[slice]:
    return [slice(*each) for each in pairwise(rows.row_bounds)]


@lru_cache(maxsize=2048)
def _arrays(rows: LoraRows, out_features: int) -> tuple[Any, ...]:
    """The kernel's view of the rows. Kept: a decode step of a 1.1 B model asks for that of 88 products."""
    columns = _columns(rows, out_features)
    # Segments that change the same out features have different tokens, and share shrunk columns.
    widest: dict[tuple[int, int], int] = {}
    for each, (first, last) in zip(columns, pairwise(rows.row_bounds), strict=True):
        widest[each] = max(widest.get(each, 0), last - first)
    begins = dict(zip(widest, accumulate(widest.values(), initial=0), strict=False))
    segments_S7 = np.array(
        (
            rows.token_starts,
            rows.token_ends,
            rows.row_bounds[:-1],
            rows.row_bounds[1:],
            *zip(*columns, strict=True),
            [begins[each] for each in columns],
        ),
        np.int64,
    ).T.copy()
    offsets = rows.a_offsets_R.numpy(), rows.b_offsets_R.numpy()
    return segments_S7, sum(widest.values()), *offsets, rows.weights_R.numpy()


@compiled
def _lora_add(y_TO: Any, x_TI: Any, arena: Any, rows: Any) -> None:
    segments_S7, num_shrunk, a_offsets_R, b_offsets_R, weights_R = rows
    shrunk_TR = np.empty((len(y_TO), num_shrunk), np.float32)
    run_parallel(_shrink, (shrunk_TR, x_TI, arena, (segments_S7, a_offsets_R, weights_R)))
    run_parallel(_expand, (y_TO, shrunk_TR, arena, (segments_S7, b_offsets_R)))


@compiled
def _shrink(worker: int, workers: int, arguments: Any) -> None:
    """This worker's part of shrunk[t, r] = weights[r] · (A_r · x[t]), with r counted from the segment's first
    row on, in its columns of `shrunk`.
    """
    shrunk_TR, x_TI, arena, (segments_S7, a_offsets_R, weights_R) = arguments
    item = 0
    for segment in range(len(segments_S7)):
        start, end, first, last, _, _, column = segments_S7[segment]
        for block in range(start, end, _BLOCK):
            for row in range(first, last, _TILE):
                if item % workers == worker:
                    tile = _Tile(block, min(block + _BLOCK, end), row, last)
                    target = shrunk_TR, column + row - first
                    _shrink_tile(target, x_TI, arena, (a_offsets_R, weights_R), tile)
                item += 1


@compiled
def _shrink_tile(target: Any, x_TI: Any, arena: Any, rows: Any, tile: Any) -> None:
    """Up to four rows, for a block of tokens; if there are fewer, the last is repeated. `target` is (shrunk,
    its first column), `rows` (offsets, weights).
    """
    shrunk_TR, column = target
    offsets_R, weights_R = rows
    first = tile.first
    count = min(_TILE, tile.last - first)
    four = (
        arena,
        (
            offsets_R[first],
            offsets_R[first + min(1, count - 1)],
            offsets_R[first + min(2, count - 1)],
            offsets_R[first + count - 1],
        ),
    )
    width = x_TI.shape[1]
    token = tile.start
    while token < tile.end:
        x = token * width
        if token + _TILE <= tile.end:
            xs = (x, x + width, x + 2 * width, x + 3 * width)
            products = _dots(zeros(16), (x_TI, xs), four, width)
            for i in range(_TILE):
                for j in range(count):
                    shrunk_TR[token + i, column + j] = weights_R[first + j] * products[i * _TILE + j]
            token += _TILE
        else:
            products_of_one = _dots(zeros(4), (x_TI, (x,)), four, width)
            for j in range(count):
                shrunk_TR[token, column + j] = weights_R[first + j] * products_of_one[j]
            token += 1


@compiled
def _dots(sums: Any, a: Any, b: Any, width: int) -> Any:
    """Every row of `a` times every row of `b`, as (array, starts), over `width` elements; `sums` are one zero
    vector a product.
    """
    full = width - width % PAIR_WIDTH
    for i in range(0, full, PAIR_WIDTH):
        sums = dot_rows(sums, a, b, i)
    for i in range(full, width, LANES):
        rest = width - i
        sums = fma_outer(sums, load_masked(a[0], a[1], i, rest), load_masked(b[0], b[1], i, rest))
    return reduce_add(sums)


@compiled
def _expand(worker: int, workers: int, arguments: Any) -> None:
    """This worker's part of y[t] += Σ_r shrunk[t, r] · B_r."""
    y_TO, shrunk_TR, arena, (segments_S7, b_offsets_R) = arguments
    item = 0
    for segment in range(len(segments_S7)):
        start, end, first, last, low, high, shrunk = segments_S7[segment]
        width = high - low
        columns = max(_MIN_COLUMNS, -(-width // (workers * SPAN)) * SPAN)
        for block in range(start, end, _BLOCK):
            for column in range(0, width, columns):
                if item % workers == worker:
                    tile = _Tile(block, min(end, block + _BLOCK), first, last)
                    for at in range(column, min(column + columns, width), SPAN):
                        rows = arena, b_offsets_R, at
                        _expand_span((y_TO, low + at, width - at), (shrunk_TR, shrunk), rows, tile)
                item += 1


@compiled
def _expand_span(target: Any, shrunk: Any, rows: Any, tile: Any) -> None:
    """One span of columns, for a block of tokens. `target` is (y, first column, at most so many), `shrunk`
    (array, the segment's first column), `rows` (arena, offsets, first element).
    """
    y_TO, column, count = target
    shrunk_TR, own = shrunk
    arena, offsets_R, first = rows
    width = y_TO.shape[1]
    rank = tile.last - tile.first
    token = tile.start
    while token < tile.end:
        into = token * width + column
        if token + _TILE <= tile.end:
            sums = zeros(16)
            for row in range(rank):
                scales = (
                    broadcast(shrunk_TR[token, own + row]),
                    broadcast(shrunk_TR[token + 1, own + row]),
                    broadcast(shrunk_TR[token + 2, own + row]),
                    broadcast(shrunk_TR[token + 3, own + row]),
                )
                sums = fma_outer(sums, scales, load_span(arena, offsets_R[tile.first + row] + first, count))
            _add_to(y_TO, into, sums[0:4], count)
            _add_to(y_TO, into + width, sums[4:8], count)
            _add_to(y_TO, into + 2 * width, sums[8:12], count)
            _add_to(y_TO, into + 3 * width, sums[12:16], count)
            token += _TILE
        else:
            sums_of_one = zeros(4)
            for row in range(rank):
                scale = (broadcast(shrunk_TR[token, own + row]),)
                b = load_span(arena, offsets_R[tile.first + row] + first, count)
                sums_of_one = fma_outer(sums_of_one, scale, b)
            _add_to(y_TO, into, sums_of_one, count)
            token += 1


@compiled
def _add_to(y_TO: Any, at: int, sums: Any, count: int) -> None:
    y = load_span(y_TO, at, count)
    y = (add(y[0], sums[0]), add(y[1], sums[1]), add(y[2], sums[2]), add(y[3], sums[3]))
    store_span(y_TO, at, y, count)
