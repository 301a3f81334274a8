"""Compare the NF4 product with the reference's in a process of its own: python -m support.nf4_product DTYPE.

For which CPU numba compiles, NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say before it is imported.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from bitsandbytes.functional import quantize_4bit

from turret_server.kernels import NF4Weight, PackedNF4Weight, ReferenceOps
from turret_server.kernels.cpu import nf4 as cpu_nf4
from turret_server.kernels.cpu.llvm.jit import as_array


def main(dtype):
    data, state = quantize_4bit(torch.randn(72, 128), quant_type="nf4", compress_statistics=True)
    weight = NF4Weight(data, state, 128, 72)
    packed = cpu_nf4.pack(weight, dtype)
    if not isinstance(packed, PackedNF4Weight):
        print("not packed")  # noqa: T201
        return
    x, error = torch.randn(27, 128, dtype=dtype), 0.02 if dtype == torch.bfloat16 else 2e-6
    no_prefetch = as_array(torch.empty(0, dtype=dtype)), np.empty(0, np.int64)
    for count in (1, 2, 7, 27):
        y = torch.empty(count, 72, dtype=dtype)
        cpu_nf4.multiply(as_array(y), as_array(x[:count]), packed, no_prefetch)
        expected = ReferenceOps().nf4_linear(x[:count].float(), weight)
        torch.testing.assert_close(y.float(), expected, atol=error * 128**0.5, rtol=error)
    print("equal, in", packed.code.dtype)  # noqa: T201


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
