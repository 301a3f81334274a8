"""Folders with an adapter's two files. The store does not interpret the bytes, so any will do."""

from __future__ import annotations

import hashlib
from pathlib import Path

from turret_adapters.formats.files import Progress, no_progress
from turret_adapters.sources.fetch import fetch
from turret_adapters.sources.policy import Policy
from turret_adapters.store.store import AdapterStore

CONFIG = b'{"peft_type": "LORA"}'


def write_folder(folder: Path, tensors: bytes = b"tensors", config: bytes = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(tensors)
    return folder


def digest(tensors: bytes = b"tensors", config: bytes = CONFIG) -> str:
    return hashlib.sha256(len(config).to_bytes(8, "little") + config + tensors).hexdigest()


def revision(tensors: bytes = b"tensors", config: bytes = CONFIG) -> str:
    return digest(tensors, config)[:32]


def read_folder(folder: Path) -> dict[str, bytes]:
    return {place.name: place.read_bytes() for place in folder.iterdir()}


def files(tensors: bytes = b"tensors", config: bytes = CONFIG) -> dict[str, bytes]:
    return {"adapter_config.json": config, "adapter_model.safetensors": tensors}


def fetch_into(store: AdapterStore, source: str, policy: Policy, progress: Progress = no_progress) -> str:
    """Fetches an adapter into a store, which holds its revision once."""
    with store.staging() as staged:
        fetch(source, staged, policy, progress)
        return store.adopt(staged)


def add(store: AdapterStore, folder: Path, progress: Progress = no_progress) -> str:
    """The same for a folder of this machine."""
    return fetch_into(store, str(folder), Policy(roots=(folder,)), progress)
