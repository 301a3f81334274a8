"""RMSNorm, SwiGLU and the rotary embedding, each in one launch, whose tokens do not depend on each other.

For shape suffixes see `ops.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret_server.kernels.gpu.jit import kernel

_WIDTH = 1024  # numbers of a program


def rms_norm(x_TI: torch.Tensor, weight_I: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See `ops.Ops`."""
    x_TI = x_TI.contiguous()
    num_rows, width = x_TI.shape
    y_TI = torch.empty_like(x_TI, dtype=torch.promote_types(x_TI.dtype, weight_I.dtype))
    padded = triton.next_power_of_2(width)
    num_warps = max(1, min(8, padded // 256))
    _rms_norm[(num_rows,)](y_TI, x_TI, weight_I, epsilon, width, WHOLE=padded, num_warps=num_warps)
    return y_TI


def silu_multiply(gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
    """See `ops.Ops`."""
    num_rows, width = gate_TI.shape
    y_TI = gate_TI.new_empty(gate_TI.shape)
    grid = num_rows, triton.cdiv(width, _WIDTH)
    strides = gate_TI.stride(0), up_TI.stride(0)
    _silu_multiply[grid](y_TI, gate_TI, up_TI, *strides, width, WIDTH=_WIDTH, num_warps=4)
    return y_TI


def rotate(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """See `ops.Ops`."""
    num_tokens, num_heads, width = x_THD.shape
    if x_THD.stride(2) != 1 or x_THD.stride(1) != width:
        x_THD = x_THD.contiguous()
    y_THD = x_THD.new_empty(x_THD.shape)
    half = triton.next_power_of_2(width // 2)
    heads = max(1, min(triton.next_power_of_2(num_heads), _WIDTH // half))
    grid = num_tokens, triton.cdiv(num_heads, heads)
    shape = x_THD.stride(0), num_heads, width
    _rotate[grid](y_THD, x_THD, cos_TD, sin_TD, *shape, HEADS=heads, HALF=half, num_warps=4)
    return y_THD


@kernel()
def _rms_norm(
    y_TI: tl.tensor,
    x_TI: tl.tensor,
    weight_I: tl.tensor,
    epsilon: tl.tensor,
    width: tl.tensor,
    WHOLE: tl.constexpr,
) -> None:
    """A row to a program; its sum does not depend on the other rows."""
    start = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, WHOLE)
    inside = column < width
    stored = tl.load(x_TI + start + column, inside, 0.0)
    x = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    weight = tl.load(weight_I + column, inside, 0.0).to(tl.float32)
    tl.store(y_TI + start + column, (x * scale).to(stored.dtype).to(tl.float32) * weight, inside)


@kernel()
def _silu_multiply(
    y_TI: tl.tensor,
    gate_TI: tl.tensor,
    up_TI: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    width: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    stored = tl.load(gate_TI + token * gate_stride + column, inside, 0.0)
    gate = stored.to(tl.float32)
    up = tl.load(up_TI + token * up_stride + column, inside, 0.0).to(tl.float32)
    value = (gate / (1 + tl.exp(-gate))).to(stored.dtype).to(tl.float32)
    tl.store(y_TI + token * width + column, value * up, inside)


@kernel()
def _rotate(
    y_THD: tl.tensor,
    x_THD: tl.tensor,
    cos_TD: tl.tensor,
    sin_TD: tl.tensor,
    stride: tl.tensor,
    num_heads: tl.tensor,
    width: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """Some heads of a token to a program."""
    token, half = tl.program_id(0).to(tl.int64), width // 2
    head, i = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    at, inside = head[:, None] * width + i[None, :], (head < num_heads)[:, None] & (i < half)[None, :]
    stored = tl.load(x_THD + token * stride + at, inside, 0.0)
    first = stored.to(tl.float32)
    second = tl.load(x_THD + token * stride + at + half, inside, 0.0).to(tl.float32)
    angle, valid = token * width + i, i < half
    cos_first = tl.load(cos_TD + angle, valid, 0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos_TD + angle + half, valid, 0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin_TD + angle, valid, 0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin_TD + angle + half, valid, 0.0).to(tl.float32)[None, :]
    into = y_THD + token * num_heads * width + at
    kept = (first * cos_first).to(stored.dtype).to(tl.float32)
    tl.store(into, kept + (-second * sin_first).to(stored.dtype).to(tl.float32), inside)
    kept = (second * cos_second).to(stored.dtype).to(tl.float32)
    tl.store(into + half, kept + (first * sin_second).to(stored.dtype).to(tl.float32), inside)
