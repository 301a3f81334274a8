"""How much memory the arena, the adapters in host memory and a single adapter may take."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from turret_adapters.formats.files import MAX_CONFIG_BYTES, MAX_TENSORS_BYTES
from turret_server.config import parse_size
from turret_server.errors import ConfigError

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
# Of the memory that is free once the model is loaded. A GPU keeps the rest for activations; a CPU's memory
# belongs to other processes too.
_DEFAULT_FRACTION = {"cuda": 0.8, "cpu": 0.25}
_DEFAULT_MAX_BYTES = {"cpu": 4 * 2**30}
_DEFAULT_HOST_MEMORY = "0.25"
_CGROUP = Path("/sys/fs/cgroup")


def arena_bytes(memory: str | None, device: torch.device, *, graphs: int = 0) -> int:
    """Bytes of the arena for the setting --memory. It leaves `graphs` bytes for the CUDA graphs.

    Raises:
        ConfigError: the device has less free memory.
    """
    free = _free_bytes(device)
    if free < graphs:
        raise ConfigError(
            f"--device {device}: the model leaves {_text(free)} free, {_text(graphs - free)} less than its "
            "CUDA graphs take; use a smaller model, a GPU with more memory or fewer --max-batch-requests"
        )
    if memory is None:
        wanted = int((free - graphs) * _DEFAULT_FRACTION[device.type])
        return min(wanted, _DEFAULT_MAX_BYTES.get(device.type, wanted))
    return _bytes_of("--memory", memory, free - graphs, device)


def log_gpu_memory(device: torch.device, *, arena: int, graphs: int) -> None:
    """Says where a GPU's memory goes, once the arena is taken and before the graphs are captured."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        model = torch.cuda.memory_allocated(device) - arena
        log.info(
            "memory of %s: %s; the model takes %s, the arena %s, CUDA graphs about %s; activations have the "
            "%s that stay free",
            device,
            *map(_text, (total, model, arena, graphs, max(free - graphs, 0))),
        )


def host_bytes(memory: str | None) -> int:
    """Bytes of adapters in host memory for the setting --host-memory.

    Raises:
        ConfigError: less memory is free.
    """
    return _bytes_of("--host-memory", memory or _DEFAULT_HOST_MEMORY, _free_bytes(_CPU), _CPU)


def max_adapter_bytes() -> int:
    """Maximum size of an adapter's files: an eighth of this machine's memory, because several adapters load
    at once and each is in memory twice while its rows are built.
    """
    total = psutil.virtual_memory().total
    limit = _container_limit()
    return min(MAX_CONFIG_BYTES + MAX_TENSORS_BYTES, (total if limit is None else min(limit, total)) // 8)


def _bytes_of(flag: str, memory: str, free: int, device: torch.device) -> int:
    """Bytes for a size or a fraction of the device's free memory."""
    size = parse_size(memory)
    assert size, "ServerConfig has validated it"
    wanted = int(free * size.number if size.is_fraction else size.number)
    if not 0 < wanted <= free:
        raise ConfigError(
            f"{flag} {memory}: expected more than 0 and at most {_text(free)}, which {device} has free, "
            f"found {_text(wanted)}"
        )
    return wanted


def _text(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes} bytes"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left in torch's allocator
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    limit = _container_limit()
    return available if limit is None else max(min(available, limit - _container_use()), 0)


def _container_limit() -> int | None:
    """The memory limit of this container, as cgroup v2 reports it; None without one."""
    with suppress(OSError, ValueError):  # ValueError: "max"
        return int((_CGROUP / "memory.max").read_text())
    return None


def _container_use() -> int:
    """Bytes that this container uses, without the file cache that the kernel would give up first."""
    used = int((_CGROUP / "memory.current").read_text())
    statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    return used - int(statistics.get("inactive_file", 0))
