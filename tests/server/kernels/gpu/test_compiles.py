"""The interpreter takes Python that Triton does not compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[3]


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "support.compile_gpu_kernels", "bfloat16"],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert set(found.stdout.split()) == {
        "_dequantize",
        "_expand",
        "_gather",
        "_multiply",
        "_rms_norm",
        "_shrink",
        "_sum_splits",
        "attend_tile",
        "combine_splits",
        "write_tokens",
    }
