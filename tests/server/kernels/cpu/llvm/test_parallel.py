"""Which OpenMP opens the parallel regions; the tests of the kernels see what regions compute."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
from llvmlite import binding

from turret_server.kernels.cpu.llvm import parallel


def function(value: int) -> object:
    return ctypes.CFUNCTYPE(ctypes.c_int)(lambda: value)


def address_of(own: object) -> int | None:
    return ctypes.cast(own, ctypes.c_void_p).value


SUBSTITUTES = dict(parallel._SINGLE_THREADED)


@pytest.mark.parametrize("has_gomp", [True, False])
def test_regions_are_those_of_gnus_openmp_or_else_have_one_thread(has_gomp, monkeypatch):
    bound: dict[str, int | None] = {}
    gomp = {name: function(7) for name in SUBSTITUTES}
    # Other OpenMPs have the functions without a region of GNU's.
    loaded = gomp if has_gomp else {name: own for name, own in gomp.items() if name != "GOMP_parallel"}
    monkeypatch.setattr(parallel, "CORES", 5)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(**loaded))
    monkeypatch.setattr(binding, "add_symbol", bound.__setitem__)
    assert parallel._bind() == (5 if has_gomp else 1)
    assert bound == {name: address_of(own) for name, own in (gomp if has_gomp else SUBSTITUTES).items()}


def test_a_region_of_one_thread_runs_its_body_once_with_its_data():
    seen: list[int] = []
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(seen.append)
    SUBSTITUTES["GOMP_parallel"](address_of(body), 42, 0, 0)
    assert seen == [42]
    assert SUBSTITUTES["omp_get_thread_num"]() == 0
    assert SUBSTITUTES["omp_get_num_threads"]() == 1
