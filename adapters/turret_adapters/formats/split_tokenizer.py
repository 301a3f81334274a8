"""A program that splits a `tokenizer.json`: it prints the digest of its model, and the rest, as JSON.

A tokenizer has millions of numbers and strings, and may come from anybody. A process of its own with limits
parses it without holding the interpreter lock of a server. Needs only the standard library.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

MAX_MEMORY_BYTES = 4 << 30
MAX_SECONDS = 60


def digest_of_model(model: dict[str, Any]) -> str:
    """Equal for models that differ only in what versions of `tokenizers` write differently: pairs as strings
    or lists, and defaults that are left out.
    """
    kept = {key: value for key, value in model.items() if value is not None and value is not False}
    if "merges" in kept:
        kept["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in kept["merges"]]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def split(text: bytes) -> dict[str, Any]:
    """The parts: `model` is a digest, `rest` the other sections without truncation and padding."""
    sections = json.loads(text)
    model = sections.pop("model")
    for name in ("version", "truncation", "padding"):
        sections.pop(name, None)
    return {"model": digest_of_model(model), "rest": sections}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    try:
        print(json.dumps(split(Path(sys.argv[1]).read_bytes())))  # noqa: T201
    except (AttributeError, KeyError, MemoryError, RecursionError, TypeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}"[:200])
