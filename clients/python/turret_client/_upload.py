"""Reads an adapter's files for an upload."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turret.v1 import adapters_pb2
from turret_client._messages import message_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
# Without the first, a folder has no tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# What the outputs of a head are called, for adapters of these tasks.
LABELS_FILE = "config.json"
LABELED_TASKS = ("SEQ_CLS", "TOKEN_CLS")

_CHUNK_BYTES = 1 << 20
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with an adapter as peft saves it.

    Attributes:
        name: Name under which the server will serve the adapter.
        path: The folder.
        progress: Called with the bytes sent and the total; None for no reports.
    """

    name: str
    path: Path
    progress: Callable[[int, int], None] | None

    def start(self) -> adapters_pb2.UploadAdapterRequest:
        """The first message of the upload. Reads the files for the digest.

        Raises:
            OSError: A file is missing or unreadable.
        """
        config = (self.path / CONFIG_NAME).read_bytes()
        digest = hashlib.sha256(len(config).to_bytes(_LENGTH_BYTES, "little") + config)
        sizes = {}
        optional = sorted(name for name in _optional_files(config) if (self.path / name).exists())
        for name in [TENSORS_NAME, *optional]:
            with (self.path / name).open("rb") as file:
                sizes[name] = os.fstat(file.fileno()).st_size
                if name != TENSORS_NAME:
                    digest.update(f"{name} {sizes[name]}\n".encode())
                while data := file.read(_CHUNK_BYTES):
                    digest.update(data)
        start = message_of(
            adapters_pb2.UploadStart,
            name=self.name,
            digest=digest.hexdigest(),
            config=config,
            size=sizes.pop(TENSORS_NAME),
            tokenizer=[adapters_pb2.TokenizerFile(name=name, size=size) for name, size in sizes.items()],
        )
        return adapters_pb2.UploadAdapterRequest(start=start)

    def chunks(
        self, offset: int, start: adapters_pb2.UploadStart
    ) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        """The messages that send the files from `offset` on.

        Raises:
            OSError: A file is unreadable, or shorter than at the start.
        """
        total = num_bytes(start)
        begin = 0
        for name, size in [(TENSORS_NAME, start.size), *((file.name, file.size) for file in start.tokenizer)]:
            with (self.path / name).open("rb") as file:
                file.seek(min(max(offset - begin, 0), size))
                while data := file.read(_CHUNK_BYTES):
                    self.report(offset, total)
                    chunk = adapters_pb2.UploadChunk(offset=offset, data=data)
                    yield adapters_pb2.UploadAdapterRequest(chunk=chunk)
                    offset += len(data)
            begin += size
            if offset < begin:
                path = str(self.path / name)
                raise OSError(errno.ESTALE, "the file changed while it was sent; upload it again", path)

    def report(self, done: int, size: int) -> None:
        if self.progress is not None:
            self.progress(done, size)


def _optional_files(config: bytes) -> tuple[str, ...]:
    """The files that a folder may lack. A broken config is the server's to refuse."""
    try:
        has_labels = json.loads(config.decode("utf-8-sig")).get("task_type") in LABELED_TASKS
    except (ValueError, AttributeError, RecursionError):
        has_labels = False
    return (*TOKENIZER_FILES, LABELS_FILE) if has_labels else TOKENIZER_FILES


def num_bytes(start: adapters_pb2.UploadStart) -> int:
    """The bytes that follow the start of an upload."""
    return start.size + sum(file.size for file in start.tokenizer)
