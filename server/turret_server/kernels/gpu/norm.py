"""RMSNorm on a GPU, a row to a program; its sum does not depend on the other rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret_server.kernels.gpu.jit import kernel


def rms_norm(x_TI: torch.Tensor, weight_I: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See `ops.Ops`."""
    x_TI = x_TI.contiguous()
    num_rows, width = x_TI.shape
    y_TI = torch.empty_like(x_TI, dtype=torch.promote_types(x_TI.dtype, weight_I.dtype))
    whole = triton.next_power_of_2(width)
    _norm[(num_rows,)](
        y_TI, x_TI, weight_I, epsilon, width, WHOLE=whole, num_warps=max(1, min(8, whole // 256))
    )
    return y_TI


@kernel()
def _norm(
    y_TI: tl.tensor,
    x_TI: tl.tensor,
    weight_I: tl.tensor,
    epsilon: tl.tensor,
    width: tl.tensor,
    WHOLE: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, WHOLE)
    inside = column < width
    stored = tl.load(x_TI + start + column, inside, 0.0)
    x = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    weight = tl.load(weight_I + column, inside, 0.0).to(tl.float32)
    tl.store(y_TI + start + column, (x * scale).to(stored.dtype).to(tl.float32) * weight, inside)
