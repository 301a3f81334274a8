"""Only regular files that really lie in the adapter's folder are read."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from turret_adapters.errors import AdapterFormatError, AdapterSourceError
from turret_adapters.formats.files import (
    CHUNK_BYTES,
    MAX_NAMES_SHOWN,
    digest_of_folder,
    open_inside,
    refuse_other_tensors,
    resolve,
    sync,
    write_whole,
)
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


def test_a_folder_with_few_files_is_shown_whole(tmp_path: Path) -> None:
    for index in range(MAX_NAMES_SHOWN):
        (tmp_path / str(index)).touch()
    with pytest.raises(AdapterSourceError, match=f"'{MAX_NAMES_SHOWN - 1}'$"):
        resolve(str(tmp_path))


def test_a_file_is_opened_up_to_the_size_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    with open_inside(tmp_path, "file", 5) as (file, size):
        assert (file.read(), size) == (b"12345", 5)
    assert file.closed
    with (
        pytest.raises(AdapterSourceError, match="at most 4 bytes, found 5"),
        open_inside(tmp_path, "file", 4),
    ):
        pass


def test_only_a_pickle_alone_is_refused(tmp_path: Path) -> None:
    refuse_other_tensors(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(AdapterFormatError, match="a pickle"):
        refuse_other_tensors(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    refuse_other_tensors(tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"],
            "its parts 'adapter_model-00001-of-00002.safetensors', .*save_file",
        ),
        (["adapters.safetensors"], "found 'adapters.safetensors' .*save_pretrained"),
        (["adapter_0.pt"], "found 'adapter_0.pt' .*save_pretrained"),
    ],
)
def test_tensors_in_other_files_are_named(names: list[str], said: str, tmp_path: Path) -> None:
    for name in ["adapter_config.json", "training_args.txt", *names]:
        (tmp_path / name).touch()
    with pytest.raises(AdapterFormatError, match=f"expected adapter_model.safetensors, .*{said}"):
        refuse_other_tensors(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    refuse_other_tensors(tmp_path)


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["default"], r"found one in 'default' \(load '{path}/default', for example\)"),
        (["checkpoint-10", "checkpoint-9"], r"'checkpoint-9' \(load '{path}/checkpoint-10', for"),
        ([str(index) for index in range(7)], "'3', '4' and 2 more"),
    ],
)
def test_the_folder_around_adapters_names_them(folders: list[str], said: str, tmp_path: Path) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "README.md").touch()
    with pytest.raises(AdapterSourceError, match=said.format(path=tmp_path)):
        resolve(str(tmp_path))


def test_a_link_to_an_adapter_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "adapter_config.json").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterSourceError, match="found 'link'"):
        resolve(str(tmp_path / "folder"))


def test_all_is_written_although_the_system_writes_it_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:3]))
    with (tmp_path / "file").open("wb") as file:
        write_whole(file.fileno(), b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_digest_is_of_all_bytes_and_tells_config_and_tensors_apart(tmp_path: Path) -> None:
    config, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    found = set()
    large = bytes(range(256)) * (2 * CHUNK_BYTES // 256)
    contents = [(b"{}", b"x"), (b"{}x", b""), (b"", b"{}x"), (b"{}", large), (b"{}", large[:-1] + b"x")]
    for config_bytes, tensor_bytes in contents:
        config.write_bytes(config_bytes)
        tensors.write_bytes(tensor_bytes)
        found.add(digest_of_folder(tmp_path))
        prefix = len(config_bytes).to_bytes(8, "little")
        assert digest_of_folder(tmp_path) == hashlib.sha256(prefix + config_bytes + tensor_bytes).hexdigest()
    assert len(found) == len(contents)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_file_that_does_not_synchronise_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    before = open_files()
    sync(tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        sync(tmp_path)
    assert open_files() == before
