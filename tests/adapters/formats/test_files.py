"""Only regular files that really lie in the adapter's folder are read."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from turret_adapters.errors import AdapterSourceError
from turret_adapters.formats.files import resolve
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec

NAMES = ["adapter_config.json", "adapter_model.safetensors"]


def test_resolve_returns_the_real_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "adapter_config.json").touch()
    (tmp_path / "link").symlink_to("real")
    assert resolve(str(tmp_path / "link")) == (tmp_path / "real").resolve()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("absent", "nothing there"),
        ("file", "a file"),
        ("file/below", "a file"),
        ("loop", "too many levels of symbolic links"),
        ("dangling", "nothing there"),
        ("empty", "an empty one"),
        ("full", "'0', '1', '2', '3', '4' and 3 more"),
        ("zero\0", "invalid path"),
        ("surrogate\ud800", "invalid path"),
        ("n" * 5000, "file name too long"),
    ],
)
def test_resolve_says_what_it_found(name: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("absent")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    for index in range(8):
        (tmp_path / "full" / str(index)).touch()
    with pytest.raises(AdapterSourceError, match=r"expected a folder with adapter_config\.json") as refusal:
        resolve(str(tmp_path / name))
    assert found in str(refusal.value)


def test_reading_what_is_not_there(base: BaseSpec, weights: BaseWeights, tmp_path: Path) -> None:
    with pytest.raises(AdapterSourceError, match="nothing there"):
        read_adapter(tmp_path / "absent", base, weights)
    with pytest.raises(AdapterSourceError, match="invalid path"):
        read_adapter(tmp_path / "zero\0", base, weights)


@pytest.mark.parametrize("name", NAMES)
def test_a_link_that_stays_in_the_folder(
    name: str, sound: dict[str, Any], base: BaseSpec, weights: BaseWeights, tmp_path: Path
) -> None:
    folder = sound["LORA"].write(tmp_path / "adapter")
    expected = read_adapter(folder, base, weights).spec
    (folder / name).rename(folder / "elsewhere")
    (folder / name).symlink_to("elsewhere")
    (tmp_path / "link").symlink_to(folder)
    assert read_adapter(tmp_path / "link", base, weights).spec == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_the_folder(
    name: str, sound: dict[str, Any], base: BaseSpec, weights: BaseWeights, tmp_path: Path
) -> None:
    # The first folder's name begins with the second's.
    folder = sound["LORA"].write(tmp_path / "adapter")
    (tmp_path / "adapter-blobs").mkdir()
    (folder / name).rename(tmp_path / "adapter-blobs" / "blob")
    (folder / name).symlink_to("../adapter-blobs/blob")
    with pytest.raises(AdapterSourceError, match=f"{name}.*symbolic link.*--local-dir"):
        read_adapter(folder, base, weights)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "loop", "dangling"])
def test_no_regular_file(
    *,
    kind: str,
    name: str,
    sound: dict[str, Any],
    base: BaseSpec,
    weights: BaseWeights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = sound["LORA"].write(tmp_path)
    (folder / name).unlink()
    match kind:
        case "folder":
            (folder / name).mkdir()
        case "pipe":
            os.mkfifo(folder / name)
        case "socket":
            monkeypatch.chdir(folder)  # a socket's path is at most 107 bytes
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(name)
        case "loop":
            (folder / name).symlink_to(name)
        case "dangling":
            (folder / name).symlink_to("absent")
    with pytest.raises(AdapterSourceError, match=r"expected.*found"):
        read_adapter(folder, base, weights)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")]
)
def test_errors_of_the_system_are_errors_of_the_source(
    error: OSError,
    sound: dict[str, Any],
    base: BaseSpec,
    weights: BaseWeights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> int:
        raise error

    folder = sound["LORA"].write(tmp_path)
    monkeypatch.setattr("turret_adapters.formats.files.os.open", fail)
    with pytest.raises(AdapterSourceError, match=str(error.strerror).lower()) as refusal:
        read_adapter(folder, base, weights)
    assert refusal.value.__cause__ is error
