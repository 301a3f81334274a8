"""Uploads go on where they stopped, and only what was announced is stored."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.adapter_files import CONFIG, digest, files, read_folder, revision
from turret_adapters.errors import (
    AdapterError,
    AdapterFormatError,
    SourceTooLargeError,
    SourceUnavailableError,
    StoreBusyError,
    StoreFailedError,
    UploadError,
    UploadsFullError,
)
from turret_adapters.formats.files import MAX_CONFIG_BYTES
from turret_adapters.store import uploads
from turret_adapters.store.store import AdapterStore
from turret_adapters.store.uploads import Upload

TENSORS = b"tensors"


def receive(store: AdapterStore, tensors: bytes = TENSORS, owner: str = "") -> Upload:
    return store.receive(digest(tensors), CONFIG, len(tensors), owner)


def partial(store: AdapterStore) -> list[Path]:
    return list((store.root / "uploads").iterdir())


def test_an_upload_in_pieces_is_stored_and_held(store: AdapterStore) -> None:
    with receive(store) as upload:
        for offset, byte in enumerate(TENSORS):
            upload.write(offset, bytes([byte]))
        assert store.revisions() == {}
        assert upload.finish() == revision()
    assert read_folder(store.path(revision())) == files()
    assert partial(store) == []
    with pytest.raises(StoreBusyError):
        store.remove(revision())


def test_an_upload_goes_on_where_it_stopped_even_after_a_restart(
    open_store: Callable[..., AdapterStore],
) -> None:
    first = open_store()
    with receive(first) as upload:
        upload.write(0, TENSORS[:3])
    with receive(first) as upload:
        assert upload.offset == 3
        upload.write(3, TENSORS[3:5])
    with receive(open_store()) as upload:
        assert upload.offset == 5
        upload.write(5, TENSORS[5:])
        assert upload.finish() == revision()


@pytest.mark.parametrize(("error", "offset"), [(AdapterFormatError, 0), (SourceUnavailableError, 7)])
def test_what_is_refused_is_deleted_unless_waiting_helps(
    error: type[AdapterError], offset: int, store: AdapterStore
) -> None:
    def refuse(_folder: Path) -> None:
        raise error("refused")

    with receive(store) as upload:
        upload.write(0, TENSORS)
        with pytest.raises(error):
            upload.finish(refuse)
    with receive(store) as upload:
        assert upload.offset == offset


def test_bytes_that_do_not_follow_are_refused_and_do_no_harm(store: AdapterStore) -> None:
    with receive(store) as upload:
        upload.write(0, TENSORS[:3])
        for offset in (0, 2, 4, -1):
            with pytest.raises(UploadError, match=f"expected 3, found {offset}"):
                upload.write(offset, b"x")
        with pytest.raises(UploadError, match="expected 7 bytes, found 8"):
            upload.write(3, b"nsors")
        with pytest.raises(UploadError, match="expected 7 bytes, found 3"):
            upload.finish()
        upload.write(3, TENSORS[3:])
        assert upload.finish() == revision()


def test_bytes_of_another_digest_are_thrown_away(store: AdapterStore) -> None:
    with receive(store) as upload:
        upload.write(0, b"tensorz")
        with pytest.raises(UploadError, match="digest: expected"):
            upload.finish()
    assert store.revisions() == {}
    assert partial(store) == []
    with receive(store) as upload:
        assert upload.offset == 0


def test_nobody_goes_on_with_what_another_began(store: AdapterStore) -> None:
    with receive(store, owner="alice") as upload:
        upload.write(0, b"tenXXXX")
    with receive(store, owner="bob") as upload:
        assert upload.offset == 0
        upload.write(0, TENSORS)
        assert upload.finish() == revision()


def test_having_a_digest_is_not_having_the_bytes(store: AdapterStore) -> None:
    with receive(store) as upload:
        upload.write(0, TENSORS)
        upload.finish()
    with receive(store) as upload:
        assert upload.offset == 0
        with pytest.raises(UploadError):
            upload.finish()


def test_an_upload_is_received_once_at_a_time(open_store: Callable[..., AdapterStore]) -> None:
    store = open_store()
    with receive(store) as upload:
        upload.write(0, TENSORS[:3])
        with pytest.raises(StoreBusyError, match="another call is receiving"):
            receive(store)
        upload.write(3, TENSORS[3:])
        assert upload.finish() == revision()


def test_what_nobody_goes_on_with_expires(open_store: Callable[..., AdapterStore]) -> None:
    store = open_store()
    for seconds in (uploads.KEPT_SECONDS + 60, -uploads.KEPT_SECONDS - 60):
        with receive(store) as upload:
            upload.write(0, TENSORS[:3])
            (folder,) = partial(store)
            then = time.time() - seconds
            os.utime(folder / "adapter_model.safetensors", (then, then))
            store.collect(set)
            assert partial(store) == [folder], "it is being received"
        store.collect(set)
        assert partial(store) == []


def test_an_upload_that_expired_while_no_server_ran_is_deleted_at_the_start(
    open_store: Callable[..., AdapterStore],
) -> None:
    store = open_store()
    for age, left in ((uploads.KEPT_SECONDS - 60, 1), (uploads.KEPT_SECONDS + 60, 0)):
        with receive(store) as upload:
            upload.write(upload.offset, TENSORS[:1])
        (folder,) = partial(store)
        os.utime(folder / "adapter_model.safetensors", (time.time() - age, time.time() - age))
        store = open_store()
        assert len(partial(store)) == left


def test_the_oldest_idle_upload_makes_room(
    open_store: Callable[..., AdapterStore],
) -> None:
    store = open_store(28)
    with receive(store, b"tensor1") as upload:
        upload.write(0, b"t")
        os.utime(partial(store)[0] / "adapter_model.safetensors", (time.time() - 60, time.time() - 60))
    with receive(store, b"tensor2") as second:
        second.write(0, b"t")
        with receive(store, b"tensor3"):
            assert len(partial(store)) == 2, "the first is gone"
            with pytest.raises(UploadsFullError, match="try again"):
                receive(store, b"tensor4")
        with receive(store, b"tensor4"):
            assert len(partial(store)) == 2
        second.write(1, b"ensor2")


def test_the_number_of_uploads_is_limited(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_UPLOADS", 4)
    with receive(store, b"1"), receive(store, b"2"), pytest.raises(UploadsFullError):
        receive(store, b"3")


def test_nobody_takes_all_the_room(open_store: Callable[..., AdapterStore]) -> None:
    store = open_store(28)
    with receive(store, b"tensor1"), receive(store, b"tensor2"):
        with pytest.raises(UploadsFullError, match="at most 128 uploads of 14 bytes in total of one tenant"):
            receive(store, b"tensor3")
        with store.receive(digest(b"tensor3"), CONFIG, 7, "another") as other:
            other.write(0, b"tensor3")
            store.release(other.finish())
    with store.receive(digest(), CONFIG, 28, "one that is large"):
        assert len(partial(store)) == 1


@pytest.mark.parametrize("wrong", ["", "0" * 63, "0" * 65, "G" * 64, "../" + "0" * 61, "0" * 64 + "\n"])
def test_a_digest_that_is_none_is_refused(wrong: str, store: AdapterStore) -> None:
    with pytest.raises(UploadError, match="64 hexadecimal digits"):
        store.receive(wrong, CONFIG, 7)
    assert partial(store) == []


def test_an_announced_size_that_cannot_be_is_refused(store: AdapterStore) -> None:
    with pytest.raises(UploadError, match="size"):
        store.receive(digest(), CONFIG, -1)
    with pytest.raises(SourceTooLargeError):
        store.receive(digest(), CONFIG, 9 << 30)
    with pytest.raises(SourceTooLargeError):
        store.receive(digest(), bytes(2 << 20), 7)
    assert partial(store) == []


def test_an_upload_whose_end_was_killed_goes_on(store: AdapterStore) -> None:
    with receive(store) as upload:
        upload.write(0, TENSORS)
        (folder,) = partial(store)
        for place in folder.iterdir():
            place.chmod(0o444)
    with receive(store) as upload:
        assert upload.offset == 7
        assert {place.stat().st_mode & 0o777 for place in folder.iterdir()} == {0o600}
        assert upload.finish() == revision()


def open_files(store: AdapterStore) -> list[str]:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sorted(target for target in map(os.readlink, links) if target.startswith(str(store.root)))


def test_uploads_leave_no_file_open_and_nothing_in_the_books(store: AdapterStore) -> None:
    before = open_files(store)
    for _ in range(2):
        with receive(store) as upload:
            upload.write(0, TENSORS[:3])
        with receive(store) as upload, pytest.raises(UploadError):
            upload.write(0, b"")
        with receive(store) as upload:
            upload.write(3, TENSORS[3:])
            store.release(upload.finish())
        with store.receive(digest(b"nothing"), CONFIG, 6) as upload:
            upload.write(0, b"others")
            with pytest.raises(UploadError):
                upload.finish()
        assert open_files(store) == before
        assert store._uploads._receiving == set()
        assert not store._held


def test_an_upload_whose_folder_is_not_writable_does_not_block_the_next_try(store: AdapterStore) -> None:
    with receive(store) as upload:
        upload.write(0, TENSORS[:3])
    (folder,) = partial(store)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()
    with pytest.raises(StoreFailedError):
        receive(store)
    (folder / "adapter_config.json").rmdir()
    with receive(store) as upload:
        assert upload.offset == 3


@pytest.mark.parametrize("size", [0, 1])
def test_an_upload_of_few_bytes_is_one(store: AdapterStore, size: int) -> None:
    content = TENSORS[:size]
    with receive(store, content) as upload:
        upload.write(0, content)
        assert upload.finish() == revision(content)


def test_a_config_of_the_largest_size_is_received(store: AdapterStore) -> None:
    config = bytes(MAX_CONFIG_BYTES)
    with store.receive(digest(TENSORS, config), config, 7) as upload:
        upload.write(0, TENSORS)
        assert upload.finish() == revision(TENSORS, config)


def test_tensors_as_large_as_the_budget_are_received(open_store: Callable[..., AdapterStore]) -> None:
    store = open_store(28)
    with pytest.raises(SourceTooLargeError, match=r"28 bytes of tensors, found .* and 29"):
        store.receive(digest(), CONFIG, 29)
    store.receive(digest(), CONFIG, 28).close()


def test_another_config_with_the_same_tensors_is_another_upload(store: AdapterStore) -> None:
    with receive(store) as upload:
        upload.write(0, TENSORS[:3])
        with store.receive(digest(TENSORS), b"{}", 7) as other:
            assert other.offset == 0


def test_an_upload_of_what_is_stored_already_leaves_nothing_behind(store: AdapterStore) -> None:
    for owner in ("alice", "bob"):
        with receive(store, owner=owner) as upload:
            upload.write(0, TENSORS)
            assert upload.finish() == revision()
        assert partial(store) == []


def test_an_upload_whose_bytes_are_gone_is_told_with_the_stores_folder(store: AdapterStore) -> None:
    with receive(store) as upload:
        upload.write(0, TENSORS)
        (folder,) = partial(store)
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(StoreFailedError, match=f"^store {str(store.root)!r}: "):
            upload.finish()
    assert not store._held


def test_an_upload_that_was_killed_before_its_first_byte_expires(
    open_store: Callable[..., AdapterStore],
) -> None:
    store = open_store()
    receive(store).close()
    (folder,) = partial(store)
    (folder / "adapter_model.safetensors").unlink()
    store = open_store()
    assert partial(store) == []


def test_an_upload_that_has_expired_is_begun_again(store: AdapterStore) -> None:
    with receive(store) as upload:
        upload.write(0, TENSORS[:3])
    (folder,) = partial(store)
    then = time.time() - uploads.KEPT_SECONDS - 60
    os.utime(folder / "adapter_model.safetensors", (then, then))
    receive(store, b"other").close()
    assert folder not in partial(store), "every upload that begins ends those that have expired"
    with receive(store) as upload:
        assert upload.offset == 0
        upload.write(0, TENSORS[:3])
    os.utime(folder / "adapter_model.safetensors", (then, then))
    with receive(store) as upload:
        assert upload.offset == 0


def test_the_number_of_all_tenants_uploads_is_limited(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_UPLOADS", 2)
    with receive(store, owner="alice"), receive(store, owner="bob"):
        with pytest.raises(UploadsFullError, match=r"at most 2 uploads of .* found 2 others"):
            receive(store, owner="carol")
        assert len(partial(store)) == 2
    with receive(store, owner="carol"):
        assert len(partial(store)) == 2, "the oldest of those that nobody continues made room"


def test_a_tenants_own_idle_upload_makes_room_and_no_others(open_store: Callable[..., AdapterStore]) -> None:
    store = open_store(28)
    receive(store, b"tensor0", owner="bob").close()
    (others,) = partial(store)
    for tensors in (b"tensor1", b"tensor2", b"tensor3"):
        receive(store, tensors).close()
    assert others in partial(store)
    assert len(partial(store)) == 3


def test_the_bytes_so_far_are_private_whatever_the_umask(store: AdapterStore) -> None:
    umask = os.umask(0)
    try:
        receive(store).close()
    finally:
        os.umask(umask)
    (folder,) = partial(store)
    found = (folder.stat().st_mode & 0o777, (folder / "adapter_model.safetensors").stat().st_mode & 0o777)
    assert found == (0o700, 0o600)
