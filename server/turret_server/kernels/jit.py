"""How the CPU kernels are compiled: by numba, on first call, and kept on disk for the next start.

numba keeps them in `__pycache__`, or in the user's cache directory where that cannot be written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

THREADS = torch.get_num_threads()
# numba fixes its count when it is imported, and makes it OpenMP's: with another one it would change torch's.
os.environ["NUMBA_NUM_THREADS"] = str(THREADS)

import numba  # noqa: E402 (see above)

# OpenMP first: torch and bitsandbytes use it too, and a step then wakes one pool of threads, not two.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

_Function = TypeVar("_Function", bound=Callable[..., object])


def compiled(function: _Function) -> _Function:
    """For one thread."""
    decorated: _Function = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return decorated


def compiled_parallel(function: _Function) -> _Function:
    """`numba.prange` loops run on all threads."""
    decorated: _Function = numba.njit(cache=True, nogil=True, error_model="numpy", parallel=True)(function)
    return decorated


def as_array(tensor: torch.Tensor) -> Any:
    """The tensor's memory as `vector.load` takes it: without gaps, bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
