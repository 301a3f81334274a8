"""Reads an adapter's two files for an upload."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turret.v1 import adapters_pb2
from turret_client._messages import message_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"

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
        """The first message of the upload. Reads both files for the digest.

        Raises:
            OSError: A file is missing or cannot be read.
        """
        config = (self.path / CONFIG_NAME).read_bytes()
        digest = hashlib.sha256(len(config).to_bytes(_LENGTH_BYTES, "little") + config)
        size = 0
        with (self.path / TENSORS_NAME).open("rb") as file:
            while data := file.read(_CHUNK_BYTES):
                digest.update(data)
                size += len(data)
        start = message_of(
            adapters_pb2.UploadStart, name=self.name, digest=digest.hexdigest(), config=config, size=size
        )
        return adapters_pb2.UploadAdapterRequest(start=start)

    def chunks(self, offset: int, size: int) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        """The messages that send the tensors from `offset` on; `size` is the total in bytes."""
        with (self.path / TENSORS_NAME).open("rb") as file:
            file.seek(offset)
            while data := file.read(_CHUNK_BYTES):
                self.report(offset, size)
                chunk = adapters_pb2.UploadChunk(offset=offset, data=data)
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)
                offset += len(data)

    def report(self, done: int, size: int) -> None:
        if self.progress is not None:
            self.progress(done, size)
