"""Where an adapter's bytes come from: a folder on this machine.

Whoever hands in a folder decides what stands in it, so a file is opened only if it is a regular file that
really lies in the folder, and only up to a bound.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from turret_adapters.errors import AdapterFormatError, AdapterSourceError

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
NAMES_SHOWN = 5


def resolve(path: str) -> Path:
    """Finds the folder of an adapter.

    Returns:
        The folder's absolute path without symbolic links.

    Raises:
        AdapterSourceError: it does not exist, is no directory, or holds no `adapter_config.json`.
    """
    try:
        folder = Path(os.path.realpath(path, strict=True))
        names = sorted(place.name for place in folder.iterdir())
    except (OSError, ValueError) as error:
        raise AdapterSourceError(
            f"{path!r}: expected a folder with {CONFIG_NAME}, found {describe(error)}"
        ) from error
    if CONFIG_NAME not in names:
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        found = f"{', '.join(map(repr, names[:NAMES_SHOWN]))}{more}" if names else "an empty one"
        raise AdapterSourceError(f"{path!r}: expected a folder with {CONFIG_NAME}, found {found}")
    return folder


def refuse_pickle(folder: Path) -> None:
    """Says what to do about an adapter that was saved without safetensors.

    Raises:
        AdapterFormatError: a pickle stands where the tensors should.
        OSError: the folder cannot be read.
    """
    names = {place.name for place in folder.iterdir()}
    if TENSORS_NAME not in names and _PICKLE_NAME in names:
        raise AdapterFormatError(
            f"expected {TENSORS_NAME}, found {_PICKLE_NAME}, a pickle, which may run code when read (load it "
            "with peft where that is safe, then save_pretrained(path, safe_serialization=True))"
        )


@contextmanager
def open_inside(folder: Path, name: str, max_bytes: int) -> Iterator[tuple[BufferedReader, int]]:
    """Opens `name`, which must lie in `folder`, for reading.

    Args:
        folder: a path that `resolve` returned.
        name: the file's name.
        max_bytes: the most it may hold.

    Yields:
        The file and its size in bytes.

    Raises:
        AdapterSourceError: it is a link out of the folder, no regular file, or too large.
        OSError: it cannot be opened or read.
    """
    place = os.path.realpath(folder / name, strict=True)
    if not Path(place).is_relative_to(folder):
        raise AdapterSourceError(
            f"{name}: expected a file in the adapter's folder, found a symbolic link that leaves it "
            "(copy the folder with `cp -rL`, or download with `hf download --local-dir`)"
        )
    with open(place, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise AdapterSourceError(f"{name}: expected a regular file, found a device, pipe or socket")
        if status.st_size > max_bytes:
            raise AdapterSourceError(
                f"{name}: expected at most {max_bytes} bytes, found {status.st_size} bytes"
            )
        yield file, status.st_size


def _open_without_waiting(place: str, flags: int) -> int:
    # Opening a named pipe would wait for a writer, and the place may have become a link since it was checked.
    return os.open(place, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


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
            return f"a path that cannot exist ({error})"
