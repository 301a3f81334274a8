"""Which ops a GPU gets."""

from __future__ import annotations

import sys

import pytest
import torch

from turret_server.kernels import ReferenceOps, select_ops
from turret_server.kernels.gpu.ops import GpuOps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_takes_the_kernels_for_gpus(dtype):
    assert isinstance(select_ops(torch.device("cuda"), dtype), GpuOps)


def test_a_gpu_without_triton_takes_the_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert isinstance(select_ops(torch.device("cuda"), torch.bfloat16), ReferenceOps)
