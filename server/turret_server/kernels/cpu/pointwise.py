"""RMSNorm, SwiGLU and the rotary embedding, each in one pass over memory, where torch takes several.

For shape suffixes see `ops.py`; arrays without letters are flat, with rows that may lie apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from turret_server.kernels.cpu.llvm.jit import as_array, as_rows, compiled
from turret_server.kernels.cpu.llvm.parallel import run_parallel
from turret_server.kernels.cpu.llvm.vectors import (
    LANES,
    add,
    broadcast,
    divide,
    exp,
    fma_outer,
    load,
    load_masked,
    maximum,
    multiply,
    reduce_add,
    rounded,
    store,
    store_masked,
    subtract,
    zeros,
)
from turret_server.kernels.reference import ReferenceOps

_MANY = 64  # tokens for which the other threads are woken
_LOWEST = np.float32(-87)  # up to exp(87) is finite; the sigmoid of anything lower is as good as zero


def rms_norm(x_TI: torch.Tensor, weight_I: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See `ops.Ops`."""
    x_TI = x_TI.contiguous()
    y_TI = torch.empty_like(x_TI)
    _rms_norm(as_array(y_TI), as_array(x_TI), as_array(weight_I), epsilon)
    return y_TI


def silu_multiply(gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
    """See `ops.Ops`."""
    y_TI = gate_TI.new_empty(gate_TI.shape)
    _silu_multiply(as_array(y_TI), as_rows(gate_TI), as_rows(up_TI))
    return y_TI


def rotate(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """See `ops.Ops`."""
    if x_THD.shape[2] % (2 * LANES):
        return ReferenceOps().rotate(x_THD, cos_TD, sin_TD)
    y_THD = x_THD.new_empty(x_THD.shape)
    angles = as_array(cos_TD.contiguous()), as_array(sin_TD.contiguous())
    _rotate(as_array(y_THD), as_rows(x_THD.flatten(1)), *angles)
    return y_THD


@compiled
def _rms_norm(y_TI: Any, x_TI: Any, weight_I: Any, epsilon: float) -> None:
    """RMSNorm (arXiv 1910.07467) in one pass over memory, where torch takes six."""
    arguments = (y_TI, x_TI, weight_I, np.float32(epsilon))
    if len(x_TI) < _MANY:
        _rms_norm_tokens(0, 1, arguments)
    else:
        run_parallel(_rms_norm_tokens, arguments)


@compiled
def _rms_norm_tokens(worker: int, workers: int, arguments: Any) -> None:
    """This worker's tokens."""
    y_TI, x_TI, weight_I, epsilon = arguments
    num_tokens, width = x_TI.shape
    full = width - width % LANES
    for token in range(num_tokens * worker // workers, num_tokens * (worker + 1) // workers):
        start = token * width
        squares = zeros(1)
        for i in range(0, full, LANES):
            x = load(x_TI, (start,), i)
            squares = fma_outer(squares, x, x)
        if full < width:
            x = load_masked(x_TI, (start,), full, width - full)
            squares = fma_outer(squares, x, x)
        mean = reduce_add(squares)[0] / np.float32(width)
        scale = broadcast(np.float32(1) / np.sqrt(mean + epsilon))
        for i in range(0, full, LANES):
            # Stored and loaded again: x̂ is rounded to the dtype before it is weighted.
            store(y_TI, start + i, multiply(load(x_TI, (start,), i)[0], scale))
            rounded = load(y_TI, (start,), i)[0]
            store(y_TI, start + i, multiply(rounded, load(weight_I, (0,), i)[0]))
        if full < width:
            rest = width - full
            x = load_masked(x_TI, (start,), full, rest)
            store_masked(y_TI, start + full, multiply(x[0], scale), rest)
            rounded = load_masked(y_TI, (start,), full, rest)[0]
            weighted = multiply(rounded, load_masked(weight_I, (0,), full, rest)[0])
            store_masked(y_TI, start + full, weighted, rest)


@compiled
def _silu_multiply(y_TI: Any, gate: Any, up: Any) -> None:
    if len(y_TI) < _MANY:
        _silu_multiply_tokens(0, 1, (y_TI, gate, up))
    else:
        run_parallel(_silu_multiply_tokens, (y_TI, gate, up))


@compiled
def _silu_multiply_tokens(worker: int, workers: int, arguments: Any) -> None:
    """This worker's tokens."""
    y_TI, (gate, gate_stride), (up, up_stride) = arguments
    num_tokens, width = y_TI.shape
    full = width - width % LANES
    for token in range(num_tokens * worker // workers, num_tokens * (worker + 1) // workers):
        at, of_gate, of_up = token * width, token * gate_stride, token * up_stride
        for i in range(0, full, LANES):
            value = rounded(y_TI, _silu(load(gate, (of_gate,), i)[0]))
            store(y_TI, at + i, multiply(value, load(up, (of_up,), i)[0]))
        if full < width:
            rest = width - full
            value = rounded(y_TI, _silu(load_masked(gate, (of_gate,), full, rest)[0]))
            store_masked(y_TI, at + full, multiply(value, load_masked(up, (of_up,), full, rest)[0]), rest)


@compiled
def _silu(x: Any) -> Any:
    """X · sigmoid(x) = x / (1 + exp(−x))."""
    negative = subtract(broadcast(np.float32(0)), maximum(x, broadcast(_LOWEST)))
    return divide(x, add(broadcast(np.float32(1)), exp(negative)))


@compiled
def _rotate(y_THD: Any, x: Any, cos_TD: Any, sin_TD: Any) -> None:
    if len(y_THD) < _MANY:
        _rotate_tokens(0, 1, (y_THD, x, cos_TD, sin_TD))
    else:
        run_parallel(_rotate_tokens, (y_THD, x, cos_TD, sin_TD))


@compiled
def _rotate_tokens(worker: int, workers: int, arguments: Any) -> None:
    """This worker's tokens."""
    y_THD, (x, stride), cos_TD, sin_TD = arguments
    num_tokens, num_heads, width = y_THD.shape
    half = width // 2
    zero = broadcast(np.float32(0))
    for token in range(num_tokens * worker // workers, num_tokens * (worker + 1) // workers):
        for i in range(0, half, LANES):
            angle = token * width + i
            cos_first, cos_second = load(cos_TD, (angle, angle + half), 0)
            sin_first, sin_second = load(sin_TD, (angle, angle + half), 0)
            for head in range(num_heads):
                at = token * stride + head * width + i
                first, second = load(x, (at, at + half), 0)
                into = (token * num_heads + head) * width + i
                turned = rounded(y_THD, multiply(subtract(zero, second), sin_first))
                store(y_THD, into, add(rounded(y_THD, multiply(first, cos_first)), turned))
                turned = rounded(y_THD, multiply(first, sin_second))
                store(y_THD, into + half, add(rounded(y_THD, multiply(second, cos_second)), turned))
