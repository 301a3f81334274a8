"""The ops of a device and a dtype: one table, selected once."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from bitsandbytes.functional import has_avx512bf16

from turret_server.kernels.cpu.ops import CpuOps
from turret_server.kernels.ops import (
    AttentionBatch,
    AttentionParams,
    LoraRows,
    NF4Weight,
    Ops,
    PackedNF4Weight,
)
from turret_server.kernels.reference import ReferenceOps

__all__ = [
    "AttentionBatch",
    "AttentionParams",
    "CpuOps",
    "LoraRows",
    "NF4Weight",
    "Ops",
    "PackedNF4Weight",
    "ReferenceOps",
    "has_avx512bf16",
    "select_ops",
]


def select_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """The fastest implementation for `dtype` on `device`."""
    if device.type == "cuda" and find_spec("triton"):
        from turret_server.kernels.gpu.ops import GpuOps  # noqa: PLC0415 (Triton is optional)

        return GpuOps()
    if device.type == "cpu" and dtype in {torch.bfloat16, torch.float32}:
        return CpuOps(dtype)
    return ReferenceOps()
