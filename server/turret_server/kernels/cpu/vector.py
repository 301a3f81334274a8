"""What the CPU kernels do with vectors: products of rows, spans of columns, the exponential."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from turret_server.kernels.cpu.jit import compiled
from turret_server.kernels.cpu.lanes import (
    LANES,
    add,
    add_outer,
    lane_sums,
    load,
    load_first,
    maximum,
    multiply,
    scale_by_power,
    splat,
    store,
    store_first,
    subtract,
    whole,
    zero_below,
)
from turret_server.kernels.cpu.pairs import PAIRS, add_dots

SPAN = 4 * LANES


@compiled
def dots(sums: Any, a: Any, a_starts: Any, b: Any, b_starts: Any, width: int) -> Any:
    """Every row of `a` times every row of `b`, `width` elements each; `sums` are zeros, one a product."""
    full = width - width % PAIRS
    for i in range(0, full, PAIRS):
        sums = add_dots(sums, a, a_starts, b, b_starts, i)
    for i in range(full, width, LANES):
        rest = width - i
        sums = add_outer(sums, load_first(a, a_starts, i, rest), load_first(b, b_starts, i, rest))
    return lane_sums(sums)


@compiled
def load_span(array: Any, start: int, count: int) -> Any:
    """Four vectors that follow each other, as far as `count` reaches."""
    starts = (start, start + LANES, start + 2 * LANES, start + 3 * LANES)
    if count >= SPAN:
        return load(array, starts, 0)
    return (
        load_first(array, starts[0:1], 0, count)
        + load_first(array, starts[1:2], 0, count - LANES)
        + load_first(array, starts[2:3], 0, count - 2 * LANES)
        + load_first(array, starts[3:4], 0, count - 3 * LANES)
    )


@compiled
def store_span(array: Any, start: int, vectors: Any, count: int) -> None:
    """Write four vectors one after the other, as far as `count` reaches."""
    if count >= SPAN:
        for i in range(4):
            store(array, start + i * LANES, vectors[i])
    else:
        for i in range(4):
            store_first(array, start + i * LANES, vectors[i], count - i * LANES)


_SMALLEST = np.float32(-87.0)
_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # few enough bits that whole multiples are exact
_LN2_LOW = np.float32(-2.12194440e-4)
_TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(7, -1, -1))


@compiled
def exp(x: Any) -> Any:
    """Lanewise exponential of numbers up to 88, within 2e-7 of its value; zero below −87."""
    clamped = maximum(x, splat(_SMALLEST))
    power = whole(multiply(clamped, splat(_LOG2E)))
    rest = subtract(subtract(clamped, multiply(power, splat(_LN2_HIGH))), multiply(power, splat(_LN2_LOW)))
    value = splat(_TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        value = add(multiply(value, rest), splat(coefficient))
    return zero_below(scale_by_power(value, power), x, splat(_SMALLEST))
