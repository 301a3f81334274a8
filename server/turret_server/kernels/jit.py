"""How the CPU kernels are compiled: by numba, on first call, and kept on disk for the next start.

numba keeps them in `__pycache__`, or in the user's cache directory where that cannot be written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import torch

_Function = TypeVar("_Function", bound=Callable[..., object])


def compiled(function: _Function) -> _Function:
    decorated: _Function = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return decorated


def as_array(tensor: torch.Tensor) -> Any:
    """The tensor's memory as `lanes` takes it: without gaps, bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
