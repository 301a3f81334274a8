"""What `--model` names: a checkpoint of transformers, in a folder or on the Hugging Face hub.

Anything else is refused by what it is. Imports no library that takes seconds to import, so that a path is
checked before them.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from turret_server.errors import ConfigError, TurretError

log = logging.getLogger(__name__)

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_EXPECTED = f"the folder of a checkpoint of transformers, with {_CONFIG}"
_IS_GGUF = (
    "GGUF, which is not served; give the checkpoint of transformers that it was made from, with config.json "
    "and *.safetensors"
)
_HUB_SECONDS = 10.0


def check_path(name_or_path: str) -> None:
    """Checks that a path leads to a checkpoint. What may be a name on the hub passes.

    Raises:
        ConfigError: it leads nowhere, or to something else, which the message names.
    """
    path = Path(name_or_path)
    try:
        found, files = path.exists(), {each.name for each in path.iterdir()} if path.is_dir() else None
    except OSError as error:
        raise _refused(name_or_path, f"expected {_EXPECTED}; found: {error.strerror}") from error
    if files is not None:
        _check_files(name_or_path, files)
    elif found:
        what = _IS_GGUF if path.suffix == ".gguf" else f"expected {_EXPECTED}; found a file"
        raise _refused(name_or_path, what)
    elif name_or_path.startswith(("/", "./", "../", "~")):
        raise _refused(name_or_path, "no such folder; check the path")


@contextmanager
def reading(name_or_path: str, what: str) -> Iterator[None]:
    """Reads `what` of a checkpoint with transformers in the block; from the cache if the hub does not answer.

    Raises:
        ConfigError: it is not a checkpoint, or the block fails; the message says so in one line.
    """
    check_path(name_or_path)
    is_local = Path(name_or_path).exists()
    files = None if is_local else _files_on_hub(name_or_path)
    if files is not None:
        _check_files(name_or_path, files)
    is_offline = not is_local and files is None
    try:
        with _offline() if is_offline else nullcontext():
            yield
    except (TurretError, MemoryError):
        raise
    except Exception as error:  # transformers and the libraries below it raise anything for a broken file
        found = f"found {what} unreadable: {_one_line(error)}"
        if is_offline and isinstance(error, OSError):
            found = (
                "no such folder, the hub does not answer, and its cache has no such model; check the name "
                "and the network, or give a folder"
            )
        raise _refused(name_or_path, found) from error


def check_type(name_or_path: str, values: Mapping[str, Any], known: Collection[str], version: str) -> None:
    """Checks the type in a configuration.

    Raises:
        ConfigError: transformers of this version does not know it.
    """
    model_type = values.get("model_type")
    if model_type not in known:
        own = "; its own code (auto_map) is not run" if "auto_map" in values else ""
        raise _refused(
            name_or_path,
            f"{_CONFIG} has the model_type {model_type!r}, which transformers {version} does not know{own}; "
            "give a checkpoint of another type",
        )


def _check_files(name_or_path: str, files: Collection[str]) -> None:
    if _ADAPTER in files:
        raise _refused(
            name_or_path,
            f"an adapter{_base_of(Path(name_or_path) / _ADAPTER)}; give its base model, and load the adapter "
            f"with `turret adapters load NAME {name_or_path}`",
        )
    if _CONFIG in files:
        return
    if any(name.endswith(".gguf") for name in files):
        raise _refused(name_or_path, _IS_GGUF)
    below = sorted(str(each.parent) for each in Path(name_or_path).glob(f"*/{_CONFIG}"))
    if below:
        raise _refused(name_or_path, f"expected {_EXPECTED}; found it below: give {' or '.join(below[:3])}")
    raise _refused(name_or_path, f"expected {_EXPECTED}; found none")


def _base_of(adapter_config: Path) -> str:
    try:
        return f" of the base model {json.loads(adapter_config.read_text())['base_model_name_or_path']}"
    except (OSError, ValueError, TypeError, KeyError):  # on the hub, or broken
        return ""


def _refused(name_or_path: str, why: str) -> ConfigError:
    return ConfigError(f"--model {name_or_path}: {why}")


@functools.cache
def _files_on_hub(name: str) -> frozenset[str] | None:
    """The files of a model on the hub; None if the hub does not answer.

    Asked once, before transformers asks for one file after another, each with six attempts.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415 -- see above
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        found = HfApi().model_info(name, timeout=_HUB_SECONDS)
    except HFValidationError as error:
        raise ConfigError(
            f"--model {name}: no such folder, and not a name on the hub; check the path"
        ) from error
    except GatedRepoError as error:
        raise _refused(
            name, "access is granted on request; ask for it on the model's page of the hub, and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise _refused(
            name,
            "no such folder, and the hub has no such model, or not for everybody; check the name, or set "
            "HF_TOKEN",
        ) from error
    except Exception as error:  # noqa: BLE001 -- of the network, of its library, of the hub
        log.warning("the hub does not answer (%s); %s must be in its cache", _one_line(error), name)
        return None
    return frozenset(each.rfilename for each in found.siblings or ())


@contextmanager
def _offline() -> Iterator[None]:
    """The hub's library does not try the network within the block."""
    from huggingface_hub import constants  # noqa: PLC0415 -- see above

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}"
