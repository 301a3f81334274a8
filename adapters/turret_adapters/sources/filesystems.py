"""Files of an object store or a model hub through fsspec: `s3://…`, `gs://…`, `hf://…`, as installed.

The libraries open their own connections, to hosts that the operator configures (or allows in `Policy.urls`),
with the server's credentials; addresses are not checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.registry import known_implementations

from turret_adapters.errors import AdapterError, AdapterSourceError, SourceUnavailableError
from turret_adapters.formats.files import (
    CHUNK_BYTES,
    CONFIG_NAME,
    MAX_NAMES_SHOWN,
    TENSORS_NAME,
    found_inside,
    with_numbers,
)
from turret_adapters.sources.intake import Intake, take_files
from turret_adapters.sources.policy import Deadline, public

WAIT_SECONDS = 30.0

_HUB_ID = re.compile(r"(?:hf://)?(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def hub_url(source: str) -> str | None:
    """The URL of `owner/name` or `owner/name@revision`; None if it is not a hub id."""
    found = _HUB_ID.fullmatch(source)
    if not found or found["owner"].strip(".") == "":
        return None
    return source if source.startswith("hf://") else f"hf://{source}"


def take_from_fsspec(url: str, intake: Intake, deadline: Deadline) -> None:
    """Reads an adapter's files from a folder.

    Args:
        url: of the folder; the policy allows it.
        intake: writes the files.
        deadline: checked at each chunk; inside a chunk only the library's own time-outs apply.

    Raises:
        AdapterSourceError: they do not exist, access is denied, or the protocol's package is not installed.
        SourceTooLargeError, SourceUnavailableError
        OSError: a file is not writable.
    """
    files, folder = _open(_pinned(url) if url.startswith("hf://") else url)

    def take(name: str) -> None:
        path = f"{folder}/{name}"
        try:
            size = files.info(path)["size"]
            # For the hub a block size of 0 means streaming; other file systems would not accept it.
            file = files.open(path, "rb", **({"block_size": 0} if url.startswith("hf://") else {}))
        except Exception as error:  # the libraries have no common class
            inside = _adapters_inside(files, folder, deadline) if name == CONFIG_NAME else []
            raise _refusal(url, error, inside) from error
        with file:
            intake.take(name, _chunks(url, file, deadline), size)

    take_files(intake, take)


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    protocol = urlsplit(url).scheme
    try:
        # A cached instance would use old listings.
        files, folder = fsspec.url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        package = known_implementations.get(protocol, {}).get("err", str(error))
        raise AdapterSourceError(
            f"{public(url)!r}: the package of the protocol {protocol!r} is not installed on the server "
            f"({package})"
        ) from error
    except ValueError as error:
        raise AdapterSourceError(
            f"{public(url)!r}: expected a protocol that fsspec knows, found {protocol!r}"
        ) from error
    except Exception as error:  # some connect at once
        raise _refusal(url, error) from error
    return files, str(folder).rstrip("/")


def _pinned(url: str) -> str:
    """A hub URL with the commit that its revision is now, so that both files are from one commit."""
    found = _HUB_ID.fullmatch(url)
    if not found:
        raise AdapterSourceError(f"{public(url)!r}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    from huggingface_hub import HfApi  # noqa: PLC0415 -- a second, and not for other sources

    model = f"{found['owner']}/{found['name']}"
    try:
        commit = HfApi().model_info(model, revision=found["revision"], timeout=WAIT_SECONDS).sha
    except Exception as error:
        raise _refusal(url, error) from error
    return f"hf://{model}@{commit}"


def _chunks(url: str, file: Any, deadline: Deadline) -> Iterator[bytes]:
    while True:
        deadline.left()
        try:
            chunk = file.read(CHUNK_BYTES)
        except Exception as error:
            raise _refusal(url, error) from error
        if not chunk:
            return
        yield chunk


def _adapters_inside(files: Any, folder: str, deadline: Deadline) -> list[str]:
    """The names of some folders in a folder that have an adapter; none if the file system does not tell."""
    found = []
    with suppress(Exception):
        listed = [each["name"] for each in files.ls(folder, detail=True) if each["type"] == "directory"]
        names = sorted((PurePosixPath(each).name for each in listed), key=with_numbers)
        for name in names[-MAX_NAMES_SHOWN:]:
            deadline.left()
            if files.exists(f"{folder}/{name}/{CONFIG_NAME}"):
                found.append(name)
    return found


def _refusal(url: str, error: Exception, inside: Sequence[str] = ()) -> AdapterError:
    if isinstance(error, AdapterError):
        return error
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, FileNotFoundError | PermissionError | ValueError) or status in (401, 403, 404):
        if inside and url.startswith("hf://"):
            message = found_inside(inside, "", "download the model, and load or upload")
        elif inside:
            message = found_inside(inside, public(url))
        return AdapterSourceError(
            f"{public(url)!r}: expected {CONFIG_NAME} and {TENSORS_NAME}, found: {message}"
        )
    return SourceUnavailableError(f"{public(url)!r}: expected an answer, found: {message} (try again later)")
