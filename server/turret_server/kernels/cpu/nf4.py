"""The NF4 product: codes are dequantised in registers, and multiplied as bfloat16 where the CPU and the
activations allow it, otherwise as float32. `../README.md` draws the layout and the tiles.

Threads share the out features in blocks of 64, which are four vectors. The products of a block with 64 in
features, one quantisation block, are summed in float32 pair by pair, scaled, and added to the sum of the
quantisation blocks before: the same order for every token, whatever the step. With few tokens, codes are
dequantised while they are multiplied, four tokens at a time; many tokens share values dequantised once. Tiles
have all four vectors of a block where registers are wide (AVX512), otherwise one.

Shapes: J blocks of out features, L quantisation blocks of a row, C the 64 out features of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise

from turret_server.kernels.cpu.llvm.jit import as_array, compiled
from turret_server.kernels.cpu.llvm.pairs import (
    HAS_BF16_DOT,
    HAS_PERMUTE,
    HAS_WIDE_REGISTERS,
    PAIR_WIDTH,
    dot_broadcast,
    load_pairs,
    lookup_nf4,
    store_pairs,
)
from turret_server.kernels.cpu.llvm.parallel import run_parallel
from turret_server.kernels.cpu.llvm.vectors import (
    LANES,
    SPAN,
    accumulate_scaled,
    load,
    load_span,
    prefetch_line,
    store_span,
    strided,
    zeros,
)
from turret_server.kernels.ops import NF4Weight, PackedNF4Weight

PREFETCH_RUN = 512  # elements that one prefetch offset stands for

_COLUMNS = 64  # out features of a block
_VECTORS = 4  # of a block of out features
_DEPTH = 64  # in features that share a scale
_GROUP = 8  # in features, four pairs, whose codes share a word
_WORDS = _VECTORS * PAIR_WIDTH  # of uint16, with the codes of a group
_TOKENS = 128  # whose sums stay in the L2 cache
_PART = 4 if HAS_WIDE_REGISTERS else 1  # vectors of a block whose sums are in registers together
_MANY = 20 if HAS_WIDE_REGISTERS else 5  # tokens from which on values are dequantised once, into the L1 cache
_TILE = 5 if HAS_WIDE_REGISTERS else 6  # tokens of many, whose sums fill the registers
_LEFT = 4 if HAS_WIDE_REGISTERS else 2  # tokens of many that go through as few do, rather than in a tile
_FEW = 4  # tokens of few, whose sums leave registers to dequantise in
_SUMS, _SUMS_OF_FEW, _SUMS_OF_TWO = _TILE * _PART, _FEW * _PART, 2 * _PART
_PREFETCH_LINE = 64  # bytes of a cache line


class _Block(NamedTuple):
    """64 in features of 64 out features: codes from words[word] on, the values of the codes, scales from
    absmax[scale] on.
    """

    words: Any
    word: int
    table: Any
    absmax: Any
    scale: int


def pack(weight: NF4Weight, dtype: torch.dtype) -> NF4Weight | PackedNF4Weight:
    """Reorders codes and scales as the kernel reads them for activations of `dtype`.

    Out features are padded to whole blocks. Returns the weight itself where the kernel does not apply: a CPU
    without a permute instruction, quantisation blocks of another size than 64, or rows that are no whole
    number of them.

    `data` [J, in / 8, 4, 16, 2] of uint16, in the order of `_words` or of `_bytes`. `absmax` [J, L, 64] of
    `dtype`. `code` [32]: the 16 values twice, in the dtype of the multiplication.
    """
    state = weight.state
    if not HAS_PERMUTE or state.blocksize != _DEPTH or weight.in_features % _DEPTH:
        return weight
    num_blocks = -(-weight.out_features // _COLUMNS)
    padding = (0, 0, 0, num_blocks * _COLUMNS - weight.out_features)
    packed = weight.data.view(torch.uint8).reshape(weight.out_features, -1)
    codes_OI = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)
    codes_OI = torch.nn.functional.pad(codes_OI, padding)
    scales_OL = torch.nn.functional.pad(_scales(state).view(weight.out_features, -1), padding)
    return PackedNF4Weight(
        data=_words(codes_OI, num_blocks) if HAS_WIDE_REGISTERS else _bytes(codes_OI, num_blocks),
        absmax=scales_OL.to(dtype).view(num_blocks, _COLUMNS, -1).transpose(1, 2).contiguous(),
        code=state.code.to(dtype if HAS_BF16_DOT else torch.float32).repeat(2),
        block_size=_DEPTH,
        in_features=weight.in_features,
        out_features=weight.out_features,
    )


def group(
    weights: Sequence[NF4Weight | PackedNF4Weight],
) -> tuple[PackedNF4Weight, list[PackedNF4Weight]] | None:
    """See `ops.Ops`: blocks of out features follow each other, so each weight must have whole ones."""
    packed = [each for each in weights if isinstance(each, PackedNF4Weight)]
    if len(packed) < len(weights) or any(each.out_features % _COLUMNS for each in packed):
        return None
    joined = replace(
        packed[0],
        data=torch.cat([each.data for each in packed]),
        absmax=torch.cat([each.absmax for each in packed]),
        out_features=sum(each.out_features for each in packed),
    )
    blocks = [len(each.data) for each in packed]
    parts = zip(packed, torch.split(joined.data, blocks), torch.split(joined.absmax, blocks), strict=True)
    return joined, [replace(each, data=data, absmax=absmax) for each, data, absmax in parts]


def _words(codes_OI: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """For `vpermw` and `vpermps`: bits 4q … 4q + 3 of word [j, g, v, n, p] are the code of out feature
    64j + 16v + n and in feature 8g + 2q + p.
    """
    codes = codes_OI.view(num_blocks, _VECTORS, 16, -1, 4, 2).short()
    words = codes[..., 0, :] | codes[..., 1, :] << 4 | codes[..., 2, :] << 8 | codes[..., 3, :] << 12
    return words.permute(0, 3, 1, 2, 4).contiguous().view(torch.uint16)


def _bytes(codes_OI: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """For `vpshufb`: of the 64 bytes [j, g, v], bits 4r … 4r + 3 of byte 32s + 16h + 8p + 4m + n are the code
    of out feature 64j + 16v + 8m + 4h + n and in feature 8g + 4s + 2r + p. So the bytes of the values, when
    they are interleaved, come in the order of the out features.
    """
    codes = codes_OI.view(num_blocks, _VECTORS, 2, 2, 4, -1, 2, 2, 2)  # j, v, m, h, n, g, s, r, p
    both = codes[..., 0, :] | codes[..., 1, :] << 4
    ordered = both.permute(0, 5, 1, 6, 3, 7, 2, 4).contiguous()  # j, g, v, s, h, p, m, n
    return ordered.view(torch.uint16).view(num_blocks, -1, _VECTORS, 16, 2)


def _scales(state: QuantState) -> torch.Tensor:
    scales: torch.Tensor = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.float()


def multiply(y_TO: Any, x_TI: Any, weight: PackedNF4Weight, prefetch: tuple[Any, Any]) -> None:
    """`Ops.nf4_linear` on arrays.

    `prefetch` is (arena, offsets): runs of `PREFETCH_RUN` elements, read by the next kernel, which are
    fetched while this one waits for its registers.
    """
    arrays = _arrays.get(weight)
    if arrays is None:
        arrays = _arrays[weight] = as_array(weight.data), as_array(weight.absmax), as_array(weight.code)
    _linear(y_TO, x_TI, arrays, prefetch)


# By weight: to make the views takes longer than to multiply a small one.
_arrays: WeakKeyDictionary[PackedNF4Weight, tuple[Any, Any, Any]] = WeakKeyDictionary()


@compiled
def _linear(y_TO: Any, x_TI: Any, weight: Any, prefetch: Any) -> None:
    run_parallel(_linear_blocks, (y_TO, x_TI, weight, prefetch))


@compiled
def _linear_blocks(worker: int, workers: int, arguments: Any) -> None:
    """This worker's blocks of out features, which are consecutive."""
    y_TO, x_TI, weight, (arena, offsets_N) = arguments
    words, absmax_JLC, code = weight
    num_blocks, num_tokens, num_in = len(absmax_JLC), len(x_TI), x_TI.shape[1]
    start, end = num_blocks * worker // workers, num_blocks * (worker + 1) // workers
    sums_TC = np.empty((min(num_tokens, _TOKENS), _COLUMNS), np.float32)
    values = np.empty(_DEPTH * _COLUMNS, code.dtype)
    table = load_pairs(code, 0, 1)
    prefetch_N = offsets_N[len(offsets_N) * worker // workers : len(offsets_N) * (worker + 1) // workers]
    for block in range(start, end):
        for first in range(0, num_tokens, _TOKENS):
            tokens = min(_TOKENS, num_tokens - first)
            sums_TC[:tokens] = 0
            for depth in range(0, num_in, _DEPTH):
                at = block * num_in + depth
                if first == 0:
                    _prefetch_part(arena, prefetch_N, at - start * num_in, (end - start) * num_in)
                weights = _Block(words, at // _GROUP * _WORDS, table, absmax_JLC, at)
                _add_products((sums_TC, tokens), (x_TI, first * num_in + depth), weights, values)
            _write((y_TO, first, block * _COLUMNS), sums_TC, tokens)


@compiled
def _prefetch_part(arena: Any, offsets_N: Any, done: int, total: int) -> None:
    """The runs' part that the next block is of all blocks, so that memory is busy all the time."""
    low, high = len(offsets_N) * done // total, len(offsets_N) * (done + _DEPTH) // total
    for n in range(low, high):
        for line in range(0, PREFETCH_RUN, _PREFETCH_LINE // arena.itemsize):
            prefetch_line(arena, (offsets_N[n],), line)


@compiled
def _add_products(target: Any, x: Any, block: Any, values: Any) -> None:
    """Adds the block's products to the sums of all tokens. `target` is (sums, number of tokens), `x` (array,
    where the first token's in features begin), `values` scratch memory.
    """
    sums_TC, tokens = target
    x_TI, start = x
    width = x_TI.shape[1]
    token = 0
    if tokens >= _MANY:
        _dequantize(values, block)
        while token + _LEFT < tokens:
            last = min(_TILE, tokens - token) - 1
            rows = strided(start + token * width, width, last, _TILE)
            for vector in range(0, _VECTORS, _PART):
                into = strided(token * _COLUMNS + vector * LANES, _COLUMNS, last, _TILE)
                _add_dequantized((sums_TC, into), (x_TI, rows), values, (block, vector))
            token += _TILE
    while token < tokens:
        last = min(_FEW, tokens - token) - 1
        at, row = token * _COLUMNS, start + token * width
        for vector in range(0, _VECTORS, _PART):
            if last == 0:
                _add_packed((sums_TC, (at,)), (x_TI, (row,)), (block, vector), zeros(_PART))
            elif last == 1:
                into, rows = (at, at + _COLUMNS), (row, row + width)
                _add_packed((sums_TC, into), (x_TI, rows), (block, vector), zeros(_SUMS_OF_TWO))
            else:
                into_few, few_rows = strided(at, _COLUMNS, last, _FEW), strided(row, width, last, _FEW)
                _add_packed((sums_TC, into_few), (x_TI, few_rows), (block, vector), zeros(_SUMS_OF_FEW))
            at += _PART * LANES
        token += _FEW


@compiled
def _dequantize(values: Any, block: Any) -> None:
    """The unscaled values of a block, pair by pair."""
    for group in range(_DEPTH // _GROUP):
        codes, at = load_pairs(block.words, block.word + group * _WORDS, 4), group * 4 * _WORDS
        store_pairs(values, at, lookup_nf4(block.table, codes, 0))
        store_pairs(values, at + _WORDS, lookup_nf4(block.table, codes, 1))
        store_pairs(values, at + 2 * _WORDS, lookup_nf4(block.table, codes, 2))
        store_pairs(values, at + 3 * _WORDS, lookup_nf4(block.table, codes, 3))


@compiled
def _add_dequantized(target: Any, x: Any, values: Any, part: Any) -> None:
    """Multiplies a tile of tokens by a part of the dequantised values. `target` and `x` are (array, token
    starts), `part` is (block, its first vector).
    """
    sums_TC, into = target
    x_TI, rows = x
    own = zeros(_SUMS)
    for pair in range(_DEPTH // 2):
        columns = load_pairs(values, pair * _WORDS + part[1] * PAIR_WIDTH, _PART)
        own = dot_broadcast(own, x_TI, rows, 2 * pair, columns)
    accumulate_scaled(sums_TC, into, own, _load_scales(part))


@compiled
def _add_packed(target: Any, x: Any, part: Any, own: Any) -> None:
    """Multiplies a tile of tokens by a part of a block that is dequantised on the way.

    `target` and `x` are (array, token starts), `part` is (block, its first vector), `own` are the zero
    vectors of the tile's sums.
    """
    sums_TC, into = target
    x_TI, rows = x
    block, vector = part
    for group in range(_DEPTH // _GROUP):
        codes = load_pairs(block.words, block.word + group * _WORDS + vector * PAIR_WIDTH, _PART)
        at = group * _GROUP
        own = dot_broadcast(own, x_TI, rows, at, lookup_nf4(block.table, codes, 0))
        own = dot_broadcast(own, x_TI, rows, at + 2, lookup_nf4(block.table, codes, 1))
        own = dot_broadcast(own, x_TI, rows, at + 4, lookup_nf4(block.table, codes, 2))
        own = dot_broadcast(own, x_TI, rows, at + 6, lookup_nf4(block.table, codes, 3))
    accumulate_scaled(sums_TC, into, own, _load_scales(part))


@compiled
def _load_scales(part: Any) -> Any:
    block, vector = part
    return load(block.absmax, strided(block.scale + vector * LANES, LANES, _PART - 1, _PART), 0)


@compiled
def _write(target: Any, sums_TC: Any, tokens: int) -> None:
    """`target` is (y, first token, first column)."""
    y_TO, first, column = target
    width = y_TO.shape[1]
    for token in range(tokens):
        sums = load_span(sums_TC, token * _COLUMNS, SPAN)
        store_span(y_TO, (first + token) * width + column, sums, width - column)
