"""Attention over pages on a GPU, for decode and prefill (FlashAttention-2, arXiv 2307.08691; the split over
the context is Flash-Decoding's).

The query heads that share a key-value head are rows of one matrix, those of several tokens of a sequence
below each other. Sequences whose rows are few are split over their context, after a number of positions
that follows from its length, and the parts are weighed together; the others go through their context in
tiles of rows. What a token gets depends on its own sequence and on how many of its tokens the step has, not
on the others.

Nothing here waits for the device. A CUDA graph can be recorded around it with a `TiledBatch` in static
buffers, whose tiles beyond those in use have no tokens, and the most splits that they may come to need.

For the letters in tensor names see `ops.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from turret_server.kernels.gpu.attention_kernels import EVERYTHING, attend_tile, combine_splits, write_tokens
from turret_server.kernels.gpu.jit import dot_type, to_device
from turret_server.kernels.ops import AttentionBatch, AttentionParams

_FEW_ROWS = 16
_MANY_ROWS = 64
_SPLIT = 256  # positions, or a multiple of them where that makes too many splits
_MOST_SPLITS = 32
_KEY_BYTES = 1 << 14  # of the keys that a program reads at a time


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """Tokens of one sequence each, [N, 4] in int32: sequence, first token, how many, position of the first.

    `few_N4` are sequences that are split over the context, into no more than `num_splits`; so many programs
    share them as `num_programs` says.
    """

    few_N4: torch.Tensor
    many_N4: torch.Tensor
    num_splits: int
    num_programs: int


@dataclass(frozen=True, slots=True, eq=False)
class TiledBatch(AttentionBatch):
    """A batch whose tiles lie on the device already; what the host knows of its lengths is not read.

    Its block tables may lie end to end: then they are [N, 1], and a tile's sequence is where its own begins.
    """

    tiles: AttentionTiles


def make_tiles(batch: AttentionBatch, group: int, device: torch.device) -> AttentionTiles:
    """`group` is the number of query heads that share a key-value head."""
    bounds, contexts = batch.query_bounds.numpy(), batch.context_lengths_Q.numpy()
    counts = np.diff(bounds)
    is_few = counts * group <= _rows(_FEW_ROWS, group)
    size = np.where(is_few, np.maximum(counts, 1), _rows(_MANY_ROWS, group) // group)
    num_tiles = -(-counts // size)
    sequence = np.repeat(np.arange(len(counts)), num_tiles)
    inside = np.arange(len(sequence)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    done = inside * size[sequence]
    tiles_N4 = np.stack(
        (
            sequence,
            bounds[sequence] + done,
            np.minimum(size[sequence], counts[sequence] - done),
            (contexts - counts)[sequence] + done,
        ),
        axis=1,
    )
    few = is_few[sequence]
    num_splits = int(_num_splits(contexts[is_few]).max(initial=0))
    return AttentionTiles(
        few_N4=to_device(tiles_N4[few], device),
        many_N4=to_device(tiles_N4[~few], device),
        num_splits=num_splits,
        num_programs=num_splits,
    )


def most_splits(context: int) -> int:
    """Of a sequence that is no longer."""
    return min(-(-context // _SPLIT), _MOST_SPLITS)


def _num_splits(contexts: NDArray[np.int64]) -> NDArray[np.int64]:
    smallest = -(-contexts // _SPLIT)
    return -(-smallest // np.maximum(-(-smallest // _MOST_SPLITS), 1))


def _rows(least: int, group: int) -> int:
    """Of a tile: at least one token's."""
    return max(least, int(triton.next_power_of_2(group)))


def write_kv(
    kv_P2BKD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, batch: AttentionBatch
) -> None:
    """See `ops.Ops`."""
    num_tokens, num_kv_heads, head_dim = key_TKD.shape
    if not num_tokens:
        return
    assert key_TKD.stride(2) == value_TKD.stride(2) == 1
    write_tokens[(num_tokens,)](
        kv_P2BKD,
        key_TKD,
        value_TKD,
        batch.pages_T,
        batch.slots_T,
        kv_P2BKD.stride(0),
        kv_P2BKD.stride(1),
        key_TKD.stride(0),
        key_TKD.stride(1),
        value_TKD.stride(0),
        value_TKD.stride(1),
        num_kv_heads * head_dim,
        DIM=head_dim,
        WIDTH=triton.next_power_of_2(num_kv_heads * head_dim),
    )


def attend(
    query_THD: torch.Tensor,
    kv_P2BKD: torch.Tensor,
    block_tables_QM: torch.Tensor,
    tiles: AttentionTiles,
    params: AttentionParams,
) -> torch.Tensor:
    """See `ops.Ops.paged_attention`."""
    num_tokens, num_heads, head_dim = query_THD.shape
    num_kv_heads = kv_P2BKD.shape[3]
    group = num_heads // num_kv_heads
    out_THD = query_THD.new_empty(num_tokens, num_heads, head_dim)
    if query_THD.stride(2) != 1:
        query_THD = query_THD.contiguous()
    window = params.window or EVERYTHING
    sinks_H = out_THD if params.sinks_H is None else params.sinks_H
    has_sinks = params.sinks_H is not None
    whole = triton.next_power_of_2(max(16, head_dim))
    shape = {"GROUP": group, "DIM": head_dim, "WHOLE": whole, "HAS_SINKS": has_sinks}

    def launch(tiles_N4: torch.Tensor, programs: int, parts: tuple[torch.Tensor, ...], **how: Any) -> None:
        attend_tile[(len(tiles_N4), num_kv_heads, programs)](
            out_THD,
            *parts,
            query_THD,
            kv_P2BKD,
            block_tables_QM,
            tiles_N4,
            sinks_H,
            query_THD.stride(0),
            query_THD.stride(1),
            kv_P2BKD.stride(0),
            kv_P2BKD.stride(1),
            block_tables_QM.stride(0),
            params.scaling,
            params.softcap or 0.0,
            window,
            tiles.num_splits,
            BLOCK=kv_P2BKD.shape[2],
            KEYS=max(16, min(64, _KEY_BYTES // (whole * query_THD.element_size()))),
            HAS_SOFTCAP=bool(params.softcap),
            MOST_SPLITS=_MOST_SPLITS,
            DOT=dot_type(query_THD.dtype),
            num_warps=4,
            **shape,
            **how,
        )

    if len(tiles.many_N4):
        unused = (out_THD, out_THD, out_THD)
        # The queries too are in shared memory then, of which float32 takes up twice as much.
        stages = 1 if query_THD.dtype == torch.float32 else 2
        rows = _rows(_MANY_ROWS, group)
        launch(tiles.many_N4, 1, unused, ROWS=rows, SPLIT=EVERYTHING, num_stages=stages)
    if len(tiles.few_N4):
        rows = _rows(_FEW_ROWS, group)
        at = (len(tiles.few_N4), num_kv_heads, tiles.num_splits, rows)
        tops, totals = query_THD.new_empty(2, *at, dtype=torch.float32)
        sums = query_THD.new_empty(*at, whole, dtype=torch.float32)
        parts = (sums, tops, totals)
        launch(tiles.few_N4, tiles.num_programs, parts, ROWS=rows, SPLIT=_SPLIT, num_stages=3)
        combine_splits[(len(tiles.few_N4), num_kv_heads)](
            out_THD,
            sums,
            tops,
            totals,
            tiles.few_N4,
            sinks_H,
            tiles.num_splits,
            window,
            ROWS=rows,
            SPLIT=_SPLIT,
            MOST_SPLITS=_MOST_SPLITS,
            **shape,
        )
    return out_THD
