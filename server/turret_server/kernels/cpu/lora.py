"""LoRA rows applied straight from the arena, each token with those of its segment.

A decode step reads each row once; a long segment reads its rows once per block of tokens. What a token
gets is summed in one order, whatever else is in the step: a row's product with a token lane by lane over
the features, then the rows of an output one after the other, then what the output was.

For the letters in tensor names see `ops.py`. Arrays without letters are flat.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from turret_server.kernels.cpu.jit import compiled
from turret_server.kernels.cpu.lanes import add, add_outer, splat, zeros
from turret_server.kernels.cpu.parallel import on_all_threads
from turret_server.kernels.cpu.vector import SPAN, dots, load_span, store_span
from turret_server.kernels.ops import LoraRows

_BLOCK = 64  # tokens of a segment that one thread takes at a time
_MIN_COLUMNS = 4 * SPAN  # of the output, likewise
_TILE = 4  # tokens and rows whose products are in registers together


def lora_add(y_TO: Any, x_TI: Any, arena: Any, rows: LoraRows) -> None:
    """See `ops.Ops`; of arrays."""
    _lora_add(y_TO, x_TI, arena, *_arrays(rows))


@lru_cache(maxsize=2048)
def runs(rows: LoraRows, in_features: int, out_features: int, run: int) -> Any:
    """Where the runs of so many numbers begin that the rows consist of, in the order of reading."""
    starts = [
        (offsets_R[:, None] + torch.arange(0, width, run)).flatten()
        for offsets_R, width in ((rows.a_offsets_R, in_features), (rows.b_offsets_R, out_features))
    ]
    return torch.cat(starts).numpy()


@lru_cache(maxsize=2048)
def _arrays(rows: LoraRows) -> tuple[Any, ...]:
    """What the kernel takes of the rows: 154 linears of a model of 1.1 B ask again in every step."""
    segments_4S = np.array(
        (rows.token_starts, rows.token_ends, rows.row_bounds[:-1], rows.row_bounds[1:]), np.int64
    )
    return segments_4S, rows.a_offsets_R.numpy(), rows.b_offsets_R.numpy(), rows.weights_R.numpy()


@compiled
def _lora_add(
    y_TO: Any,
    x_TI: Any,
    arena: Any,
    segments_4S: Any,
    a_offsets_R: Any,
    b_offsets_R: Any,
    weights_R: Any,
) -> None:
    max_rank = 0
    for segment in range(segments_4S.shape[1]):
        max_rank = max(max_rank, segments_4S[3, segment] - segments_4S[2, segment])
    shrunk = np.empty(len(y_TO) * max_rank, np.float32)
    on_all_threads(_shrink, (shrunk, max_rank, x_TI, arena, segments_4S, a_offsets_R, weights_R))
    on_all_threads(_expand, (shrunk, max_rank, y_TO, arena, segments_4S, b_offsets_R))


@compiled
def _shrink(
    worker: int,
    workers: int,
    shrunk: Any,
    max_rank: int,
    x_TI: Any,
    arena: Any,
    segments_4S: Any,
    a_offsets_R: Any,
    weights_R: Any,
) -> None:
    """This worker's part of shrunk[t, r] = weights[r] · (A_r · x[t]), r from the segment's first on."""
    item = 0
    for segment in range(segments_4S.shape[1]):
        start, end, first, last = segments_4S[:, segment]
        for block in range(start, end, _BLOCK):
            for row in range(first, last, _TILE):
                if item % workers == worker:
                    into = block * max_rank + row - first
                    tokens = min(_BLOCK, end - block)
                    _shrink_rows(
                        shrunk[into:],
                        max_rank,
                        x_TI,
                        block,
                        tokens,
                        arena,
                        a_offsets_R[row:last],
                        weights_R[row:last],
                    )
                item += 1


@compiled
def _shrink_rows(
    shrunk: Any,
    max_rank: int,
    x_TI: Any,
    start: int,
    tokens: int,
    arena: Any,
    offsets: Any,
    weights: Any,
) -> None:
    """The first four of some rows, for a block of tokens. Where rows run out, the last is taken again."""
    rows = min(_TILE, len(offsets))
    four = (offsets[0], offsets[min(1, rows - 1)], offsets[min(2, rows - 1)], offsets[rows - 1])
    width = x_TI.shape[1]
    token = 0
    while token < tokens:
        x = (start + token) * width
        if token + _TILE <= tokens:
            xs = (x, x + width, x + 2 * width, x + 3 * width)
            products = dots(zeros(16), x_TI, xs, arena, four, width)
            for i in range(_TILE):
                for j in range(rows):
                    shrunk[(token + i) * max_rank + j] = weights[j] * products[i * _TILE + j]
            token += _TILE
        else:
            products_of_one = dots(zeros(4), x_TI, (x,), arena, four, width)
            for j in range(rows):
                shrunk[token * max_rank + j] = weights[j] * products_of_one[j]
            token += 1


@compiled
def _expand(
    worker: int,
    workers: int,
    shrunk: Any,
    max_rank: int,
    y_TO: Any,
    arena: Any,
    segments_4S: Any,
    b_offsets_R: Any,
) -> None:
    """This worker's part of y[t] += Σ_r shrunk[t, r] · B_r."""
    width = y_TO.shape[1]
    columns = max(_MIN_COLUMNS, -(-width // (workers * SPAN)) * SPAN)
    item = 0
    for segment in range(segments_4S.shape[1]):
        start, end, first, last = segments_4S[:, segment]
        for block in range(start, end, _BLOCK):
            for column in range(0, width, columns):
                if item % workers == worker:
                    for at in range(column, min(column + columns, width), SPAN):
                        _expand_span(
                            shrunk,
                            max_rank,
                            y_TO,
                            block,
                            min(end, block + _BLOCK),
                            at,
                            arena,
                            b_offsets_R[first:last],
                        )
                item += 1


@compiled
def _expand_span(
    shrunk: Any, max_rank: int, y_TO: Any, start: int, end: int, column: int, arena: Any, offsets: Any
) -> None:
    """One span of columns, for a block of tokens."""
    width = y_TO.shape[1]
    count = width - column
    token = start
    while token < end:
        s = token * max_rank
        into = token * width + column
        if token + _TILE <= end:
            sums = zeros(16)
            for row in range(len(offsets)):
                scales = (
                    splat(shrunk[s + row]),
                    splat(shrunk[s + row + max_rank]),
                    splat(shrunk[s + row + 2 * max_rank]),
                    splat(shrunk[s + row + 3 * max_rank]),
                )
                sums = add_outer(sums, scales, load_span(arena, offsets[row] + column, count))
            _add_to(y_TO, into, sums[0:4], count)
            _add_to(y_TO, into + width, sums[4:8], count)
            _add_to(y_TO, into + 2 * width, sums[8:12], count)
            _add_to(y_TO, into + 3 * width, sums[12:16], count)
            token += _TILE
        else:
            sums_of_one = zeros(4)
            for row in range(len(offsets)):
                scale = (splat(shrunk[s + row]),)
                sums_of_one = add_outer(sums_of_one, scale, load_span(arena, offsets[row] + column, count))
            _add_to(y_TO, into, sums_of_one, count)
            token += 1


@compiled
def _add_to(y_TO: Any, at: int, sums: Any, count: int) -> None:
    y = load_span(y_TO, at, count)
    y = (add(y[0], sums[0]), add(y[1], sums[1]), add(y[2], sums[2]), add(y[3], sums[3]))
    store_span(y_TO, at, y, count)
