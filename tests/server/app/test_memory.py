from __future__ import annotations

import psutil
import pytest
import torch

from turret_server.app.memory import arena_bytes, host_bytes
from turret_server.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("memory", "wanted"),
    [("64MiB", 64 * 2**20), ("1GB", 2**30), ("1.5 KiB", 1536), ("2048", 2048), ("3k", 3072)],
)
def test_sizes(memory, wanted):
    assert arena_bytes(memory, CPU) == wanted


def test_a_fraction_is_of_the_free_memory():
    free = psutil.virtual_memory().available
    assert arena_bytes("0.25", CPU) == pytest.approx(free / 4, rel=0.1)


def test_the_default_leaves_most_of_the_memory_alone():
    assert 0 < arena_bytes(None, CPU) <= psutil.virtual_memory().available / 2


@pytest.mark.parametrize("memory", ["plenty", "-1", "0", "2XB", "", "GiB", "900TiB"])
def test_what_cannot_be_is_refused_with_what_was_said(memory):
    with pytest.raises(ConfigError, match="--memory"):
        arena_bytes(memory, CPU)


def test_the_hosts_memory_is_given_likewise():
    assert host_bytes("64MiB") == 64 * 2**20
    assert 0 < host_bytes(None) <= psutil.virtual_memory().available / 2
    with pytest.raises(ConfigError, match="--host-memory plenty"):
        host_bytes("plenty")
