"""From where an adapter may come: not from another's folder, not from this machine's network."""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import closing
from functools import partial
from pathlib import Path

import grpc
import pytest

from security.conftest import EVIL, Answer, answer_of
from support.web import web_server
from turret.v1 import adapters_pb2, adapters_pb2_grpc

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def load(channel):
    """How a load by the hostile tenant ends."""
    adapters = adapters_pb2_grpc.AdapterServiceStub(channel)

    def load(path: str) -> Answer:
        request = adapters_pb2.LoadAdapterRequest(name="evil-x", path=path)
        return answer_of(partial(adapters.LoadAdapter, request, metadata=EVIL))

    return load


def test_paths_out_of_its_folder(load, place):
    (place.folder / "link").symlink_to(place.secret)
    (place.folder / "up").symlink_to("..")
    written = (
        str(place.secret), "/", "/etc", "/proc/self/cwd", "/proc/1/root", "/dev/fd", "~root", "~",
        f"{place.folder}/../good/secret", f"{place.folder}/own/../../good/secret", f"{place.folder}/link",
        f"{place.folder}/up/good/secret", f"{place.folder}-of-others", "../../etc", ".", "./own", "x",
        f"/proc/self/root{place.secret}", f"//{place.secret}", "\\\\host\\share", f"{place.secret}\n",
    )  # fmt: skip
    found = {path: load(path) for path in written}
    assert {(each.code, each.reason) for each in found.values()} == {
        (grpc.StatusCode.PERMISSION_DENIED, "SOURCE_FORBIDDEN")
    }
    for name in ("link", "up"):
        (place.folder / name).unlink()


def test_errors_do_not_reveal_files_outside_the_sources(load, place):
    """Also not whether there is a link, by a path that goes through it and back."""
    (place.secret.parent / "deep").symlink_to("/usr/lib")
    back = "/".join([".."] * 3)
    paths = [f"{place.secret.parent}/{name}/{back}/evil/own" for name in ("deep", "secret", "none")]
    assert len({load(path).message.replace(path, "") for path in paths}) == 1
    paths = [str(place.secret.parent / name) for name in ("secret", "none", "deep")]
    assert len({load(path).message.replace(path, "") for path in paths}) == 1
    (place.secret.parent / "deep").unlink()


@pytest.mark.parametrize("path", ["", "x" * 5000, "/" + "a/" * 1_000_000, "hf://" + "a" * 3_000_000])
def test_paths_that_are_none_hold_nobody_up(load, path):
    answer = load(path)
    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert len(answer.message) < 300


@pytest.mark.parametrize("zero", ["\0", "own\0", "own/\0/.."])
def test_paths_with_a_zero(load, place, zero):
    assert load(f"{place.folder}/{zero}").code in {
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.PERMISSION_DENIED,
    }


def _link(folder: Path, secret: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / TENSORS).symlink_to(secret / TENSORS)


def _link_to_itself(folder: Path, _secret: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(CONFIG)


def _device(folder: Path, _secret: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/dev/zero")


def _pipe(folder: Path, _secret: Path) -> None:
    (folder / TENSORS).unlink()
    os.mkfifo(folder / TENSORS)


def _socket(folder: Path, _secret: Path) -> None:
    (folder / TENSORS).unlink()
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        before = Path.cwd()
        os.chdir(folder)  # a socket's path is short
        listening.bind(TENSORS)
        os.chdir(before)


def _folder(folder: Path, _secret: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


def _sparse(folder: Path, _secret: Path) -> None:
    os.truncate(folder / TENSORS, 9 << 30)


def _pickle(folder: Path, _secret: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model.bin")


@pytest.fixture
def folder(place):
    """A sound adapter of its own."""
    folder = Path(shutil.copytree(place.folder / "own", place.folder / "changed"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "change", [_link, _link_to_itself, _device, _pipe, _socket, _folder, _sparse, _pickle]
)
def test_what_is_no_file_of_its_own(load, place, folder, change):
    change(folder, place.secret)
    answer = load(str(folder))
    assert answer.code in {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT}
    assert answer.reason in {"ADAPTER_SOURCE_NOT_FOUND", "ADAPTER_INVALID", "SOURCE_TOO_LARGE"}


def test_names_of_files_that_are_no_text(load, folder):
    (folder / CONFIG).rename(folder / "x\n\x1b[31m\udcff")
    answer = load(str(folder))
    assert (answer.code, answer.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_SOURCE_NOT_FOUND")
    assert "\\n\\x1b[31m\\udcff" in answer.message


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "0.0.0.0",  # noqa: S104
        "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::]", "localhost.", "LOCALHOST",
    ],
)  # fmt: skip
def test_nothing_of_this_machine_is_asked(load, host):
    with web_server() as web:
        port = web.url.rpartition(":")[2]
        for path in ("adapter", "adapter.zip"):
            answer = load(f"http://{host}:{port}/{path}")
            # Some are no address for this machine's resolver.
            assert answer.reason in {"SOURCE_FORBIDDEN", "SOURCE_UNAVAILABLE"}
        assert not web.asked


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data", "http://[fe80::1]/x", "http://[fd00:ec2::254]/x",
        "http://10.0.0.1/x", "http://192.168.1.1/x", "http://100.64.0.1/x", "http://[64:ff9b::7f00:1]/x",
        "http://[2002:7f00:1::]/x", "http://2852039166/x", "http://0xa9fea9fe/x", "http://224.0.0.1/x",
    ],
)  # fmt: skip
def test_nothing_of_the_networks_within_is_asked(load, url):
    answer = load(url)
    assert (answer.code, answer.reason) == (grpc.StatusCode.PERMISSION_DENIED, "SOURCE_FORBIDDEN")


@pytest.mark.parametrize(
    "url",
    [
        "http://good.example.com@127.0.0.1/x", "http://127.0.0.1#@example.com/x", "http://127.0.0.1\\@a.com",
        "http://example.com:99999/x", "http://example.com/../x", "http://example.com/%2e%2e/x", "http://e x/",
        "http://[::1/x", "http:///x", "http://", "file:///etc", "file://localhost/etc", "local:///", "ftp://x",
        "simplecache::http://127.0.0.1/x", "http://example.com/x::file:///etc", "data://x/y", "memory://x",
        "zip://x::file:///etc/x.zip", "github://o:r@main/x", "dir::file:///", "reference://x/y", "sftp://x/y",
        "git:///etc", "s3://bucket/x", "hf://owner/name", "owner/name", "HTTP://127.0.0.1/x", "javascript:x",
        "http://exämple.com/x", "gopher://127.0.0.1/x", "\u202ehttp://x/y", "http://a\r\nHost: b/x",
    ],
)  # fmt: skip
def test_urls_of_other_kinds(load, url):
    answer = load(url)
    assert answer.code in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND}
    assert answer.reason in {"SOURCE_FORBIDDEN", "ADAPTER_SOURCE_NOT_FOUND"}
