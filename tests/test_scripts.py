"""The measurements that no test runs as a whole are built from modules that fit the code as it is."""

from __future__ import annotations

from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "script",
    [
        "bench.page_size",
        "bench.profile_step",
        "bench.turret",
        "chaos.run",
        "load.long_prompt",
        "load.many_adapters",
        "mutants.run",
        "parity.matrix",
        "simulation.plots",
        "soak.run",
        "soak.pools",
    ],
)
def test_a_script_can_be_imported(script):
    import_module(script)
