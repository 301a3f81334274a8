"""The safetensors files of a checkpoint, and which tensor is in which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from transformers.utils.hub import cached_file

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def files_of_tensors(name_or_path: str) -> Mapping[str, str]:
    """The names of a checkpoint's files by tensor; empty if it has none of this format."""
    index = _find(name_or_path, _INDEX)
    if index:
        files: Mapping[str, str] = json.loads(Path(index).read_text())["weight_map"]
        return files
    whole = _find(name_or_path, _WHOLE)
    if not whole:
        return {}
    with safe_open(whole, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), _WHOLE)


def _find(name_or_path: str, file: str) -> str | None:
    found: str | None = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False)
    return found
