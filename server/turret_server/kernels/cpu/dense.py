"""The product with a weight that is not quantised, the head's above all.

Few tokens make it a matter of reading the weight once, from memory, in the order in which it lies there:
matrix libraries take three times as long. Four rows of the weight are multiplied with four tokens at a
time; each product is summed lane by lane over the features, in float32, whatever the other tokens are.
"""

from __future__ import annotations

from typing import Any

import torch

from turret_server.kernels.cpu.jit import as_array, compiled
from turret_server.kernels.cpu.lanes import lane_sums, prefetch, zeros
from turret_server.kernels.cpu.pairs import PAIRS, add_dots
from turret_server.kernels.cpu.parallel import on_all_threads

_AHEAD = 4
_TILE = 4  # rows, and tokens, whose products are in registers together


def fits(weight_OI: torch.Tensor) -> bool:
    """Whether `linear` takes it."""
    return weight_OI.is_contiguous() and not weight_OI.shape[1] % PAIRS


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """See `ops.Ops`."""
    y_TO = torch.empty(len(x_TI), len(weight_OI), dtype=torch.float32)
    _linear(y_TO.numpy(), as_array(x_TI.contiguous()), as_array(weight_OI))
    return y_TO.to(x_TI.dtype)


@compiled
def _linear(y_TO: Any, x_TI: Any, weight_OI: Any) -> None:
    on_all_threads(_multiply, (y_TO, x_TI, weight_OI))


@compiled
def _multiply(worker: int, workers: int, y_TO: Any, x_TI: Any, weight_OI: Any) -> None:
    """This worker's rows of the weight, which lie together."""
    num_tokens, num_rows = y_TO.shape
    width = x_TI.shape[1]
    num_tiles = -(-num_rows // _TILE)
    for tile in range(num_tiles * worker // workers, num_tiles * (worker + 1) // workers):
        row = tile * _TILE
        rows = _four(row * width, num_rows - row, width)
        columns = min(_TILE, num_rows - row)
        token = 0
        while token < num_tokens:
            x, count = token * width, min(_TILE, num_tokens - token)
            if count == 1:
                of_one = _products(zeros(4), x_TI, (x,), weight_OI, rows, width)
                for j in range(columns):
                    y_TO[token, row + j] = of_one[j]
            else:
                products = _products(zeros(16), x_TI, _four(x, count, width), weight_OI, rows, width)
                for i in range(count):
                    for j in range(columns):
                        y_TO[token + i, row + j] = products[i * _TILE + j]
            token += _TILE


@compiled
def _four(start: int, count: int, stride: int) -> Any:
    """Where four rows begin. Where rows run out, the last is taken again."""
    last = min(count, _TILE) - 1
    return (start, start + min(1, last) * stride, start + min(2, last) * stride, start + last * stride)


@compiled
def _products(sums: Any, x: Any, x_starts: Any, weight: Any, starts: Any, width: int) -> Any:
    """Every token times every row; `sums` are zeros, one a product."""
    ahead = min(_AHEAD * width, len(weight) * width - starts[0] - 4 * width)
    for i in range(0, width, PAIRS):
        prefetch(weight, starts, i + ahead)
        sums = add_dots(sums, x, x_starts, weight, starts, i)
    return lane_sums(sums)
