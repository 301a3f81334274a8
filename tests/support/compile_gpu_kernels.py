"""Compile every GPU kernel for a GPU that need not be there: TRITON_INTERPRET=0
python -m support.compile_gpu_kernels DTYPE.

Triton's compiler needs no GPU, only to be told of one. The ops run in full, on tensors of the CPU, but
kernels are compiled where they would be launched.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import triton
from bitsandbytes.functional import quantize_4bit
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from support.kernel_inputs import lora, paged, params
from turret_server.kernels import NF4Weight
from turret_server.kernels.gpu.ops import GpuOps
from turret_server.kernels.gpu.rows import StepRows, gather

CPU = torch.device("cpu")


class Hopper:
    """What Triton asks of a driver in order to compile."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return device


def main(dtype):
    triton.runtime.driver.set_active(Hopper())
    compiled = set()

    def compile_only(function, grid):
        compiled.add(function.__name__)
        return partial(function.run, grid=grid, warmup=True)

    JITFunction.__getitem__ = compile_only
    ops = GpuOps(dtype)
    data, state = quantize_4bit(
        torch.randn(128, 512, dtype=dtype), quant_type="nf4", compress_statistics=True
    )
    packed = ops.pack_nf4(NF4Weight(data, state, 512, 128))
    for num_tokens in (1, 64, 65):
        ops.nf4_linear(torch.randn(num_tokens, 512, dtype=dtype), packed)
    ops.rms_norm(torch.randn(3, 512, dtype=dtype), torch.randn(512, dtype=dtype), 1e-5)
    arena, rows = lora(dtype, 512, 128, [(0, 1, 16), (1, 40, 5)], device=CPU)
    ops.lora_add(torch.randn(40, 128, dtype=dtype), torch.randn(40, 512, dtype=dtype), arena, rows)
    gather(StepRows.empty(3, 2, CPU), torch.zeros(2, 4, dtype=torch.int32), torch.zeros(8, 3).long())
    for head_dim, options in ((64, {}), (80, {"window": 9, "softcap": 2.0, "sinks": True})):
        kv, batch = paged(dtype, [(1, 300), (60, 60)], head_dim=head_dim, device=CPU)
        kv_new = torch.randn(2, 61, 2, head_dim, dtype=dtype)
        ops.write_kv(kv, *kv_new, batch)
        query = torch.randn(61, 8, head_dim, dtype=dtype)
        ops.paged_attention(query, kv, batch, params(8, head_dim, **options, device=CPU))
    print(*sorted(compiled))  # noqa: T201


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
