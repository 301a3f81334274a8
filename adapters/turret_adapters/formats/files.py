"""The files of an adapter: their names and limits, safe opening, digest, and durable writing.

The author of a folder controls its contents, so a file is opened only if it is a regular file inside the
folder, and read only up to a limit.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from turret_adapters.errors import AdapterFormatError, AdapterSourceError

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
# A tokenizer's files as transformers saves them. A folder may have none, or a chat template alone.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# In the folder of a revision, instead of them: what they change of the base model's.
TOKENIZER_NAME = "turret_tokenizer.json"
# What transformers saves of a model with a head, and in the folder of a revision, instead of it: the names of
# the head's outputs.
LABELS_FILE = "config.json"
LABELS_NAME = "turret_labels.json"
OPTIONAL_FILES = (*TOKENIZER_FILES, LABELS_FILE)
KEPT_FILES = (TOKENIZER_NAME, LABELS_NAME)
_TENSOR_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
_SHARD = re.compile(r"-\d+-of-\d+\.")

MAX_CONFIG_BYTES = 1 << 20
MAX_TENSORS_BYTES = 8 << 30
MAX_TOKENIZER_BYTES = 4 << 20
MAX_LABELS_BYTES = 4 << 20
MAX_FILE_BYTES = {
    CONFIG_NAME: MAX_CONFIG_BYTES,
    TENSORS_NAME: MAX_TENSORS_BYTES,
    TOKENIZER_NAME: MAX_TOKENIZER_BYTES,
    **dict.fromkeys(TOKENIZER_FILES, MAX_TOKENIZER_BYTES),
    TOKENIZER_FILES[0]: 64 << 20,
    LABELS_FILE: MAX_LABELS_BYTES,
    LABELS_NAME: MAX_LABELS_BYTES,
}
CHUNK_BYTES = 1 << 20
REVISION_LENGTH = 32
MAX_NAMES_SHOWN = 5
_MAX_FOLDERS = 1000

_LENGTH_BYTES = 8

Progress = Callable[[int, int | None], None]
"""Called with the bytes done and the bytes in total (None: unknown). An exception from it ends the work."""


def no_progress(_done: int, _total: int | None) -> None:
    """The `Progress` of callers that do not need it."""


def config_digest(config: bytes) -> hashlib._Hash:
    """The digest of an adapter after its config: SHA-256 over the config's length (8 bytes, little-endian)
    and the config. The bytes of the tensor file follow.
    """
    return hashlib.sha256(len(config).to_bytes(_LENGTH_BYTES, "little") + config)


def digest_of_folder(folder: Path) -> str:
    """The digest of an adapter's files: 64 hexadecimal digits, the first `REVISION_LENGTH` of which are the
    revision. `peft.read_adapter` computes the same from the bytes that it reads.

    After the tensors come the other files, if there are any, in the order of their names, each after its
    `head_of`.

    Raises:
        OSError: a file is missing or unreadable.
    """
    digest = config_digest((folder / CONFIG_NAME).read_bytes())
    for name in (TENSORS_NAME, *sorted({*KEPT_FILES, *OPTIONAL_FILES})):
        if name == TENSORS_NAME or (folder / name).exists():
            with (folder / name).open("rb", buffering=0) as file:
                if name != TENSORS_NAME:
                    digest.update(head_of(name, os.fstat(file.fileno()).st_size))
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
    return digest.hexdigest()


def head_of(name: str, size: int) -> bytes:
    """What stands in a digest before a file that an adapter may lack."""
    return f"{name} {size}\n".encode()


def resolve(path: str) -> Path:
    """Finds the folder of an adapter.

    Returns:
        The folder's absolute path without symbolic links.

    Raises:
        AdapterSourceError: it does not exist, is not a folder, or has no `adapter_config.json`.
    """
    try:
        folder = Path(os.path.realpath(path, strict=True))
        names = sorted(entry.name for entry in folder.iterdir())
    except (OSError, ValueError) as error:
        raise AdapterSourceError(
            f"{path!r}: expected a folder with {CONFIG_NAME}, found {describe(error)}"
        ) from error
    if CONFIG_NAME not in names:
        inside = [name for name in names[:_MAX_FOLDERS] if _has_config(folder / name)]
        found = found_inside(inside, path) if inside else _listed(names) if names else "an empty one"
        raise AdapterSourceError(
            f"{path!r}: expected a folder with {CONFIG_NAME}, found {found}"
        ) from FileNotFoundError(CONFIG_NAME)
    return folder


def found_inside(names: Sequence[str], parent: str, remedy: str = "load") -> str:
    """What was found instead of an adapter's folder, for the end of a message: the parent of folders with
    these names, each with an adapter.
    """
    latest = max(names, key=with_numbers)
    where = f"{parent.rstrip('/')}/{latest}" if parent else latest
    return f"one in {_listed(names)} ({remedy} {where!r}, for example)"


def refuse_other_tensors(folder: Path) -> None:
    """Refuses an adapter whose tensors are in other files than peft's one.

    Raises:
        AdapterFormatError: the folder has pickles or parts instead of `adapter_model.safetensors`.
        OSError: the folder is unreadable.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(_TENSOR_SUFFIXES))
    if TENSORS_NAME in names or not names:
        return
    if _PICKLE_NAME in names:
        found = (
            f"{_PICKLE_NAME}, a pickle, which can run code when it is loaded (load it with peft where that "
            "is safe, then save_pretrained(path, safe_serialization=True))"
        )
    elif any(_SHARD.search(name) for name in names):
        found = (
            f"its parts {_listed(names)} (read each with safetensors.torch.load_file, and write all of them "
            f"with one save_file to {TENSORS_NAME})"
        )
    else:
        found = f"{_listed(names)} (save the adapter with peft's save_pretrained)"
    raise AdapterFormatError(f"expected {TENSORS_NAME}, found {found}")


def _has_config(folder: Path) -> bool:
    return not folder.is_symlink() and (folder / CONFIG_NAME).is_file()


def with_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts checkpoint-1000 after checkpoint-500."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return f"{', '.join(map(repr, names[:MAX_NAMES_SHOWN]))}{more}"


@contextmanager
def open_inside(folder: Path, name: str, max_bytes: int) -> Iterator[tuple[BufferedReader, int]]:
    """Opens the file `name` inside `folder` for reading.

    Args:
        folder: a path that `resolve` returned.
        name: the file's name.
        max_bytes: the largest size that is allowed.

    Yields:
        The file and its size in bytes.

    Raises:
        AdapterSourceError: it is a link out of the folder, not a regular file, or too large.
        OSError: it does not open.
    """
    path = os.path.realpath(folder / name)
    if not Path(path).is_relative_to(folder):
        raise AdapterSourceError(
            f"{name}: expected a file in the adapter's folder, found a symbolic link that leaves it "
            "(copy the folder with `cp -rL`, or download with `hf download --local-dir`)"
        )
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise AdapterSourceError(f"{name}: expected a regular file, found a device, pipe or socket")
        if status.st_size > max_bytes:
            raise AdapterSourceError(
                f"{name}: expected at most {max_bytes} bytes, found {status.st_size} bytes"
            )
        yield file, status.st_size


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a named pipe waits for a writer, and the file may have become a link since the check.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def describe(error: OSError | ValueError) -> str:
    """What was found instead of a folder or a file, for the end of a message."""
    match error:
        case FileNotFoundError():
            return "nothing there"
        case NotADirectoryError():
            return "a file"
        case OSError():
            return str(error.strerror).lower()
        case _:
            return f"an invalid path ({error})"


def write_whole(handle: int, data: bytes) -> None:
    """Writes all of `data`; `os.write` alone may write a part of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def sync(path: Path) -> None:
    """Makes a file or a folder's entries survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
