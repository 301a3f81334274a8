"""Records of revisions: their encoded specs, so that a start does not read their tensors.

A record is valid only for the version of Turret and the base that made it, and while the files look
unchanged. The first read of the tensors still compares digest and spec with it (`HostMemory.get`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zlib
from dataclasses import fields
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from turret_adapters.formats.files import CONFIG_NAME, KEPT_FILES, OPTIONAL_FILES, TENSORS_NAME
from turret_adapters.spec import (
    AdapterSpec,
    BaseSpec,
    HeadSpec,
    HeadTask,
    Method,
    Part,
    PrefixKind,
    PrefixSpec,
    Problem,
    RowGroup,
)

# Clocks of file systems are coarse: a file that changed this recently may change again with the same times.
SETTLED_SECONDS = 2.0


def reader_of(base: BaseSpec) -> str:
    """Identifies what a spec depends on besides the adapter's files: the version of Turret and the base."""
    return f"{version('turret')} {hashlib.sha256(repr(base).encode()).hexdigest()}"


def marks_of(folder: Path) -> str:
    """Device, inode, size and times of an adapter's files, as in Git's index; "" if config or tensors are
    missing.
    """
    return " ".join(
        f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
        for found in _stats(folder)
    )


def settled_marks_of(folder: Path) -> str:
    """`marks_of`, or "" if a file changed so recently that another change could leave them the same."""
    latest = max((found.st_ctime for found in _stats(folder)), default=math.inf)
    return marks_of(folder) if latest < time.time() - SETTLED_SECONDS else ""


def _stats(folder: Path) -> list[os.stat_result]:
    found = []
    for name in (CONFIG_NAME, TENSORS_NAME, *KEPT_FILES, *OPTIONAL_FILES):
        try:
            found.append((folder / name).stat())
        except OSError:
            if name in (CONFIG_NAME, TENSORS_NAME):
                return []
    return found


def encode(spec: AdapterSpec) -> bytes:
    """Compressed JSON of a spec."""
    rows = [(group.module, group.part.value, group.count, group.width) for group in spec.rows]
    record = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init} | {
        "method": spec.method.value,
        # A string inside the JSON: thousands of adapters have a few shapes, and `_rows` parses each once.
        "rows": json.dumps(rows, separators=(",", ":")),
        "prefix": spec.prefix
        and [spec.prefix.num_virtual_tokens, spec.prefix.kind.value, spec.prefix.per_request],
        "head": spec.head and [spec.head.task.value, spec.head.labels, spec.head.problem.value],
    }
    return zlib.compress(json.dumps(record).encode())


def decode(record: bytes) -> AdapterSpec | None:
    """The spec of `encode`; None if another version encoded it or the bytes are damaged."""
    try:
        values: dict[str, Any] = json.loads(zlib.decompress(record))
        prefix, head = values["prefix"], values["head"]
        return AdapterSpec(
            **values
            | {
                "method": Method(values["method"]),
                "rows": _rows(values["rows"]),
                "prefix": prefix
                and PrefixSpec(
                    num_virtual_tokens=prefix[0], kind=PrefixKind(prefix[1]), per_request=prefix[2]
                ),
                "head": head
                and HeadSpec(task=HeadTask(head[0]), labels=tuple(head[1]), problem=Problem(head[2])),
                "invocation_tokens": tuple(values["invocation_tokens"]),
            }
        )
    except (zlib.error, ValueError, TypeError, LookupError):
        return None


@lru_cache(maxsize=1024)
def _rows(text: str) -> tuple[RowGroup, ...]:
    return tuple(RowGroup(module, Part(part), *shape) for module, part, *shape in json.loads(text))
