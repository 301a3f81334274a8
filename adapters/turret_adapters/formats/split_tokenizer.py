"""A program that reads what a stranger's `tokenizer.json` says, in a process of its own with limits.

A tokenizer has millions of numbers and strings, and patterns that take long to compile; a server would hold
its interpreter lock meanwhile. The program reads standard input and prints JSON: with `split`, the digest of
the model and the sections that may differ; with `canonical`, a pair of a section's name and the section as
`tokenizers` writes it.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from typing import Any

MAX_MEMORY_BYTES = 4 << 30
# Of CPU time. The largest vocabularies take 3 s; a section takes none, unless its pattern is made to.
MAX_SECONDS = {"split": 15, "canonical": 3}
MAX_PARTS_BYTES = 8 << 20

SECTIONS = ("normalizer", "pre_tokenizer", "decoder", "post_processor", "added_tokens")
EMPTY_MODEL = {"type": "BPE", "vocab": {}, "merges": []}


def split(text: bytes) -> dict[str, Any]:
    """`model` is a digest, `rest` has the sections."""
    tokenizer = json.loads(text)
    parts = {
        "model": digest_of_model(tokenizer["model"]),
        "rest": {name: tokenizer.get(name) for name in SECTIONS},
    }
    size = len(json.dumps(parts))
    if size > MAX_PARTS_BYTES:
        raise ValueError(f"{size} bytes beside the vocabulary; at most {MAX_PARTS_BYTES} are allowed")
    return parts


def digest_of_model(model: dict[str, Any]) -> str:
    """Equal for models that differ only in what versions of `tokenizers` write differently: pairs as strings
    or lists, and defaults that are left out.
    """
    kept = {key: value for key, value in model.items() if value is not None and value is not False}
    if "merges" in kept:
        kept["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in kept["merges"]]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def canonical(name: str, section: object) -> Any:
    """The section with its defaults."""
    from tokenizers import Tokenizer  # noqa: PLC0415 (not for `split`)

    pipeline = {"version": "1.0", "added_tokens": [], "model": EMPTY_MODEL, name: section}
    return json.loads(Tokenizer.from_str(json.dumps(pipeline)).to_str())[name]


if __name__ == "__main__":
    [how] = sys.argv[1:]
    limit = MAX_SECONDS[how]
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    try:
        text = sys.stdin.buffer.read()
        print(json.dumps(split(text) if how == "split" else canonical(*json.loads(text))))  # noqa: T201
    except BaseException as error:  # noqa: BLE001 (whatever the file makes of it; a panic is no Exception)
        sys.exit(f"{type(error).__name__}: {error}"[:200])
