"""What is written down of a revision, so that a start need not read its tensors.

A record is believed only where the reader and the base are those that made it and both files look untouched;
the first read of the tensors still holds their digest and the spec against it (`HostMemory.get`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zlib
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from turret_adapters.sources.folder import CONFIG_NAME, TENSORS_NAME
from turret_adapters.spec import AdapterSpec, BaseSpec, Method, Part, PrefixKind, PrefixSpec, RowGroup

# Clocks of file systems are coarse: what changed so lately may change again without showing it.
SETTLED_SECONDS = 2.0


def reader_of(base: BaseSpec) -> str:
    """What a spec depends on besides the adapter's files."""
    return f"{version('turret')} {hashlib.sha256(repr(base).encode()).hexdigest()}"


def marks_of(folder: Path) -> str:
    """What a change of an adapter's two files would change, as in Git's index; "" where one is missing."""
    return " ".join(
        f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
        for found in _stats(folder)
    )


def settled_marks_of(folder: Path) -> str:
    """The same; "" also where a file changed so lately that it could change again without showing it."""
    latest = max((found.st_ctime for found in _stats(folder)), default=math.inf)
    return marks_of(folder) if latest < time.time() - SETTLED_SECONDS else ""


def _stats(folder: Path) -> list[os.stat_result]:
    try:
        return [(folder / name).stat() for name in (CONFIG_NAME, TENSORS_NAME)]
    except OSError:
        return []


def encode(spec: AdapterSpec) -> bytes:
    rows = [(group.module, group.part.value, group.count, group.width) for group in spec.rows]
    fields = asdict(spec) | {
        "method": spec.method.value,
        # A text of its own: thousands of adapters are of a few shapes, and each is parsed once.
        "rows": json.dumps(rows, separators=(",", ":")),
        "prefix": spec.prefix and [spec.prefix.num_virtual_tokens, spec.prefix.kind.value],
    }
    return zlib.compress(json.dumps(fields).encode())


def decode(record: bytes) -> AdapterSpec | None:
    """The spec that was written down; None for what another version wrote, or the disk spoiled."""
    try:
        fields: dict[str, Any] = json.loads(zlib.decompress(record))
        prefix = fields["prefix"]
        return AdapterSpec(
            **fields
            | {
                "method": Method(fields["method"]),
                "rows": _rows(fields["rows"]),
                "prefix": prefix and PrefixSpec(num_virtual_tokens=prefix[0], kind=PrefixKind(prefix[1])),
                "invocation_tokens": tuple(fields["invocation_tokens"]),
            }
        )
    except (zlib.error, ValueError, TypeError, LookupError):
        return None


@lru_cache(maxsize=1024)
def _rows(text: str) -> tuple[RowGroup, ...]:
    return tuple(RowGroup(module, Part(part), *shape) for module, part, *shape in json.loads(text))
