"""The kernels that `attention.py` launches and explains.

For shape suffixes see `ops.py`.
"""

from __future__ import annotations

import math

import triton.language as tl

from turret_server.kernels.gpu.jit import EXACT, inlined, kernel

UNLIMITED = 1 << 30  # tokens of a window or a split

_NO_SPLIT: tl.constexpr = tl.constexpr(UNLIMITED)
_LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))


@kernel()
def write_tokens(
    kv_P2BKD: tl.tensor,
    key_TKD: tl.tensor,
    value_TKD: tl.tensor,
    pages_T: tl.tensor,
    slots_T: tl.tensor,
    page_stride: tl.tensor,
    value_offset: tl.tensor,
    key_token: tl.tensor,
    key_head: tl.tensor,
    value_token: tl.tensor,
    value_head: tl.tensor,
    width: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Writes each token's key and value to its slot; a page below 0 marks padding."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, WIDTH)
    head, dim = index // DIM, index % DIM
    page = tl.load(pages_T + token)
    here = (index < width) & (page >= 0)
    into = kv_P2BKD + page * page_stride + tl.load(slots_T + token) * width + index
    tl.store(into, tl.load(key_TKD + token * key_token + head * key_head + dim, here), here)
    value = tl.load(value_TKD + token * value_token + head * value_head + dim, here)
    tl.store(into + value_offset, value, here)


@kernel("table_width", "window", "scaling", "softcap", "num_splits")
def attend_tile(
    out_THD: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    query_THD: tl.tensor,
    kv_P2BKD: tl.tensor,
    block_tables_QM: tl.tensor,
    tiles_N4: tl.tensor,
    sinks_H: tl.tensor,
    contexts_Q: tl.tensor,
    query_token: tl.tensor,
    query_head: tl.tensor,
    page_stride: tl.tensor,
    value_offset: tl.tensor,
    table_width: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    num_splits: tl.tensor,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOT: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
) -> None:
    """A tile's rows over its context, or over some of its splits.

    A split stores its largest score, its sum of weights and its sum of weighted values.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    sequence, first_token = tl.load(tiles_N4 + tile * 4), tl.load(tiles_N4 + tile * 4 + 1)
    count, position = tl.load(tiles_N4 + tile * 4 + 2), tl.load(tiles_N4 + tile * 4 + 3)
    if count == 0:
        return
    row, dim = tl.arange(0, ROWS), tl.arange(0, WHOLE)
    own = row // GROUP
    head = kv_head * GROUP + row % GROUP
    has_row, has_dim = own < count, dim < DIM
    row_position = (position + own)[:, None]
    token = (first_token + own).to(tl.int64)
    query = query_THD + (token * query_token + head * query_head)[:, None] + dim[None, :]
    q = tl.load(query, has_row[:, None] & has_dim[None, :], 0.0).to(DOT)
    kv_in = kv_P2BKD + kv_head * DIM
    block_table = block_tables_QM + sequence.to(tl.int64) * table_width
    low, high = tl.maximum(position - window + 1, 0) // KEYS * KEYS, position + count
    if not CAUSAL:
        high = tl.minimum(high + window - 1, tl.load(contexts_Q + sequence))
    if SPLIT == _NO_SPLIT:
        top, total, result = _over(
            q,
            kv_in,
            block_table,
            row_position,
            low,
            high,
            page_stride,
            value_offset,
            scaling,
            softcap,
            window,
            BLOCK,
            KEYS,
            HAS_SOFTCAP,
            CAUSAL,
            DOT,
            DIM,
            WHOLE,
            ROWS,
        )
        _finish(
            out_THD,
            result,
            top,
            total,
            sinks_H,
            token,
            head,
            has_row,
            tl.num_programs(1),
            GROUP,
            DIM,
            WHOLE,
            HAS_SINKS,
        )
    else:
        size = _split_size(high, SPLIT, MAX_SPLITS)
        for split in range(low // size + tl.program_id(2), tl.cdiv(high, size), tl.num_programs(2)):
            top, total, result = _over(
                q,
                kv_in,
                block_table,
                row_position,
                tl.maximum(low, split * size),
                tl.minimum(high, (split + 1) * size),
                page_stride,
                value_offset,
                scaling,
                softcap,
                window,
                BLOCK,
                KEYS,
                HAS_SOFTCAP,
                CAUSAL,
                DOT,
                DIM,
                WHOLE,
                ROWS,
            )
            at = ((tile * tl.num_programs(1) + kv_head) * num_splits + split).to(tl.int64) * ROWS + row
            tl.store(tops + at, top)
            tl.store(totals + at, total)
            tl.store(sums + at[:, None] * WHOLE + dim[None, :], result)


@inlined
def _split_size(context: tl.tensor, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr) -> tl.tensor:
    """Positions of a split, from the length of the sequence alone."""
    return tl.cdiv(tl.cdiv(context, SPLIT), MAX_SPLITS) * SPLIT


@inlined
def _over(
    q: tl.tensor,
    kv_in: tl.tensor,
    block_table: tl.tensor,
    row_position: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    page_stride: tl.tensor,
    value_offset: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOT: tl.constexpr,
    DIM: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Largest score, sum of weights and sum of weighted values over positions; scores are in base 2."""
    dim = tl.arange(0, WHOLE)
    has_dim = dim < DIM
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, WHOLE), tl.float32)
    for start in range(low, high, KEYS):
        key_position = start + tl.arange(0, KEYS)
        exists = key_position < high
        page = tl.load(block_table + key_position // BLOCK, exists, 0).to(tl.int64)
        place = page * page_stride + key_position % BLOCK * (tl.num_programs(1) * DIM)
        k = tl.load(kv_in + place[None, :] + dim[:, None], exists[None, :] & has_dim[:, None], 0.0)
        scores = tl.dot(q, k.to(DOT), input_precision=EXACT) * scaling
        if HAS_SOFTCAP:
            scores = softcap * _tanh(scores / softcap)
        seen = key_position[None, :] > row_position - window
        if CAUSAL:
            seen &= key_position[None, :] <= row_position
        else:
            seen &= (key_position[None, :] < row_position + window) & exists[None, :]
        scores = tl.where(seen, scores * _LOG2_E, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no position yet would compute −inf − −inf.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, fade = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
        v_in = kv_in + value_offset + place[:, None] + dim[None, :]
        v = tl.load(v_in, exists[:, None] & has_dim[None, :], 0.0)
        total = total * fade + tl.sum(weights, 1)
        weights = weights.to(v.dtype).to(DOT)
        result = tl.dot(weights, v.to(DOT), result * fade[:, None], input_precision=EXACT)
        top = new_top
    return top, total, result


@kernel("num_splits", "window")
def combine_splits(
    out_THD: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    tiles_N4: tl.tensor,
    sinks_H: tl.tensor,
    num_splits: tl.tensor,
    window: tl.tensor,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Combines the splits of a tile's context, in their order."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first_token = tl.load(tiles_N4 + tile * 4 + 1)
    count, position = tl.load(tiles_N4 + tile * 4 + 2), tl.load(tiles_N4 + tile * 4 + 3)
    if count == 0:
        return
    row, dim = tl.arange(0, ROWS), tl.arange(0, WHOLE)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, WHOLE), tl.float32)
    size = _split_size(position + count, SPLIT, MAX_SPLITS)
    for split in range(tl.maximum(position - window + 1, 0) // size, tl.cdiv(position + count, size)):
        at = ((tile * tl.num_programs(1) + kv_head) * num_splits + split).to(tl.int64) * ROWS + row
        split_top = tl.load(tops + at)
        new_top = tl.maximum(top, split_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade, weight = tl.exp2(top - base), tl.exp2(split_top - base)
        total = total * fade + tl.load(totals + at) * weight
        part = tl.load(sums + at[:, None] * WHOLE + dim[None, :])
        result = result * fade[:, None] + part * weight[:, None]
        top = new_top
    own = row // GROUP
    head = kv_head * GROUP + row % GROUP
    token = (first_token + own).to(tl.int64)
    _finish(
        out_THD,
        result,
        top,
        total,
        sinks_H,
        token,
        head,
        own < count,
        tl.num_programs(1),
        GROUP,
        DIM,
        WHOLE,
        HAS_SINKS,
    )


@inlined
def _finish(
    out_THD: tl.tensor,
    result: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    sinks_H: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    has_row: tl.tensor,
    num_kv_heads: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Divides by the sum of weights, including sinks, and stores."""
    if HAS_SINKS:
        sink = tl.load(sinks_H + head).to(tl.float32) * _LOG2_E
        base = tl.maximum(top, sink)
        fade = tl.exp2(top - base)
        total = total * fade + tl.exp2(sink - base)
        result *= fade[:, None]
    result /= tl.where(has_row, total, 1.0)[:, None]
    dim = tl.arange(0, WHOLE)
    into = out_THD + (token * (num_kv_heads * GROUP) + head)[:, None] * DIM + dim[None, :]
    tl.store(into, result, has_row[:, None] & (dim < DIM)[None, :])


@inlined
def _tanh(x: tl.tensor) -> tl.tensor:
    shrunk = tl.exp2(tl.abs(x) * (-2.0 * _LOG2_E))  # exp(−2 |x|) never overflows
    tanh = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0, -tanh, tanh)
