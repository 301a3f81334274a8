from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from turret_adapters.formats.files import MAX_CONFIG_BYTES, MAX_TENSORS_BYTES
from turret_server.app import budgets
from turret_server.app.budgets import arena_bytes, host_bytes, log_gpu_memory, max_adapter_bytes
from turret_server.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("memory", "wanted"),
    [("64MiB", 64 * 2**20), ("1GB", 2**30), ("1.5 KiB", 1536), ("2048", 2048), ("3k", 3072)],
)
def test_memory_is_a_size(memory: str, wanted: int) -> None:
    assert arena_bytes(memory, CPU) == wanted


def test_memory_is_a_fraction_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert arena_bytes("0.25", CPU) == 250
    assert arena_bytes("1", CPU) == 1000


@pytest.mark.parametrize(("free", "wanted"), [(1000, 250), (2**40, 4 * 2**30)])
def test_the_default_on_a_cpu_is_a_quarter_of_the_free_memory_and_at_most_4_gib(
    monkeypatch: pytest.MonkeyPatch, free: int, wanted: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert arena_bytes(None, CPU) == wanted


def test_more_memory_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert host_bytes("1000") == 1000
    with pytest.raises(
        ConfigError, match=r"--host-memory 1001: .* at most 1000 bytes, which cpu has free, found 1001"
    ):
        host_bytes("1001")
    with pytest.raises(ConfigError, match=r"--memory 0\.0001: .* at most 1000 bytes, .* found 0 bytes"):
        arena_bytes("0.0001", CPU)


def test_host_memory_is_a_quarter_of_the_free_memory_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert host_bytes(None) == 250


def test_an_adapter_is_at_most_an_eighth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=800))
    assert max_adapter_bytes() == 100
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**60))
    assert max_adapter_bytes() == MAX_CONFIG_BYTES + MAX_TENSORS_BYTES


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Uses 600 bytes, of which the kernel would give up 100; the machine has 2,000 free of 8,000."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2000, total=8000))
    monkeypatch.setattr(budgets, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\nactive_file 0\n")
    return tmp_path


def test_a_containers_limit_counts(container: Path) -> None:
    (container / "memory.max").write_text("1300\n")
    assert host_bytes("1") == 800
    assert max_adapter_bytes() == 162
    (container / "memory.max").write_text("400\n")
    with pytest.raises(ConfigError, match="at most 0 bytes, which cpu has free"):
        host_bytes("1")


def test_the_machines_memory_counts_where_it_is_less_than_the_containers_limit(container: Path) -> None:
    (container / "memory.max").write_text("90000\n")
    assert (host_bytes("1"), max_adapter_bytes()) == (2000, 1000)


def test_a_container_without_a_limit_has_the_machines_memory(container: Path) -> None:
    (container / "memory.max").write_text("max\n")
    assert (host_bytes("1"), max_adapter_bytes()) == (2000, 1000)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Has 1,000 bytes free of 5,000, and torch's allocator keeps 300 of them; the machine has few."""
    device = torch.device("cuda", 1)
    kept = [300]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda asked: {device: (1000 - sum(kept), 5000)}[asked])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10))
    return device


def test_on_a_gpu_its_own_free_memory_counts(gpu: torch.device) -> None:
    assert arena_bytes("0.5", gpu) == 500
    assert arena_bytes("1000", gpu) == 1000
    with pytest.raises(ConfigError, match="at most 1000 bytes, which cuda:1 has free, found 1001"):
        arena_bytes("1001", gpu)
    assert host_bytes("10") == 10


def test_the_arena_leaves_memory_for_the_graphs(gpu: torch.device) -> None:
    assert arena_bytes("0.5", gpu, graphs=400) == 300
    assert arena_bytes(None, gpu, graphs=400) == 480
    assert arena_bytes("600", gpu, graphs=400) == 600
    with pytest.raises(ConfigError, match=r"--memory 601: .* at most 600 bytes, which .* found 601"):
        arena_bytes("601", gpu, graphs=400)


def test_a_gpu_that_is_too_small_is_refused_with_what_is_missing(gpu: torch.device) -> None:
    said = "--device cuda:1: the model leaves 1000 bytes free, 24 bytes less than its CUDA graphs take"
    for memory in (None, "10"):
        with pytest.raises(ConfigError, match=said):
            arena_bytes(memory, gpu, graphs=1024)
    with pytest.raises(ConfigError, match="leaves 1000 bytes free, 1024 MiB less"):
        arena_bytes(None, gpu, graphs=2**30)


def test_the_log_says_where_a_gpus_memory_goes(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.cuda.empty_cache()
    monkeypatch.setattr(torch.cuda, "memory_allocated", {gpu: 3500}.__getitem__)
    with caplog.at_level(logging.INFO):
        log_gpu_memory(CPU, arena=1, graphs=0)
        log_gpu_memory(gpu, arena=3000, graphs=100)
    [found] = [record.getMessage() for record in caplog.records]
    assert found == (
        "memory of cuda:1: 5000 bytes; the model takes 500 bytes, the arena 3000 bytes, CUDA graphs about "
        "100 bytes; activations have the 900 bytes that stay free"
    )


@pytest.mark.parametrize("free", [1000, 2**40])
def test_the_default_on_a_gpu_leaves_a_fifth_of_its_free_memory_and_has_no_maximum(
    monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
    assert arena_bytes(None, torch.device("cuda")) == free * 4 // 5
