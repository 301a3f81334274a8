"""Folders that hold an adapter's two files. The store looks at bytes alone, so that any will do."""

from __future__ import annotations

import hashlib
from pathlib import Path

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
