"""Attention over pages on a GPU, for decode and prefill: FlashAttention-2 (arXiv 2307.08691), and
Flash-Decoding's split over the context.

The query heads that share a key-value head are rows of one matrix, token after token. Sequences with few rows
are split over their context into parts whose length follows from the context's, and the parts are combined;
the others go through their context in tiles of rows. A token's result depends on its own sequence and on the
number of its tokens in the step, not on other sequences.

Nothing here synchronises with the device. A CUDA graph can be captured around it with a `TiledBatch` in
static buffers, whose unused tiles have no tokens, and with the largest number of splits that may be needed.

For shape suffixes see `ops.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from turret_server.kernels.gpu.attention_kernels import UNLIMITED, attend_tile, combine_splits, write_tokens
from turret_server.kernels.gpu.jit import dot_type, to_device
from turret_server.kernels.ops import AttentionBatch, AttentionParams

_SPLIT_ROWS = 16
_UNSPLIT_ROWS = 64
_SPLIT = 256  # positions of a split, or a multiple where that makes more than `_MAX_SPLITS`
_MAX_SPLITS = 32
_KEY_BYTES = 1 << 14  # of the keys that a program loads at a time
_QUERY_BYTES = 1 << 15  # of the rows of an unsplit tile, so that all fits a GPU with 99 KiB of shared memory


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """Tiles of tokens of one sequence, int32 [N, 4]: sequence, first token, number of tokens, position of the
    first token.

    `split_N4` are split over the context into at most `num_splits` parts, shared by `num_programs` programs.
    If attention is not causal, none is, and `contexts_Q` are the sequences' lengths.
    """

    split_N4: torch.Tensor
    unsplit_N4: torch.Tensor
    num_splits: int
    num_programs: int
    contexts_Q: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TiledBatch(AttentionBatch):
    """A batch whose tiles are on the device already; the lengths on the host are not read.

    Block tables may be concatenated: then they are [N, 1], and a tile's sequence is where its table begins.
    """

    tiles: AttentionTiles


def make_tiles(
    batch: AttentionBatch, query_THD: torch.Tensor, kv_P2BKD: torch.Tensor, *, causal: bool = True
) -> AttentionTiles:
    """The tiles of a batch for queries and pages of these shapes."""
    group, device = query_THD.shape[1] // kv_P2BKD.shape[3], query_THD.device
    bounds, contexts = batch.query_bounds.numpy(), batch.context_lengths_Q.numpy()
    counts = np.diff(bounds)
    is_split = (counts * group <= _tile_rows(_SPLIT_ROWS, group)) & causal
    size = np.where(is_split, np.maximum(counts, 1), _unsplit_rows(query_THD, group) // group)
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
    splits_N = is_split[sequence]
    num_splits = int(_num_splits(contexts[is_split]).max(initial=0))
    return AttentionTiles(
        split_N4=to_device(tiles_N4[splits_N], device),
        unsplit_N4=to_device(tiles_N4[~splits_N], device),
        num_splits=num_splits,
        num_programs=num_splits,
        contexts_Q=None if causal else to_device(contexts, device),
    )


def max_splits(context: int) -> int:
    """The largest number of splits of a context up to this length."""
    return min(-(-context // _SPLIT), _MAX_SPLITS)


def parts_bytes(num_tiles: int, num_splits: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Bytes of the parts that `attend` combines: sums in float32, with a maximum and a total for each row."""
    rows = num_kv_heads * _tile_rows(_SPLIT_ROWS, num_heads // num_kv_heads)
    return num_tiles * num_splits * rows * (_padded(head_dim) + 2) * torch.float32.itemsize


def _padded(head_dim: int) -> int:
    return int(triton.next_power_of_2(max(16, head_dim)))


def _num_splits(contexts: NDArray[np.int64]) -> NDArray[np.int64]:
    smallest = -(-contexts // _SPLIT)
    return -(-smallest // np.maximum(-(-smallest // _MAX_SPLITS), 1))


def _tile_rows(minimum: int, group: int) -> int:
    """Rows of a tile: those of one token at least."""
    return max(minimum, int(triton.next_power_of_2(group)))


def _unsplit_rows(query_THD: torch.Tensor, group: int) -> int:
    row_bytes = _padded(query_THD.shape[2]) * query_THD.element_size()
    return _tile_rows(min(_UNSPLIT_ROWS, _QUERY_BYTES // row_bytes), group)


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
    assert params.causal == (tiles.contexts_Q is None)
    num_tokens, num_heads, head_dim = query_THD.shape
    num_kv_heads = kv_P2BKD.shape[3]
    group = num_heads // num_kv_heads
    out_THD = query_THD.new_empty(num_tokens, num_heads, head_dim)
    if query_THD.stride(2) != 1:
        query_THD = query_THD.contiguous()
    window = params.window or UNLIMITED
    sinks_H = out_THD if params.sinks_H is None else params.sinks_H
    has_sinks = params.sinks_H is not None
    padded_dim = _padded(head_dim)
    shape = {"GROUP": group, "DIM": head_dim, "WHOLE": padded_dim, "HAS_SINKS": has_sinks}

    # The scores of 64 rows and 64 keys leave no registers for the parts of float32.
    most_keys = 32 if query_THD.dtype == torch.float32 else 64

    def launch(
        tiles_N4: torch.Tensor, programs: int, parts: tuple[torch.Tensor, ...], rows: int, split: int
    ) -> None:
        # The queries of many rows are in shared memory too, of which float32 needs twice as much.
        stages = 3 if rows == _SPLIT_ROWS else 1 if query_THD.dtype == torch.float32 else 2
        attend_tile[(len(tiles_N4), num_kv_heads, programs)](
            out_THD,
            *parts,
            query_THD,
            kv_P2BKD,
            block_tables_QM,
            tiles_N4,
            sinks_H,
            out_THD if tiles.contexts_Q is None else tiles.contexts_Q,
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
            KEYS=max(16, min(most_keys, _KEY_BYTES // (padded_dim * query_THD.element_size()))),
            HAS_SOFTCAP=bool(params.softcap),
            CAUSAL=params.causal,
            MAX_SPLITS=_MAX_SPLITS,
            DOT=dot_type(query_THD.dtype),
            ROWS=rows,
            SPLIT=split,
            num_warps=4,
            num_stages=stages,
            **shape,
        )

    if len(tiles.unsplit_N4):
        unused = (out_THD, out_THD, out_THD)
        launch(tiles.unsplit_N4, 1, unused, _unsplit_rows(query_THD, group), UNLIMITED)
    if len(tiles.split_N4):
        rows = _tile_rows(_SPLIT_ROWS, group)
        at = (len(tiles.split_N4), num_kv_heads, tiles.num_splits, rows)
        tops, totals = query_THD.new_empty(2, *at, dtype=torch.float32)
        sums = query_THD.new_empty(*at, padded_dim, dtype=torch.float32)
        launch(tiles.split_N4, tiles.num_programs, (sums, tops, totals), rows, _SPLIT)
        combine_splits[(len(tiles.split_N4), num_kv_heads)](
            out_THD,
            sums,
            tops,
            totals,
            tiles.split_N4,
            sinks_H,
            tiles.num_splits,
            window,
            ROWS=rows,
            SPLIT=_SPLIT,
            MAX_SPLITS=_MAX_SPLITS,
            **shape,
        )
    return out_THD
