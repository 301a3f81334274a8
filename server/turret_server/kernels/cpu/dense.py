"""The product with a weight that is not quantised: the head.

With few tokens, its time is that of reading the weight once, in memory order; a matrix library takes three
times as long. Four rows of the weight are multiplied by four tokens at a time. Each product is summed lane by
lane over the features in float32, in the same order whatever the other tokens are.
"""

from __future__ import annotations

from typing import Any

import torch

from turret_server.kernels.cpu.llvm.jit import as_array, compiled
from turret_server.kernels.cpu.llvm.pairs import PAIR_WIDTH, dot_rows
from turret_server.kernels.cpu.llvm.parallel import run_parallel
from turret_server.kernels.cpu.llvm.vectors import prefetch_line, reduce_add, zeros

_TILE = 4  # rows, and tokens, whose products are in registers together
_PREFETCH_AHEAD = 4  # rows between the product and the prefetch


def is_supported(weight_OI: torch.Tensor) -> bool:
    """Whether `linear` takes the weight: contiguous, with whole vectors of pairs in a row."""
    return weight_OI.is_contiguous() and not weight_OI.shape[1] % PAIR_WIDTH


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """See `ops.Ops`."""
    y_TO = torch.empty(len(x_TI), len(weight_OI), dtype=torch.float32)
    _linear(y_TO.numpy(), as_array(x_TI.contiguous()), as_array(weight_OI))
    return y_TO.to(x_TI.dtype)


@compiled
def _linear(y_TO: Any, x_TI: Any, weight_OI: Any) -> None:
    run_parallel(_linear_rows, (y_TO, x_TI, weight_OI))


@compiled
def _linear_rows(worker: int, workers: int, arguments: Any) -> None:
    """This worker's rows of the weight, which are consecutive."""
    y_TO, x_TI, weight_OI = arguments
    num_tokens, num_rows = y_TO.shape
    width = x_TI.shape[1]
    num_tiles = -(-num_rows // _TILE)
    for tile in range(num_tiles * worker // workers, num_tiles * (worker + 1) // workers):
        row = tile * _TILE
        rows = (weight_OI, _tile_starts(row * width, num_rows - row, width))
        columns = min(_TILE, num_rows - row)
        token = 0
        while token < num_tokens:
            x, count = token * width, min(_TILE, num_tokens - token)
            if count == 1:
                of_one = _products(zeros(4), (x_TI, (x,)), rows, width)
                for j in range(columns):
                    y_TO[token, row + j] = of_one[j]
            else:
                products = _products(zeros(16), (x_TI, _tile_starts(x, count, width)), rows, width)
                for i in range(count):
                    for j in range(columns):
                        y_TO[token + i, row + j] = products[i * _TILE + j]
            token += _TILE


@compiled
def _tile_starts(start: int, count: int, stride: int) -> Any:
    """Where four rows begin; if there are fewer, the last is repeated."""
    last = min(count, _TILE) - 1
    return (start, start + min(1, last) * stride, start + min(2, last) * stride, start + last * stride)


@compiled
def _products(sums: Any, x: Any, rows: Any, width: int) -> Any:
    """Every token times every row of the weight, as (array, starts); `sums` are one zero vector a product."""
    weight, starts = rows
    prefetch_ahead = min(_PREFETCH_AHEAD * width, len(weight) * width - starts[0] - 4 * width)
    for i in range(0, width, PAIR_WIDTH):
        prefetch_line(weight, starts, i + prefetch_ahead)
        sums = dot_rows(sums, x, rows, i)
    return reduce_add(sums)
