"""How the CPU kernels are compiled: by numba, on first call, and kept on disk for the next start.

numba keeps them in `__pycache__`, or in the user's cache directory where that cannot be written, until the
kernel's own file changes. What is compiled into it from these files counts as well here.
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


_SHARED = ("lanes.py", "pairs.py", "parallel.py", "vector.py")


@cache
def _digest_of_shared() -> str:
    contents = (Path(__file__).with_name(name).read_bytes() for name in _SHARED)
    return hashlib.sha256(b"".join(contents)).hexdigest()


def compiled(function: _Function) -> _Function:
    decorated: Any = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    kept = decorated._cache._cache_file  # noqa: SLF001 (numba has no word for what else a kernel depends on)
    kept._source_stamp = (kept._source_stamp, _digest_of_shared())  # noqa: SLF001
    return cast("_Function", decorated)


def as_array(tensor: torch.Tensor) -> Any:
    """The tensor's memory as `lanes` takes it: without gaps, bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
