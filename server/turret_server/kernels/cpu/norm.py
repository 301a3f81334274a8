"""RMS norm (arXiv 1910.07467) in one pass over memory, where torch takes six.

What a token gets is summed in one order. A step of few tokens is faster on one thread than on several.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from turret_server.kernels.cpu.jit import as_array, compiled
from turret_server.kernels.cpu.lanes import (
    LANES,
    add_outer,
    lane_sums,
    load,
    load_first,
    multiply,
    splat,
    store,
    store_first,
    zeros,
)
from turret_server.kernels.cpu.parallel import on_all_threads

_MANY = 64  # tokens that are worth waking the other threads


def rms_norm(x_TI: torch.Tensor, weight_I: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See `ops.Ops`."""
    x_TI = x_TI.contiguous()
    y_TI = torch.empty_like(x_TI)
    _norm(as_array(y_TI), as_array(x_TI), as_array(weight_I), epsilon)
    return y_TI


@compiled
def _norm(y_TI: Any, x_TI: Any, weight_I: Any, epsilon: float) -> None:
    if len(x_TI) < _MANY:
        _norm_some(0, 1, y_TI, x_TI, weight_I, epsilon)
    else:
        on_all_threads(_norm_some, (y_TI, x_TI, weight_I, epsilon))


@compiled
def _norm_some(worker: int, workers: int, y_TI: Any, x_TI: Any, weight_I: Any, epsilon: float) -> None:
    """This worker's tokens."""
    num_tokens, width = x_TI.shape
    full = width - width % LANES
    for token in range(num_tokens * worker // workers, num_tokens * (worker + 1) // workers):
        start = token * width
        squares = zeros(1)
        for i in range(0, full, LANES):
            x = load(x_TI, (start,), i)
            squares = add_outer(squares, x, x)
        if full < width:
            x = load_first(x_TI, (start,), full, width - full)
            squares = add_outer(squares, x, x)
        mean = lane_sums(squares)[0] / np.float32(width)
        scale = splat(np.float32(1) / np.sqrt(mean + np.float32(epsilon)))
        for i in range(0, full, LANES):
            store(y_TI, start + i, multiply(load(x_TI, (start,), i)[0], scale))
            rounded = load(y_TI, (start,), i)[0]
            store(y_TI, start + i, multiply(rounded, load(weight_I, (0,), i)[0]))
        if full < width:
            rest = width - full
            store_first(y_TI, start + full, multiply(load_first(x_TI, (start,), full, rest)[0], scale), rest)
            rounded = load_first(y_TI, (start,), full, rest)[0]
            weighted = multiply(rounded, load_first(weight_I, (0,), full, rest)[0])
            store_first(y_TI, start + full, weighted, rest)
