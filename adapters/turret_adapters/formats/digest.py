"""What a revision is: the digest of an adapter's two files.

SHA-256 over the length of the config in 8 bytes, little-endian, the config, and the tensors' file. A reader
of the files computes the same (`peft.read_adapter`): what is served can be held against what is stored.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from turret_adapters.sources.folder import CONFIG_NAME, TENSORS_NAME

REVISION_LENGTH = 32
MAX_CONFIG_BYTES = 1 << 20
MAX_TENSORS_BYTES = 8 << 30
MAX_FILE_BYTES = {CONFIG_NAME: MAX_CONFIG_BYTES, TENSORS_NAME: MAX_TENSORS_BYTES}
CHUNK_BYTES = 1 << 20

_LENGTH_BYTES = 8


def digest_of_folder(folder: Path) -> str:
    """The digest, 64 hexadecimal digits, of which the first `REVISION_LENGTH` name the revision.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    config = (folder / CONFIG_NAME).read_bytes()
    digest = hashlib.sha256(len(config).to_bytes(_LENGTH_BYTES, "little") + config)
    with (folder / TENSORS_NAME).open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
