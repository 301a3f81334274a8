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

    digest, shared = jit._digest_of_shared.__wrapped__, tmp_path / "shared"
    monkeypatch.setattr(jit, "_digest_of_shared", digest)
    monkeypatch.setattr(jit, "__file__", str(shared / "jit.py"))
    shared.mkdir()
    for name in ("jit.py", "vectors.py"):
        (shared / name).write_text("1")
    assert times_compiled() == 1
    assert times_compiled() == 0
    for name in ("jit.py", "vectors.py"):
        (shared / name).write_text("2")
        assert times_compiled() == 1
        assert times_compiled() == 0
    (shared / "notes.md").write_text("")
    assert times_compiled() == 0


def test_the_files_that_kernels_share_are_read_once():
    assert jit._digest_of_shared() is jit._digest_of_shared()
