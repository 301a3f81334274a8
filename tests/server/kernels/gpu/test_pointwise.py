"""RMSNorm, SwiGLU and the rotary embedding on a GPU or in Triton's interpreter against the reference."""

from __future__ import annotations

import pytest
import torch

from support.kernel_inputs import DEVICE
from turret_server.kernels import ReferenceOps
from turret_server.kernels.gpu.ops import GpuOps

TOLERANCES = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("weight_dtype", TOLERANCES)
@pytest.mark.parametrize("width", [1, 100, 1024])
def test_rows_are_normed_as_the_reference_norms_them(dtype, weight_dtype, width):
    x = torch.randn(width, 3, dtype=dtype, device=DEVICE).T * 5
    weight = torch.randn(width, dtype=weight_dtype, device=DEVICE)
    found = GpuOps().rms_norm(x, weight, 1e-5)
    tolerance = max(TOLERANCES[dtype], TOLERANCES[weight_dtype])
    torch.testing.assert_close(
        found, ReferenceOps().rms_norm(x, weight, 1e-5), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 16), (3, 1100)])
def test_gates_are_those_of_the_reference(dtype, num_tokens, width):
    gate, up = torch.randn(num_tokens, 2 * width, dtype=dtype, device=DEVICE).split(width, dim=1)
    found = GpuOps().silu_multiply(gate, up)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found, ReferenceOps().silu_multiply(gate, up), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_heads", "width"), [(1, 64), (3, 48), (40, 128)])
def test_heads_are_rotated_as_the_reference_rotates_them(dtype, num_heads, width):
    both = torch.randn(3, 2 * num_heads * width, dtype=dtype, device=DEVICE)
    x = both[:, num_heads * width :].view(3, num_heads, width)
    cos, sin = torch.randn(2, 3, width, dtype=dtype, device=DEVICE)
    found, tolerance = GpuOps().rotate(x, cos, sin), TOLERANCES[dtype]
    # Triton's interpreter cuts bfloat16 off in place of rounding.
    torch.testing.assert_close(found, ReferenceOps().rotate(x, cos, sin), atol=4 * tolerance, rtol=tolerance)
