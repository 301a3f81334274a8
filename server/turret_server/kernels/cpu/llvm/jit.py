"""Compiles the CPU kernels with numba on their first call, and caches the machine code on disk.

numba caches in `__pycache__`, or in the user's cache directory where that is not writable, and invalidates an
entry when the kernel's own file changes. The files of this folder are compiled into every kernel, so a change
of any of them invalidates all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import torch

_Function = TypeVar("_Function", bound=Callable[..., object])


@cache
def _digest_of_shared() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def compiled(function: _Function) -> _Function:
    decorated: Any = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    file = decorated._cache._cache_file  # noqa: SLF001 (numba has no option for further dependencies)
    file._source_stamp = (file._source_stamp, _digest_of_shared())  # noqa: SLF001
    return cast("_Function", decorated)


def as_array(tensor: torch.Tensor) -> Any:
    """A numpy view of a contiguous tensor, bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_rows(tensor_TX: torch.Tensor) -> tuple[Any, int]:
    """The memory from the first row's beginning to the last one's end, and how far apart rows begin. Each row
    is contiguous.
    """
    if tensor_TX.stride(1) != 1:
        tensor_TX = tensor_TX.contiguous()
    distance = tensor_TX.stride(0)
    size = (len(tensor_TX) - 1) * distance + tensor_TX.shape[1] if len(tensor_TX) else 0
    return as_array(tensor_TX.as_strided((size,), (1,))), distance
