"""Which ops a GPU gets, and RMSNorm on a GPU or in Triton's interpreter against the reference."""

from __future__ import annotations

import sys

import pytest
import torch

from support.kernel_inputs import DEVICE
from turret_server.kernels import ReferenceOps, select_ops
from turret_server.kernels.gpu.ops import GpuOps

TOLERANCES = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_takes_the_kernels_for_gpus(dtype):
    assert isinstance(select_ops(torch.device("cuda"), dtype), GpuOps)


def test_a_gpu_without_triton_takes_the_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert isinstance(select_ops(torch.device("cuda"), torch.bfloat16), ReferenceOps)


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
