"""How much memory is used: what the user asked for, against what there is."""

from __future__ import annotations

import re

import psutil
import torch

from turret_adapters.formats.files import MAX_CONFIG_BYTES, MAX_TENSORS_BYTES
from turret_server.errors import ConfigError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]?)(i?B)?", re.IGNORECASE)

# Of the memory that is free once the model is loaded. A GPU keeps the rest for activations; a CPU's
# memory belongs to other processes too.
_DEFAULT_FRACTION = {"cuda": 0.8, "cpu": 0.25}
_DEFAULT_MOST = {"cpu": 4 * 2**30}
_DEFAULT_HOST_MEMORY = "0.25"


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def max_adapter_bytes() -> int:
    """Most that an adapter's files may hold: as several are loaded at once, and each is in memory twice while
    its rows are made of it, a part of what this machine has.
    """
    return min(MAX_CONFIG_BYTES + MAX_TENSORS_BYTES, psutil.virtual_memory().total // 8)


def parse_memory(option: str, memory: str) -> tuple[float, bool]:
    """A number of bytes, or a fraction and True.

    Raises:
        ConfigError: it is neither a size nor a fraction.
    """
    match = _SIZE.fullmatch(memory.strip())
    if match is None or not float(match["number"]):
        raise ConfigError(f"{option} {memory}: expected a size such as 2GiB, or a fraction such as 0.5")
    number, unit = float(match["number"]), match["unit"].upper()
    return number * _UNITS[unit], not unit and number <= 1


def arena_bytes(memory: str | None, device: torch.device) -> int:
    """Bytes for a size such as "2GiB", a fraction of the free memory such as "0.5", or the default.

    Raises:
        ConfigError: it is neither, or more than there is.
    """
    if memory is None:
        wanted = int(free_bytes(device) * _DEFAULT_FRACTION[device.type])
        return min(wanted, _DEFAULT_MOST.get(device.type, wanted))
    return _bytes("--memory", memory, device)


def host_bytes(memory: str | None) -> int:
    """The same for adapters in the host's memory.

    Raises:
        ConfigError: it is neither, or more than there is.
    """
    return _bytes("--host-memory", memory or _DEFAULT_HOST_MEMORY, torch.device("cpu"))


def _bytes(option: str, memory: str, device: torch.device) -> int:
    number, is_fraction = parse_memory(option, memory)
    free = free_bytes(device)
    wanted = int(free * number if is_fraction else number)
    if not 0 < wanted <= free:
        raise ConfigError(f"{option} {memory}: {wanted} bytes wanted, but {device.type} has {free} free")
    return wanted
