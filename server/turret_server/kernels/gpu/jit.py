"""Compiles the GPU kernels with Triton on their first call; Triton caches the machine code on disk.

With TRITON_INTERPRET=1, set before Triton is imported, they run in its interpreter on a CPU, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

# The interpreter has no bfloat16 matrix product. float32 gives the same: products are exact there.
_DOT_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16,
}


def kernel(*varying: str) -> Callable[[Callable[..., None]], Any]:
    """Decorates a kernel that is launched as function[grid](arguments).

    Triton compiles no special versions for values of the arguments named in `varying`, which differ from step
    to step.
    """
    return lambda function: triton.jit(function, do_not_specialize=list(varying))


def inlined(function: Callable[..., Any]) -> Any:
    """Decorates a function that kernels call."""
    return triton.jit(function)


def dot_type(dtype: torch.dtype) -> Any:
    """The dtype in which matrices of a dtype are multiplied; sums are in float32."""
    return _DOT_TYPES[dtype]


# float32 matrix products run on tensor cores in three TF32 parts, with nearly float32's precision.
EXACT: tl.constexpr = tl.constexpr("tf32x3")


@cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def to_device(table: Any, device: torch.device) -> torch.Tensor:
    """An array as int32 on the device; the copy is asynchronous."""
    host = torch.from_numpy(np.ascontiguousarray(table, np.int32))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
