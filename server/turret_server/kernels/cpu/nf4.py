"""The NF4 product for CPUs: codes are looked up in registers, and multiplied as bfloat16 where the CPU can
and the activations are, else as float32.

The out features are shared out to the threads in blocks of 64, which four vectors hold. Of a block, the
products of 64 in features, one quantisation block, are summed in float32, pair by pair, then scaled and
added to the sum of the quantisation blocks before: the order is the same for every token, whatever the step.
A few tokens look the codes up as they go, four tokens at a time; many share what was looked up once.

Shapes: J blocks of out features, L quantisation blocks of a row, C the 64 out features of a block.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise

from turret_server.kernels.cpu.jit import as_array, compiled
from turret_server.kernels.cpu.lanes import LANES, add_scaled, load, prefetch, zeros
from turret_server.kernels.cpu.pairs import (
    CAN_LOOK_UP,
    HAS_PAIRS,
    PAIRS,
    add_products,
    load_pairs,
    look_up,
    store_pairs,
)
from turret_server.kernels.cpu.parallel import on_all_threads
from turret_server.kernels.cpu.vector import SPAN, load_span, store_span
from turret_server.kernels.ops import NF4Weight, PackedNF4Weight

_COLUMNS = 64  # out features in a block
_VECTORS = 4  # that hold them
_DEPTH = 64  # in features that share a scale
_GROUP = 8  # in features, four pairs, whose codes share a word
_WORDS = _VECTORS * PAIRS  # of uint16, that hold the codes of a group
_TOKENS = 128  # whose sums are kept at a time, in the second-level cache
_MANY = 20  # tokens, for which looking up first is worth its writing and reading
_TILE = 5  # of those many, whose sums fill the registers
_FEW = 4  # tokens, likewise, beside what looking up takes
_LINE = 64  # bytes in a cache line
RUN = 512  # numbers that are asked for together


def pack(weight: NF4Weight, dtype: torch.dtype) -> NF4Weight | PackedNF4Weight:
    """Bring codes and scales into the order in which activations of `dtype` read them; out features are
    filled up to whole blocks. A weight whose quantisation blocks are of another size, or go over the ends of
    its rows, stays what it is, and so does every weight where the CPU cannot look up.

    `data` [J, in / 8, 4, 16, 2] of uint16: of word [j, g, v, n, p], bits 4q … 4q + 4 are the code of out
    feature 64j + 16v + n and in feature 8g + 2q + p. `absmax` [J, L, 64] of `dtype`. `code` [32], the sixteen
    values twice, of the type that is multiplied.
    """
    state = weight.state
    if not CAN_LOOK_UP or state.blocksize != _DEPTH or weight.in_features % _DEPTH:
        return weight
    num_blocks = -(-weight.out_features // _COLUMNS)
    filling = (0, 0, 0, num_blocks * _COLUMNS - weight.out_features)
    packed = weight.data.view(torch.uint8).reshape(weight.out_features, -1)
    codes_OI = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)
    codes = torch.nn.functional.pad(codes_OI, filling).view(num_blocks, _VECTORS, 16, -1, 4, 2).short()
    words = codes[..., 0, :] | codes[..., 1, :] << 4 | codes[..., 2, :] << 8 | codes[..., 3, :] << 12
    scales_OL = torch.nn.functional.pad(_scales(state).view(weight.out_features, -1), filling)
    return PackedNF4Weight(
        data=words.permute(0, 3, 1, 2, 4).contiguous().view(torch.uint16),
        absmax=scales_OL.to(dtype).view(num_blocks, _COLUMNS, -1).transpose(1, 2).contiguous(),
        code=state.code.to(dtype if HAS_PAIRS else torch.float32).repeat(2),
        block_size=_DEPTH,
        in_features=weight.in_features,
        out_features=weight.out_features,
    )


def _scales(state: QuantState) -> torch.Tensor:
    scales: torch.Tensor = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.float()


def multiply(y_TO: Any, x_TI: Any, weight: PackedNF4Weight, arena: Any, soon_N: Any) -> None:
    """`nf4_linear` of `ops.Ops`, of arrays. `soon_N` is where in the arena the runs of `RUN` numbers lie that
    are read next.
    """
    arrays = _arrays.get(weight)
    if arrays is None:
        arrays = _arrays[weight] = as_array(weight.data), as_array(weight.absmax), as_array(weight.code)
    _linear(y_TO, x_TI, *arrays, arena, soon_N)


# What the kernel takes of each weight: making it takes longer than to multiply a small one.
_arrays: WeakKeyDictionary[PackedNF4Weight, tuple[Any, Any, Any]] = WeakKeyDictionary()


@compiled
def _linear(y_TO: Any, x_TI: Any, words: Any, absmax_JLC: Any, code: Any, arena: Any, soon_N: Any) -> None:
    on_all_threads(_multiply, (y_TO, x_TI, words, absmax_JLC, code, arena, soon_N))


@compiled
def _multiply(
    worker: int,
    workers: int,
    y_TO: Any,
    x_TI: Any,
    words: Any,
    absmax_JLC: Any,
    code: Any,
    arena: Any,
    soon_N: Any,
) -> None:
    """This worker's blocks of out features, which lie together."""
    num_blocks, num_tokens, num_in = len(absmax_JLC), len(x_TI), x_TI.shape[1]
    start, end = num_blocks * worker // workers, num_blocks * (worker + 1) // workers
    sums_TC = np.empty((min(num_tokens, _TOKENS), _COLUMNS), np.float32)
    values = np.empty(_DEPTH * _COLUMNS, code.dtype)
    table = load_pairs(code, 0, 1)
    own_N = soon_N[len(soon_N) * worker // workers : len(soon_N) * (worker + 1) // workers]
    for block in range(start, end):
        for first in range(0, num_tokens, _TOKENS):
            tokens = min(_TOKENS, num_tokens - first)
            sums_TC[:tokens] = 0
            for depth in range(0, num_in, _DEPTH):
                place = block * num_in + depth
                if first == 0:
                    _ask_for_some(arena, own_N, place - start * num_in, (end - start) * num_in)
                _add_depth(
                    sums_TC, tokens, x_TI, first * num_in + depth, words, table, values, absmax_JLC, place
                )
            _write(y_TO, first, tokens, block * _COLUMNS, sums_TC)


@compiled
def _ask_for_some(arena: Any, soon_N: Any, done: int, total: int) -> None:
    """The runs whose turn it is when so much of the work is done, so that memory is busy all the time."""
    for n in range(len(soon_N) * done // total, len(soon_N) * (done + _DEPTH) // total):
        for line in range(0, RUN, _LINE // arena.itemsize):
            prefetch(arena, (soon_N[n],), line)


@compiled
def _add_depth(
    sums_TC: Any,
    tokens: int,
    x_TI: Any,
    x: int,
    words: Any,
    table: Any,
    values: Any,
    absmax_JLC: Any,
    place: int,
) -> None:
    """Add 64 in features, from the first token's at x on, to the sums. `place` is where their scales lie, and
    _GROUP-th of their codes.
    """
    width = x_TI.shape[1]
    word, scales = place // _GROUP * _WORDS, load(absmax_JLC, _row_of_vectors(place), 0)
    token = 0
    if tokens >= _MANY:
        _look_up_depth(values, words, word, table)
        while token + _TILE <= tokens:
            at, row = token * _COLUMNS, x + token * width
            _add_kept(sums_TC, _five(at, _COLUMNS), x_TI, _five(row, width), values, scales)
            token += _TILE
    while token < tokens:
        at, row, rest = token * _COLUMNS, x + token * width, tokens - token
        if rest == 1:
            _add_found(sums_TC, (at,), x_TI, (row,), words, word, table, scales, zeros(4))
        elif rest == 2:
            into, rows = (at, at + _COLUMNS), (row, row + width)
            _add_found(sums_TC, into, x_TI, rows, words, word, table, scales, zeros(8))
        else:
            into, rows = _four(at, rest, _COLUMNS), _four(row, rest, width)
            _add_found(sums_TC, into, x_TI, rows, words, word, table, scales, zeros(16))
        token += _FEW


@compiled
def _row_of_vectors(start: int) -> Any:
    return (start, start + LANES, start + 2 * LANES, start + 3 * LANES)


@compiled
def _four(start: int, count: int, stride: int) -> Any:
    """Where four tokens begin. Where tokens run out, the last is taken again."""
    last = min(count, _FEW) - 1
    return (start, start + min(1, last) * stride, start + min(2, last) * stride, start + last * stride)


@compiled
def _five(start: int, stride: int) -> Any:
    return (start, start + stride, start + 2 * stride, start + 3 * stride, start + 4 * stride)


@compiled
def _look_up_depth(values: Any, words: Any, word: int, table: Any) -> None:
    """The numbers of 64 in features, pair by pair."""
    for group in range(_DEPTH // _GROUP):
        codes, at = load_pairs(words, word + group * _WORDS, 4), group * 4 * _WORDS
        store_pairs(values, at, look_up(table, codes, 0))
        store_pairs(values, at + _WORDS, look_up(table, codes, 1))
        store_pairs(values, at + 2 * _WORDS, look_up(table, codes, 2))
        store_pairs(values, at + 3 * _WORDS, look_up(table, codes, 3))


@compiled
def _add_kept(sums_TC: Any, into: Any, x_TI: Any, rows: Any, values: Any, scales: Any) -> None:
    """Multiply a tile of tokens with what was looked up."""
    own = zeros(20)
    for pair in range(_DEPTH // 2):
        own = add_products(own, x_TI, rows, 2 * pair, load_pairs(values, pair * _WORDS, 4))
    add_scaled(sums_TC, into, own, scales)


@compiled
def _add_found(
    sums_TC: Any, into: Any, x_TI: Any, rows: Any, words: Any, word: int, table: Any, scales: Any, own: Any
) -> None:
    """Multiply a tile of tokens with what is looked up meanwhile; `own` are zeros, one a token and vector."""
    for group in range(_DEPTH // _GROUP):
        codes, at = load_pairs(words, word + group * _WORDS, 4), group * _GROUP
        own = add_products(own, x_TI, rows, at, look_up(table, codes, 0))
        own = add_products(own, x_TI, rows, at + 2, look_up(table, codes, 1))
        own = add_products(own, x_TI, rows, at + 4, look_up(table, codes, 2))
        own = add_products(own, x_TI, rows, at + 6, look_up(table, codes, 3))
    add_scaled(sums_TC, into, own, scales)


@compiled
def _write(y_TO: Any, first: int, tokens: int, column: int, sums_TC: Any) -> None:
    width = y_TO.shape[1]
    for token in range(tokens):
        sums = load_span(sums_TC, token * _COLUMNS, SPAN)
        store_span(y_TO, (first + token) * width + column, sums, width - column)
