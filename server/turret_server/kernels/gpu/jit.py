"""How the GPU kernels are compiled: by Triton, on first call, and kept on disk for the next start.

With TRITON_INTERPRET=1, set before Triton is imported, they run on a CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

# The interpreter has no matrix product of bfloat16. In float32 it is the same: products are exact there.
_DOT_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16,
}


def kernel(*varying: str) -> Callable[[Callable[..., None]], Any]:
    """A kernel, to be launched as function[grid](arguments).

    `varying` are numbers that differ from step to step: no code is compiled for some of their values.
    """
    return lambda function: triton.jit(function, do_not_specialize=list(varying))


def inlined(function: Callable[..., Any]) -> Any:
    """What kernels call."""
    return triton.jit(function)


def dot_type(dtype: torch.dtype) -> Any:
    """What matrices of a dtype are multiplied in; sums are of float32."""
    return _DOT_TYPES[dtype]


# Matrix products of float32 run on tensor cores in three parts that lose nothing to speak of.
EXACT: tl.constexpr = tl.constexpr("tf32x3")


@cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def to_device(table: Any, device: torch.device) -> torch.Tensor:
    """A numpy table as int32 on the device; the host does not wait for the copy."""
    host = torch.from_numpy(np.ascontiguousarray(table, np.int32))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
