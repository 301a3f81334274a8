"""Whatever an archive says of itself, only one adapter's two files come out of it, under their own names."""

from __future__ import annotations

import gzip
import io
import random
import stat
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.adapter_files import CONFIG, files, read_folder
from turret_adapters.errors import AdapterError, AdapterSourceError, SourceTooLargeError
from turret_adapters.formats.files import no_progress
from turret_adapters.sources.archive import unpack
from turret_adapters.sources.intake import Intake

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name")

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
MOST = 1 << 20
Members = list[tuple[str, bytes]]
ADAPTER: Members = [(CONFIG_NAME, CONFIG), (TENSORS_NAME, b"tensors")]


def make_zip(members: Members) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return data.getvalue()


def make_tar(members: Members) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


KINDS: dict[str, Callable[[Members], bytes]] = {"poet.zip": make_zip, "poet.tar.gz": make_tar}


def unpacked(name: str, data: bytes, most: int = MOST) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "inner"
        folder.mkdir()
        try:
            unpack(io.BytesIO(data), name, Intake(folder, most, no_progress), most)
        finally:
            assert list(Path(outer).iterdir()) == [folder]
            assert {place.name for place in folder.iterdir()} <= {CONFIG_NAME, TENSORS_NAME}
        return read_folder(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["", "./", "poet/", "deep/er/poet/"])
def test_the_two_files_come_out(kind: str, folder: str) -> None:
    members = [(f"{folder}{name}", content) for name, content in ADAPTER]
    assert unpacked(kind, KINDS[kind]([*members, (f"{folder}README.md", b"read me")])) == files()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "hostile",
    [
        f"../{CONFIG_NAME}", "../../etc/passwd", "/etc/passwd", f"poet/../../{TENSORS_NAME}", "..",
        "a\\..\\..\\b", "C:\\b",
    ],
)  # fmt: skip
def test_a_path_out_of_the_archive_is_refused(kind: str, hostile: str) -> None:
    with pytest.raises(AdapterSourceError, match="expected paths inside the archive"):
        unpacked(kind, KINDS[kind]([*ADAPTER, (hostile, b"x")]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("members", "found"),
    [
        ([], "found neither"),
        (ADAPTER[:1], f"found '{CONFIG_NAME}'"),
        ([("a/" + CONFIG_NAME, b""), ("b/" + TENSORS_NAME, b"")], "in one folder"),
        ([*ADAPTER, ("other/" + CONFIG_NAME, b"")], "found several"),
    ],
)
def test_what_is_not_one_adapter_is_refused(kind: str, members: Members, found: str) -> None:
    with pytest.raises(AdapterSourceError, match=found):
        unpacked(kind, KINDS[kind](members))


def test_a_compressed_archive_has_at_most_so_many_bytes_inside() -> None:
    data = make_tar(ADAPTER)
    size = len(gzip.decompress(data))
    assert unpacked("poet.tar.gz", data, size) == files()
    with pytest.raises(SourceTooLargeError, match=f"at most {size - 1} bytes in the archive"):
        unpacked("poet.tar.gz", data, size - 1)


def test_a_folder_of_a_file_s_name_is_no_file() -> None:
    with pytest.raises(AdapterSourceError, match="in one folder"):
        unpacked("poet.zip", make_zip([(f"{CONFIG_NAME}/", b""), (TENSORS_NAME, b"")]))


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_members_are_refused(kind: str) -> None:
    with pytest.raises(SourceTooLargeError, match="1000 members"):
        unpacked(kind, KINDS[kind]([*ADAPTER, *((f"file{index}", b"") for index in range(1000))]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_a_bomb_is_not_unpacked(kind: str, name: str) -> None:
    data = KINDS[kind]([(each, bytes(8 * MOST) if each == name else b"") for each, _ in ADAPTER])
    assert len(data) < MOST / 10
    with pytest.raises(SourceTooLargeError, match="expected at most"):
        unpacked(kind, data)


def test_a_bomb_beside_the_adapter_is_not_unpacked() -> None:
    members = [*ADAPTER, ("README.md", bytes(8 * MOST))]
    assert unpacked("poet.zip", make_zip(members)) == files(), "nobody looks at it"
    with pytest.raises(SourceTooLargeError, match="in the archive"):
        unpacked("poet.tar.gz", make_tar(members))


def test_a_zip_that_lies_about_its_sizes_is_no_bomb() -> None:
    data = make_zip([(CONFIG_NAME, CONFIG), (TENSORS_NAME, bytes(8 * MOST))])
    lied = data.replace(struct.pack("<L", 8 * MOST), struct.pack("<L", 100))
    assert lied != data
    with pytest.raises(AdapterSourceError, match="valid archive"):
        unpacked("poet.zip", lied)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_of_other_methods_is_refused(method: int) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, content in ADAPTER:
            archive.writestr(name, content)
    with pytest.raises(AdapterSourceError, match="expected files and folders"):
        unpacked("poet.zip", data.getvalue())


def test_a_link_in_a_zip_is_refused() -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(CONFIG_NAME, CONFIG)
        info = zipfile.ZipInfo(TENSORS_NAME)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(AdapterSourceError, match="found a link"):
        unpacked("poet.zip", data.getvalue())


def test_an_encrypted_zip_is_refused() -> None:
    data = bytearray(make_zip(ADAPTER))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(AdapterSourceError, match="encrypted"):
        unpacked("poet.zip", bytes(data))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
@pytest.mark.parametrize("name", [TENSORS_NAME, "other"])
def test_a_link_or_device_in_a_tar_is_refused(kind: bytes, name: str) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(AdapterSourceError, match="found a link"):
        unpacked("poet.tar.gz", data.getvalue())


def test_a_tar_with_a_huge_header_is_not_read_into_memory() -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, 6 << 20
    data = gzip.compress(info.tobuf() + bytes(6 << 20) + bytes(1024))
    with pytest.raises(AdapterSourceError, match="found longer ones"):
        unpacked("poet.tar.gz", data, 8 << 20)


def test_a_zip_with_a_huge_directory_is_not_read_into_memory() -> None:
    members = [("x" * 60000 + str(index), b"") for index in range(80)]
    with pytest.raises(AdapterSourceError, match="found longer ones"):
        unpacked("poet.zip", make_zip(members))


def test_a_tar_that_goes_round_in_circles_ends() -> None:
    # A negative size in an extended header leads back to where the header began.
    record = b"size=-1024\n"
    record = b"%d %s" % (len(record) + 3, record)
    header = tarfile.TarInfo("header")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    member = tarfile.TarInfo("member")
    data = header.tobuf() + record.ljust(512, b"\0") + member.tobuf() + bytes(1024)
    with pytest.raises(AdapterError):
        unpacked("poet.tar.gz", gzip.compress(data))


@pytest.mark.parametrize("kind", KINDS)
def test_every_beginning_of_an_archive_is_refused(kind: str) -> None:
    data = KINDS[kind](ADAPTER)
    for end in range(len(data) - 8):
        with pytest.raises(AdapterError):
            unpacked(kind, data[:end])


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_archives_are_refused_or_right(kind: str) -> None:
    chance = random.Random(5)
    for _ in range(200):
        data = bytearray(KINDS[kind](ADAPTER))
        if kind == "poet.tar.gz":
            plain = bytearray(gzip.decompress(bytes(data)))
            for _ in range(chance.randrange(1, 4)):
                plain[chance.randrange(2048)] = chance.randrange(256)
            data = bytearray(gzip.compress(plain, 1))
        for _ in range(chance.randrange(3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            found = unpacked(kind, bytes(data))
        except AdapterError:
            continue
        assert found.keys() == files().keys()


_PARTS = st.sampled_from(["..", ".", "", "/", "a", CONFIG_NAME, TENSORS_NAME, "\\", "~", "C:", "\u202e", " "])
_PATHS = st.lists(_PARTS, min_size=1, max_size=5).map("/".join) | st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30
)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(paths=st.lists(_PATHS, max_size=4))
@example(paths=["\0"])
def test_any_paths_beside_the_adapter_are_refused_or_do_no_harm(kind: str, paths: list[str]) -> None:
    data = KINDS[kind]([*ADAPTER, *((path, b"hostile") for path in paths)])
    try:
        found = unpacked(kind, data)
    except AdapterSourceError:
        return
    assert found == files()


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(path=_PATHS)
def test_an_adapter_at_any_path_is_refused_or_comes_out_whole(kind: str, path: str) -> None:
    members = [(f"{path}/{name}", content) for name, content in ADAPTER]
    try:
        found = unpacked(kind, KINDS[kind](members))
    except AdapterSourceError:
        return
    assert found == files()


def test_paths_that_are_no_text_are_shown_as_they_can_be(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name in ("a\n\udcff/adapter_config.json", "b/adapter_model.safetensors"):
            tar.addfile(tarfile.TarInfo(name))
    archive.seek(0)
    with pytest.raises(AdapterSourceError) as refused:
        unpack(archive, "x.tar.gz", Intake(tmp_path, 1 << 20, no_progress), 1 << 20)
    assert str(refused.value).isprintable()
