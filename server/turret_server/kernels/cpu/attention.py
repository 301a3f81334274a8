"""Attention over pages, for decode and prefill alike.

Work is shared out by sequence, key-value head and rows, a row being one query head of one token; four rows
go through the context together, so that what is read of it serves all of them. Keys are turned first, so that
neighbouring positions lie in the lanes of a vector, and scores need no sums across lanes. What a row gets is
summed in one order, by position in its sequence, whatever the step and the chunk it is computed in.

For the letters in tensor names see `ops.py`. Arrays without letters are flat.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from turret_server.kernels.cpu.jit import as_array, compiled
from turret_server.kernels.cpu.lanes import (
    LANES,
    add,
    add_outer,
    divide,
    lane_max,
    lane_sums,
    load,
    maximum,
    multiply,
    prefetch,
    splat,
    store,
    subtract,
    zeros,
)
from turret_server.kernels.cpu.pairs import HAS_PAIRS, PAIRS, add_products, load_pairs, turn
from turret_server.kernels.cpu.parallel import on_all_threads
from turret_server.kernels.cpu.vector import SPAN, exp, load_span, store_span
from turret_server.kernels.ops import AttentionBatch, AttentionParams

_ROWS = 64  # that one thread takes at a time
_TILE = 4  # rows, and vectors of positions, whose products are in registers together
_POSITIONS = _TILE * LANES
_AHEAD = 32  # positions, whose keys and values lie apart: the CPU does not guess where
_LINE = 32  # elements, no more than a cache line has
_EVERYTHING = 1 << 40
_LEAST = np.float32(-40)  # tanh is −1 from there down, and exp(−2x) stays finite
_NO_SINKS = np.empty(0, np.float32)
# Of what numbers turned keys are.
_IN_PAIRS, _IN_FLOATS = np.empty(0, np.uint16), np.empty(0, np.float32)


def write_kv(
    kv_P2BKD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, batch: AttentionBatch
) -> None:
    """See `ops.Ops`."""
    _write_kv(
        _flat(kv_P2BKD),
        kv_P2BKD.stride(0),
        kv_P2BKD.stride(1),
        as_array(key_TKD.flatten(1)),
        as_array(value_TKD.flatten(1)),
        *_arrays(batch)[3:],
    )


def paged_attention(
    query_THD: torch.Tensor, kv_P2BKD: torch.Tensor, batch: AttentionBatch, params: AttentionParams
) -> torch.Tensor:
    """See `ops.Ops`."""
    query_THD = query_THD.contiguous()
    assert not query_THD.shape[2] % 2, "features are multiplied in pairs"
    out_THD = torch.empty_like(query_THD)
    _attend(
        as_array(out_THD),
        as_array(query_THD),
        _flat(kv_P2BKD),
        kv_P2BKD.stride(0),
        kv_P2BKD.shape[2],
        kv_P2BKD.shape[3],
        *_arrays(batch)[:3],
        float(params.scaling),
        params.window or _EVERYTHING,
        float(params.softcap or 0),
        _NO_SINKS if params.sinks_H is None else params.sinks_H.float().numpy(),
        _IN_PAIRS if HAS_PAIRS and query_THD.dtype == torch.bfloat16 else _IN_FLOATS,
    )
    return out_THD


@lru_cache(maxsize=2)
def _arrays(batch: AttentionBatch) -> tuple[Any, Any, Any, Any, Any]:
    """What the kernels take of a batch: every layer of a step asks with the same one."""
    return (
        batch.query_bounds.numpy(),
        batch.context_lengths_Q.numpy(),
        batch.block_tables_QM.numpy(),
        batch.pages_T.numpy(),
        batch.slots_T.numpy(),
    )


def _flat(kv_P2BKD: torch.Tensor) -> Any:
    """From the first page's keys of one layer to the last page's values, with the other layers between."""
    page = kv_P2BKD[0].numel()
    return as_array(kv_P2BKD.as_strided(((len(kv_P2BKD) - 1) * kv_P2BKD.stride(0) + page,), (1,)))


@compiled
def _write_kv(
    kv: Any, page_stride: int, value_offset: int, key_TX: Any, value_TX: Any, pages_T: Any, slots_T: Any
) -> None:
    width = key_TX.shape[1]
    for token in range(len(key_TX)):
        key = pages_T[token] * page_stride + slots_T[token] * width
        value = key + value_offset
        kv[key : key + width] = key_TX[token]
        kv[value : value + width] = value_TX[token]


@compiled
def _attend(
    out_THD: Any,
    query_THD: Any,
    kv: Any,
    page_stride: int,
    block_size: int,
    num_kv_heads: int,
    query_bounds: Any,
    context_lengths_Q: Any,
    block_tables_QM: Any,
    scaling: float,
    window: int,
    softcap: float,
    sinks_H: Any,
    numbers: Any,
) -> None:
    arguments = (
        out_THD,
        query_THD,
        kv,
        page_stride,
        block_size,
        num_kv_heads,
        query_bounds,
        context_lengths_Q,
        block_tables_QM,
        np.float32(scaling),
        window,
        np.float32(softcap),
        sinks_H,
        numbers,
    )
    on_all_threads(_attend_some, arguments)


@compiled
def _attend_some(
    worker: int,
    workers: int,
    out_THD: Any,
    query_THD: Any,
    kv: Any,
    page_stride: int,
    block_size: int,
    num_kv_heads: int,
    query_bounds: Any,
    context_lengths_Q: Any,
    block_tables_QM: Any,
    scaling: Any,
    window: int,
    softcap: Any,
    sinks_H: Any,
    numbers: Any,
) -> None:
    """This worker's share of the rows."""
    num_heads, head_dim = query_THD.shape[1:]
    group = num_heads // num_kv_heads
    value_offset = block_size * num_kv_heads * head_dim
    item = 0
    for sequence in range(len(context_lengths_Q)):
        start = query_bounds[sequence]
        num_new = query_bounds[sequence + 1] - start
        past = context_lengths_Q[sequence] - num_new
        for kv_head in range(num_kv_heads):
            for first in range(0, num_new * group, _ROWS):
                item += 1
                if item % workers != worker:
                    continue
                last = min(first + _ROWS, num_new * group)
                low = max(0, past + first // group - window + 1) // LANES * LANES
                high = past + (last - 1) // group + 1
                keys_N = _locate(
                    block_tables_QM[sequence], page_stride, block_size, num_kv_heads * head_dim, low, high
                )
                keys_N += kv_head * head_dim
                turned = np.empty(len(keys_N) * head_dim, numbers.dtype)
                _turn_keys(turned, kv, keys_N, head_dim, value_offset)
                scores_4N = np.empty((_TILE, len(keys_N)), np.float32)
                for tile in range(first, last, _TILE):
                    rows = (tile, min(tile + 1, last - 1), min(tile + 2, last - 1), min(tile + 3, last - 1))
                    at = (
                        _place(rows[0], start, group, num_heads, kv_head, head_dim),
                        _place(rows[1], start, group, num_heads, kv_head, head_dim),
                        _place(rows[2], start, group, num_heads, kv_head, head_dim),
                        _place(rows[3], start, group, num_heads, kv_head, head_dim),
                    )
                    _score(scores_4N, query_THD, at, turned, scaling, softcap)
                    for i in range(_TILE):
                        position, head = past + rows[i] // group, kv_head * group + rows[i] % group
                        _soften(scores_4N[i], position, low, window, sinks_H, head)
                    _weigh(out_THD, at, scores_4N, kv, keys_N, value_offset, high - low)


@compiled
def _place(row: int, start: int, group: int, num_heads: int, kv_head: int, head_dim: int) -> int:
    """Where a row's query and output lie."""
    return ((start + row // group) * num_heads + kv_head * group + row % group) * head_dim


@compiled
def _locate(
    block_table: Any, page_stride: int, block_size: int, slot_stride: int, low: int, high: int
) -> Any:
    """Where the keys of the positions from low up to high lie, filled up with the last to whole tiles."""
    places_N = np.empty(-(-(high - low) // _POSITIONS) * _POSITIONS, np.int64)
    position = low
    while position < high:
        page = block_table[position // block_size] * page_stride
        slot = position % block_size
        for _ in range(min(block_size - slot, high - position)):
            places_N[position - low] = page + slot * slot_stride
            slot += 1
            position += 1
    places_N[high - low :] = places_N[high - low - 1]
    return places_N


@compiled
def _turn_keys(turned: Any, kv: Any, keys_N: Any, head_dim: int, value_offset: int) -> None:
    """Of every tile of positions, the vectors of its first pair of features, of its second, and so on."""
    for n in range(0, len(keys_N), LANES):
        for later in range(min(n + _AHEAD, len(keys_N)), min(n + _AHEAD + LANES, len(keys_N))):
            for line in range(0, 2 * _LINE, _LINE):
                prefetch(kv, (keys_N[later],), line)
                prefetch(kv, (keys_N[later],), value_offset + line)
        at = n // _POSITIONS * _POSITIONS * head_dim + n % _POSITIONS // LANES * PAIRS
        for feature in range(0, head_dim, PAIRS):
            pair = at + feature // 2 * _TILE * PAIRS
            turn(turned, pair, _TILE * PAIRS, kv, keys_N, n, feature, head_dim - feature)


@compiled
def _score(scores_4N: Any, query_THD: Any, at: Any, turned: Any, scaling: Any, softcap: Any) -> None:
    """Four rows' scores for every position."""
    count, head_dim = scores_4N.shape[1], query_THD.shape[2]
    for n in range(0, count, _POSITIONS):
        products = zeros(16)
        for pair in range(head_dim // 2):
            keys = load_pairs(turned, n * head_dim + pair * _TILE * PAIRS, 4)
            products = add_products(products, query_THD, at, 2 * pair, keys)
        for i in range(_TILE):
            for j in range(_TILE):
                scores = multiply(products[i * _TILE + j], splat(scaling))
                store(scores_4N, i * count + n + j * LANES, scores)
    if softcap > 0:
        for row in range(_TILE):
            _cap(scores_4N[row], softcap)


@compiled
def _cap(scores_N: Any, softcap: Any) -> None:
    """Bound the scores: softcap · tanh(score / softcap), tanh(x) being 2 / (exp(−2x) + 1) − 1."""
    one, two = splat(np.float32(1)), splat(np.float32(2))
    for n in range(0, len(scores_N), LANES):
        x = maximum(divide(load(scores_N, (n,), 0)[0], splat(softcap)), splat(_LEAST))
        tanh = subtract(divide(two, add(exp(multiply(x, splat(np.float32(-2)))), one)), one)
        store(scores_N, n, multiply(tanh, splat(softcap)))


@compiled
def _soften(scores_N: Any, position: int, low: int, window: int, sinks_H: Any, head: int) -> None:
    """Softmax over what a token at this position sees; the other scores become zero."""
    scores_N[: max(0, position - window + 1 - low)] = -np.inf
    scores_N[position + 1 - low :] = -np.inf
    largest = splat(np.float32(-np.inf))
    for n in range(0, len(scores_N), LANES):
        largest = maximum(largest, load(scores_N, (n,), 0)[0])
    top = splat(lane_max(largest))
    if len(sinks_H):
        top = maximum(top, splat(sinks_H[head]))
    total = zeros(1)[0]
    for n in range(0, len(scores_N), LANES):
        weights = exp(subtract(load(scores_N, (n,), 0)[0], top))
        total = add(total, weights)
        store(scores_N, n, weights)
    total = splat(lane_sums((total,))[0])
    if len(sinks_H):
        total = add(total, exp(subtract(splat(sinks_H[head]), top)))
    for n in range(0, len(scores_N), LANES):
        store(scores_N, n, divide(load(scores_N, (n,), 0)[0], total))


@compiled
def _weigh(
    out_THD: Any, at: Any, weights_4N: Any, kv: Any, keys_N: Any, value_offset: int, count: int
) -> None:
    """The sum of the values by their weights, a span of the head dimension at a time."""
    head_dim = out_THD.shape[2]
    for column in range(0, head_dim, SPAN):
        rest = head_dim - column
        sums = zeros(16)
        for n in range(count):
            scales = (
                splat(weights_4N[0, n]),
                splat(weights_4N[1, n]),
                splat(weights_4N[2, n]),
                splat(weights_4N[3, n]),
            )
            sums = add_outer(sums, scales, load_span(kv, keys_N[n] + value_offset + column, rest))
        store_span(out_THD, at[0] + column, sums[0:4], rest)
        store_span(out_THD, at[1] + column, sums[4:8], rest)
        store_span(out_THD, at[2] + column, sums[8:12], rest)
        store_span(out_THD, at[3] + column, sums[12:16], rest)
