"""What becomes of compiled kernels that are kept on disk."""

from __future__ import annotations

import importlib.util

from turret_server.kernels.cpu.llvm import jit

SOURCE = """
from turret_server.kernels.cpu.llvm.jit import compiled

@compiled
def double(x):
    return 2 * x
"""


def test_a_kept_kernel_is_used_until_the_files_that_kernels_share_change(tmp_path, monkeypatch):
    path = tmp_path / "kernel.py"
    path.write_text(SOURCE)

    def times_compiled() -> int:
        spec = importlib.util.spec_from_file_location("kernel", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.double(4) == 8
        return sum(module.double.stats.cache_misses.values())

    assert times_compiled() == 1
    assert times_compiled() == 0
    monkeypatch.setattr(jit, "_digest_of_shared", lambda: "another")
    assert times_compiled() == 1
