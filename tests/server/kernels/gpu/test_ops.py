from __future__ import annotations

import sys

import pytest
import torch

from turret_server.kernels import ReferenceOps, select_ops


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux alone")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_takes_the_kernels_for_gpus(dtype):
    from turret_server.kernels.gpu.ops import GpuOps  # noqa: PLC0415

    assert isinstance(select_ops(torch.device("cuda"), dtype), GpuOps)


def test_a_gpu_without_triton_takes_the_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert isinstance(select_ops(torch.device("cuda"), torch.bfloat16), ReferenceOps)
