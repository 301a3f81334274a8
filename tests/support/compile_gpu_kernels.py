"""Compile every GPU kernel for GPUs that need not be there, and print what each takes of a multiprocessor:
python -m support.compile_gpu_kernels [--sm 80 ...] [--dtype bfloat16 ...] [--head-dim 128 ...]

Triton's compiler needs no GPU, only to be told of one. The ops run in full, on tensors of the CPU, but
kernels are compiled where they would be launched. A GPU's shared memory bounds what a program may have of it;
a stack holds what no register is left for.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

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
COLUMNS = "{:>2}  {:<8}  {:<14}  {:>6}  {:>5}  {:>9}  {}"


class Driver:
    """What Triton asks of a driver in order to compile for a GPU of compute capability `sm`."""

    def __init__(self, sm):
        self._sm = sm

    def get_current_target(self):
        return GPUTarget("cuda", self._sm, 32)

    def get_current_device(self):
        return self._sm

    def get_current_stream(self, device):
        return device


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 86, 89, 90])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 80, 128, 256])
    chosen = parser.parse_args()
    print(COLUMNS.format("sm", "dtype", "kernel", "shared", "stack", "registers", "shape"))  # noqa: T201
    for sm, dtype in product(chosen.sm, chosen.dtype):
        for (name, shape), kernel in compiled_kernels(sm, getattr(torch, dtype), chosen.head_dim).items():
            registers, stack = usage(kernel.asm["cubin"])
            row = COLUMNS.format(sm, dtype, name, kernel.metadata.shared, stack, registers, shape)
            print(row, flush=True)  # noqa: T201


def compiled_kernels(sm, dtype, head_dims):
    """By the kernel's name and its constants, tiles above all."""
    triton.runtime.driver.set_active(Driver(sm))
    compiled = {}

    def compile_only(function, grid):
        def launch(*arguments, **options):
            kernel = function.run(*arguments, grid=grid, warmup=True, **options)
            shape = ",".join(f"{name}={value}" for name, value in options.items())
            compiled[function.__name__, shape] = kernel

        return launch

    JITFunction.__getitem__ = compile_only
    run_every_op(dtype, head_dims)
    return compiled


def run_every_op(dtype, head_dims):
    ops = GpuOps()
    data, state = quantize_4bit(
        torch.randn(128, 512, dtype=dtype), quant_type="nf4", compress_statistics=True
    )
    packed = ops.pack_nf4(NF4Weight(data, state, 512, 128))
    for num_tokens in (1, 64, 65):
        ops.nf4_linear(torch.randn(num_tokens, 512, dtype=dtype), packed)
    ops.rms_norm(torch.randn(3, 512, dtype=dtype), torch.randn(512, dtype=dtype), 1e-5)
    ops.silu_multiply(*torch.randn(2, 3, 512, dtype=dtype))
    ops.rotate(torch.randn(3, 4, 64, dtype=dtype), *torch.randn(2, 3, 64, dtype=dtype))
    arena, rows = lora(dtype, 512, 128, [(0, 1, 16), (1, 40, 5)], device=CPU)
    ops.lora_add(torch.randn(40, 128, dtype=dtype), torch.randn(40, 512, dtype=dtype), arena, rows)
    gather(StepRows.empty(3, 2, CPU), torch.zeros(2, 4, dtype=torch.int32), torch.zeros(8, 3).long())
    several = {"window": 9, "softcap": 2.0, "sinks": True}
    for head_dim, (group, options) in product(head_dims, ((4, several), (32, {}))):
        kv, batch = paged(dtype, [(1, 300), (60, 60)], head_dim=head_dim, device=CPU)
        ops.write_kv(kv, *torch.randn(2, 61, 2, head_dim, dtype=dtype), batch)
        query = torch.randn(61, 2 * group, head_dim, dtype=dtype)
        for causal in (True, False):
            how = params(2 * group, head_dim, **options, causal=causal, device=CPU)
            ops.paged_attention(query, kv, batch, how)


def usage(cubin):
    """A thread's registers and the bytes of its stack."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", found)
    return registers, stack


if __name__ == "__main__":
    main()
