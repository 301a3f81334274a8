"""Attention over pages, for decode and prefill alike.

Threads share the work by sequence, key-value head and rows; a row is one query head of one token. Four rows
go through the context together, so that keys and values are read once for all of them. Keys are transposed
first, so that the lanes of a vector are neighbouring positions and scores need no sum across lanes. A row is
summed in the order of its positions, whatever step and chunk it is computed in.

For shape suffixes see `ops.py`. Arrays without letters are flat.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from turret_server.kernels.cpu.llvm.jit import as_array, as_rows, compiled
from turret_server.kernels.cpu.llvm.pairs import (
    HAS_BF16_DOT,
    PAIR_WIDTH,
    dot_broadcast,
    load_pairs,
    transpose,
)
from turret_server.kernels.cpu.llvm.parallel import run_parallel
from turret_server.kernels.cpu.llvm.vectors import (
    LANES,
    SPAN,
    add,
    broadcast,
    divide,
    exp,
    fma_outer,
    load,
    load_span,
    maximum,
    multiply,
    prefetch_line,
    reduce_add,
    reduce_max,
    store,
    store_span,
    subtract,
    zeros,
)
from turret_server.kernels.ops import AttentionBatch, AttentionParams

_ROWS = 64  # that one thread takes at a time
_TILE = 4  # rows, and vectors of positions, whose products are in registers together
_POSITIONS = _TILE * LANES
# Positions between the transposition and the prefetch: pages defeat the CPU's own prefetcher.
_PREFETCH_AHEAD = 32
_PREFETCH_LINE = 32  # elements, at most those of a cache line
_NO_WINDOW = 1 << 40
_MIN_TANH = np.float32(-40)  # tanh is −1 from there down, and exp(−2x) stays finite
_NO_SINKS = np.empty(0, np.float32)
# Arrays of the dtype that keys are transposed to.
_BFLOAT16, _FLOAT32 = np.empty(0, np.uint16), np.empty(0, np.float32)


class _Pages(NamedTuple):
    """Keys and values of one layer. Position p of a sequence lies in page block_table[p // block_size]."""

    kv: Any
    page_stride: int
    block_size: int
    num_kv_heads: int


class _Params(NamedTuple):
    """`AttentionParams` as numbers; a query sees `ahead` later tokens. `key_dtype` is an empty array of the
    dtype of transposed keys.
    """

    scaling: Any
    window: int
    ahead: int
    softcap: Any
    sinks_H: Any
    key_dtype: Any


def write_kv(
    kv_P2BKD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, batch: AttentionBatch
) -> None:
    """See `ops.Ops`."""
    new = as_rows(key_TKD.flatten(1)), as_rows(value_TKD.flatten(1))
    _write_kv(_flat(kv_P2BKD), kv_P2BKD.stride()[:2], new, key_TKD[0].numel(), _arrays(batch)[3:])


def paged_attention(
    query_THD: torch.Tensor, kv_P2BKD: torch.Tensor, batch: AttentionBatch, params: AttentionParams
) -> torch.Tensor:
    """See `ops.Ops`."""
    query_THD = query_THD.contiguous()
    assert not query_THD.shape[2] % 2, "features are multiplied in pairs"
    out_THD = torch.empty_like(query_THD)
    window = params.window or _NO_WINDOW
    _attend(
        as_array(out_THD),
        as_array(query_THD),
        (_flat(kv_P2BKD), kv_P2BKD.stride(0), kv_P2BKD.shape[2], kv_P2BKD.shape[3]),
        _arrays(batch)[:3],
        (
            float(params.scaling),
            window,
            0 if params.causal else window - 1,
            float(params.softcap or 0),
            _NO_SINKS if params.sinks_H is None else params.sinks_H.float().numpy(),
            _BFLOAT16 if HAS_BF16_DOT and query_THD.dtype == torch.bfloat16 else _FLOAT32,
        ),
    )
    return out_THD


@lru_cache(maxsize=2)
def _arrays(batch: AttentionBatch) -> tuple[Any, Any, Any, Any, Any]:
    """The kernel's view of a batch, kept because every layer of a step has the same one."""
    return (
        batch.query_bounds.numpy(),
        batch.context_lengths_Q.numpy(),
        batch.block_tables_QM.numpy(),
        batch.pages_T.numpy(),
        batch.slots_T.numpy(),
    )


def _flat(kv_P2BKD: torch.Tensor) -> Any:
    """From the first page's keys of one layer to the last page's values, with the other layers in between."""
    page = kv_P2BKD[0].numel()
    return as_array(kv_P2BKD.as_strided(((len(kv_P2BKD) - 1) * kv_P2BKD.stride(0) + page,), (1,)))


@compiled
def _write_kv(kv: Any, strides: Any, new: Any, width: int, places: Any) -> None:
    """`strides` are (page to page, keys to values), `new` the rows of keys and those of values, so wide, and
    `places` the (pages, slots) of the tokens.
    """
    page_stride, value_offset = strides
    (keys, key_stride), (values, value_stride) = new
    pages_T, slots_T = places
    for token in range(len(pages_T)):
        at = pages_T[token] * page_stride + slots_T[token] * width
        kv[at : at + width] = keys[token * key_stride : token * key_stride + width]
        at += value_offset
        kv[at : at + width] = values[token * value_stride : token * value_stride + width]


@compiled
def _attend(out_THD: Any, query_THD: Any, pages: Any, batch: Any, params: Any) -> None:
    scaling, window, ahead, softcap, sinks_H, key_dtype = params
    own = _Params(np.float32(scaling), window, ahead, np.float32(softcap), sinks_H, key_dtype)
    kv, page_stride, block_size, num_kv_heads = pages
    own_pages = _Pages(kv, page_stride, block_size, num_kv_heads)
    run_parallel(_attend_share, (out_THD, query_THD, own_pages, batch, own))


@compiled
def _attend_share(worker: int, workers: int, arguments: Any) -> None:
    """This worker's share of the rows."""
    out_THD, query_THD, pages, batch, params = arguments
    query_bounds, context_lengths_Q, block_tables_QM = batch
    group = query_THD.shape[1] // pages.num_kv_heads
    item = 0
    for sequence in range(len(context_lengths_Q)):
        start = query_bounds[sequence]
        num_rows = (query_bounds[sequence + 1] - start) * group
        past = context_lengths_Q[sequence] - (query_bounds[sequence + 1] - start)
        for kv_head in range(pages.num_kv_heads):
            for first in range(0, num_rows, _ROWS):
                item += 1
                if item % workers == worker:
                    last = min(first + _ROWS, num_rows)
                    context = context_lengths_Q[sequence]
                    rows = _Rows(first, last, start, past, context, kv_head, group)
                    _attend_rows((out_THD, query_THD), pages, block_tables_QM[sequence], params, rows)


class _Rows(NamedTuple):
    """Rows first … last - 1 of one key-value head of a sequence.

    Row r is query head r % group of token start + r // group, whose position is past + r // group of
    `context`.
    """

    first: int
    last: int
    start: int
    past: int
    context: int
    kv_head: int
    group: int


@compiled
def _attend_rows(tensors: Any, pages: Any, block_table: Any, params: Any, rows: Any) -> None:
    """`tensors` are (out, query)."""
    out_THD, query_THD = tensors
    num_heads, head_dim = query_THD.shape[1:]
    value_offset = pages.block_size * pages.num_kv_heads * head_dim
    first, last, group = rows.first, rows.last, rows.group
    low = max(0, rows.past + first // group - params.window + 1) // LANES * LANES
    high = min(rows.past + (last - 1) // group + 1 + params.ahead, rows.context)
    keys_N = _locate(block_table, pages, head_dim, low, high)
    keys_N += rows.kv_head * head_dim
    transposed = np.empty(len(keys_N) * head_dim, params.key_dtype.dtype)
    _transpose_keys(transposed, pages.kv, keys_N, head_dim, value_offset)
    scores_4N = np.empty((_TILE, len(keys_N)), np.float32)
    for tile in range(first, last, _TILE):
        four = (tile, min(tile + 1, last - 1), min(tile + 2, last - 1), min(tile + 3, last - 1))
        at = (
            _query_start(rows, four[0], num_heads, head_dim),
            _query_start(rows, four[1], num_heads, head_dim),
            _query_start(rows, four[2], num_heads, head_dim),
            _query_start(rows, four[3], num_heads, head_dim),
        )
        _score(scores_4N, (query_THD, at), transposed, params)
        for i in range(_TILE):
            position, head = rows.past + four[i] // group, rows.kv_head * group + four[i] % group
            _softmax(scores_4N[i], position, (low, high), params, head)
        _weigh_values((out_THD, at), scores_4N, (pages.kv, keys_N, value_offset), high - low)


@compiled
def _query_start(rows: Any, row: int, num_heads: int, head_dim: int) -> Any:
    """Where a row's query and output begin."""
    head = rows.kv_head * rows.group + row % rows.group
    return ((rows.start + row // rows.group) * num_heads + head) * head_dim


@compiled
def _locate(block_table: Any, pages: Any, head_dim: int, low: int, high: int) -> Any:
    """Where the keys of positions low … high - 1 lie, padded with the last one to whole tiles."""
    block_size, slot_stride = pages.block_size, pages.num_kv_heads * head_dim
    places_N = np.empty(-(-(high - low) // _POSITIONS) * _POSITIONS, np.int64)
    position = low
    while position < high:
        page = block_table[position // block_size] * pages.page_stride
        slot = position % block_size
        for _ in range(min(block_size - slot, high - position)):
            places_N[position - low] = page + slot * slot_stride
            slot += 1
            position += 1
    places_N[high - low :] = places_N[high - low - 1]
    return places_N


@compiled
def _transpose_keys(transposed: Any, kv: Any, keys_N: Any, head_dim: int, value_offset: int) -> None:
    """Tile by tile of positions: the vectors of the first pair of features, of the second, and so on."""
    for n in range(0, len(keys_N), LANES):
        _prefetch_positions(kv, keys_N, n + _PREFETCH_AHEAD, value_offset)
        at = n // _POSITIONS * _POSITIONS * head_dim + n % _POSITIONS // LANES * PAIR_WIDTH
        for feature in range(0, head_dim, PAIR_WIDTH):
            target = (transposed, at + feature // 2 * _TILE * PAIR_WIDTH, _TILE * PAIR_WIDTH)
            transpose(target, (kv, keys_N, n, feature), head_dim - feature)


@compiled
def _prefetch_positions(kv: Any, keys_N: Any, start: int, value_offset: int) -> None:
    """The keys and values of a vector of positions, as far as there are so many."""
    for n in range(min(start, len(keys_N)), min(start + LANES, len(keys_N))):
        for line in range(0, 2 * _PREFETCH_LINE, _PREFETCH_LINE):
            prefetch_line(kv, (keys_N[n],), line)
            prefetch_line(kv, (keys_N[n],), value_offset + line)


@compiled
def _score(scores_4N: Any, query: Any, transposed: Any, params: Any) -> None:
    """Four rows' scores for every position. `query` is (array, where the rows begin)."""
    query_THD, at = query
    count, head_dim = scores_4N.shape[1], query_THD.shape[2]
    scaling = broadcast(params.scaling)
    for n in range(0, count, _POSITIONS):
        products = zeros(16)
        for pair in range(head_dim // 2):
            keys = load_pairs(transposed, n * head_dim + pair * _TILE * PAIR_WIDTH, 4)
            products = dot_broadcast(products, query_THD, at, 2 * pair, keys)
        for i in range(_TILE):
            for j in range(_TILE):
                store(scores_4N, i * count + n + j * LANES, multiply(products[i * _TILE + j], scaling))
    if params.softcap > 0:
        for row in range(_TILE):
            _cap(scores_4N[row], params.softcap)


@compiled
def _cap(scores_N: Any, softcap: Any) -> None:
    """Softcap · tanh(score / softcap), with tanh(x) = 2 / (exp(−2x) + 1) − 1."""
    one, two = broadcast(np.float32(1)), broadcast(np.float32(2))
    for n in range(0, len(scores_N), LANES):
        x = maximum(divide(load(scores_N, (n,), 0)[0], broadcast(softcap)), broadcast(_MIN_TANH))
        tanh = subtract(divide(two, add(exp(multiply(x, broadcast(np.float32(-2)))), one)), one)
        store(scores_N, n, multiply(tanh, broadcast(softcap)))


@compiled
def _softmax(scores_N: Any, position: int, bounds: Any, params: Any, head: int) -> None:
    """Softmax over the positions within `bounds` that a token at `position` sees; the other scores become
    zero.
    """
    low, high = bounds
    sinks_H = params.sinks_H
    scores_N[: max(0, position - params.window + 1 - low)] = -np.inf
    scores_N[min(position + 1 + params.ahead, high) - low :] = -np.inf
    largest = broadcast(np.float32(-np.inf))
    for n in range(0, len(scores_N), LANES):
        largest = maximum(largest, load(scores_N, (n,), 0)[0])
    top = broadcast(reduce_max(largest))
    if len(sinks_H):
        top = maximum(top, broadcast(sinks_H[head]))
    (total,) = zeros(1)
    for n in range(0, len(scores_N), LANES):
        weights = exp(subtract(load(scores_N, (n,), 0)[0], top))
        total = add(total, weights)
        store(scores_N, n, weights)
    total = broadcast(reduce_add((total,))[0])
    if len(sinks_H):
        total = add(total, exp(subtract(broadcast(sinks_H[head]), top)))
    for n in range(0, len(scores_N), LANES):
        store(scores_N, n, divide(load(scores_N, (n,), 0)[0], total))


@compiled
def _weigh_values(target: Any, weights_4N: Any, values: Any, count: int) -> None:
    """The sum of the values by their weights, a span of the head dimension at a time. `target` is (out, where
    the rows begin), `values` (array, where the keys lie, how far behind them the values are).
    """
    out_THD, at = target
    kv, keys_N, value_offset = values
    head_dim = out_THD.shape[2]
    for column in range(0, head_dim, SPAN):
        rest = head_dim - column
        sums = zeros(16)
        for n in range(count):
            scales = (
                broadcast(weights_4N[0, n]),
                broadcast(weights_4N[1, n]),
                broadcast(weights_4N[2, n]),
                broadcast(weights_4N[3, n]),
            )
            sums = fma_outer(sums, scales, load_span(kv, keys_N[n] + value_offset + column, rest))
        store_span(out_THD, at[0] + column, sums[0:4], rest)
        store_span(out_THD, at[1] + column, sums[4:8], rest)
        store_span(out_THD, at[2] + column, sums[8:12], rest)
        store_span(out_THD, at[3] + column, sums[12:16], rest)
