"""The interpreter takes Python that Triton does not compile, and tiles that no GPU has the memory for."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[3]
KERNELS = {
    "_dequantize",
    "_expand",
    "_gather",
    "_multiply",
    "_rms_norm",
    "_rotate",
    "_shrink",
    "_silu_multiply",
    "_sum_splits",
    "attend_tile",
    "combine_splits",
    "write_tokens",
}
# Bytes that a program may have, by compute capability (CUDA's programming guide, technical specifications).
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
# Bytes of a thread. A product in three TF32 parts has too many operands for the registers.
STACK = {"bfloat16": 128, "float16": 128, "float32": 1 << 10}


def compile_kernels(folder, sm, dtype, head_dims):
    """Rows of the table: kernel, shared memory, stack, shape."""
    options = ["--sm", str(sm), "--dtype", dtype, "--head-dim", *map(str, head_dims)]
    found = subprocess.run(  # noqa: S603 -- our own
        [sys.executable, "-m", "support.compile_gpu_kernels", *options],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)},
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    for line in found.stdout.splitlines()[1:]:
        _, _, kernel, shared, stack, _, shape = line.split()
        yield kernel, int(shared), int(stack), shape


def assert_kernels_fit(folder, sm, dtype, head_dims):
    rows = list(compile_kernels(folder, sm, dtype, head_dims))
    assert {kernel for kernel, *_ in rows} == KERNELS
    assert [row for row in rows if row[1] > SHARED_MEMORY[sm]] == []
    assert [row for row in rows if row[2] > STACK[dtype]] == []


# Where shared memory is smallest, and where a thread ran out of registers.
@pytest.mark.parametrize(
    ("sm", "dtype", "head_dim"), [(89, "bfloat16", 128), (89, "float32", 256), (80, "float32", 64)]
)
def test_the_largest_tiles_fit(tmp_path, sm, dtype, head_dim):
    assert_kernels_fit(tmp_path, sm, dtype, [head_dim])


@pytest.mark.slow
@pytest.mark.parametrize(("sm", "dtype"), list(product(SHARED_MEMORY, STACK)))
def test_every_kernel_fits_every_gpu(tmp_path, sm, dtype):
    assert_kernels_fit(tmp_path, sm, dtype, [64, 80, 128, 256])
