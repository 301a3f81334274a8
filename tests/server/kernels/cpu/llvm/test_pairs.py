"""For which CPU kernels are compiled. What the intrinsics compute, the tests of the kernels see."""

from __future__ import annotations

import pytest
from llvmlite import binding
from numba.core import config

from turret_server.kernels.cpu.llvm import pairs


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("+avx2,-avx512f,+fma", {"avx2", "fma"}),
        ("-avx2", set()),
        ("", set()),
        (None, {"sse2"}),
    ],
    ids=["some", "none of one", "none", "those of the host"],
)
def test_a_cpu_has_the_features_that_numba_compiles_for(named, expected, monkeypatch):
    monkeypatch.setattr(config, "CPU_FEATURES", named)
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"sse2": True, "avx2": False})
    assert pairs._features() == expected
