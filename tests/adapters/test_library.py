"""What is fetched is kept only if it is served."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from turret_adapters.errors import AdapterFormatError, SourceTooLargeError, SourceUnavailableError
from turret_adapters.formats.files import digest_of_folder
from turret_adapters.host import BaseWeights
from turret_adapters.library import AdapterLibrary
from turret_adapters.sources.policy import Policy
from turret_adapters.spec import BaseSpec
from turret_adapters.store.names import Names, Ownership
from turret_adapters.store.store import AdapterStore


@pytest.fixture
def kept(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "kept")


@pytest.fixture
def library(kept: AdapterStore, base: BaseSpec, weights: BaseWeights, tmp_path: Path) -> AdapterLibrary:
    names = Names(kept.root / "names.sqlite", "llama")
    return AdapterLibrary(
        store=kept, names=names, policy=Policy(roots=(tmp_path,)), base=base, weights=weights
    )


@pytest.fixture
def folder(sound: dict[str, Any], tmp_path: Path) -> Path:
    return sound["LORA"].write(tmp_path / "poet")


def test_what_is_fetched_is_read_and_stays_if_it_is_named(
    library: AdapterLibrary, kept: AdapterStore, folder: Path
) -> None:
    with library.fetch(str(folder)) as adapter:
        library.publish("poet", adapter, "https://user:secret@example.com/poet?token=secret")
    assert list(kept.revisions()) == [adapter.spec.revision]
    assert library.names.current()["poet"].source == "https://example.com/poet"
    library.close()


def test_what_cannot_be_served_does_not_stay(
    library: AdapterLibrary, kept: AdapterStore, folder: Path
) -> None:
    with library.fetch(str(folder)) as adapter:
        library.publish("poet", adapter, str(folder))
    before = kept.revisions()
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdapterFormatError), library.fetch(str(folder)):
        pass
    with pytest.raises(ZeroDivisionError), library.fetch(str(kept.path(adapter.spec.revision))):
        raise ZeroDivisionError
    assert kept.revisions().keys() == before.keys()
    library.close()


def test_a_library_that_closes_ends_what_is_being_fetched(
    library: AdapterLibrary, kept: AdapterStore, folder: Path
) -> None:
    with (
        pytest.raises(SourceUnavailableError, match="the server is stopping"),
        library.fetch(str(folder), lambda *_: library.interrupt()),
    ):
        pass
    with pytest.raises(SourceUnavailableError, match="the server is stopping"), library.fetch(str(folder)):
        pass
    assert list((kept.root / "staging").iterdir()) == []
    assert list((kept.root / "adapters").iterdir()) == []
    library.close()


@pytest.mark.parametrize(
    ("most", "error", "said"),
    [
        ({"timeout": 0.0}, SourceUnavailableError, "within 0 s"),
        ({"max_bytes": 100}, SourceTooLargeError, "at most 100 bytes"),
    ],
)
def test_what_takes_too_long_or_too_much_to_read_is_cut_off(
    library: AdapterLibrary, kept: AdapterStore, folder: Path, most: dict[str, Any], error: type, said: str
) -> None:
    data = (folder / "adapter_model.safetensors").read_bytes()
    config = (folder / "adapter_config.json").read_bytes()
    library._policy = Policy(**most)
    with kept.receive(digest_of_folder(folder), config, len(data)) as upload:
        upload.write(0, data)
        with pytest.raises(error, match=said), library.finish(upload):
            pass
    assert kept.revisions() == {}
    library.close()


def test_a_library_closes_once_what_is_fetched_has_ended(library: AdapterLibrary, folder: Path) -> None:
    with ThreadPoolExecutor() as pool, library.fetch(str(folder)) as adapter:
        closing = pool.submit(library.close)
        library.publish("poet", adapter, str(folder))
        assert not closing.done()
    assert closing.done()


def test_what_was_published_is_known_without_reading_it(library: AdapterLibrary, folder: Path) -> None:
    with library.fetch(str(folder)) as adapter:
        library.publish("poet", adapter, str(folder))
    revision = adapter.spec.revision
    assert library.recorded() == {revision: adapter.spec}
    library.forget_record(revision)
    assert library.recorded() == {}
    library.save_record(adapter.spec)
    assert library.recorded() == {revision: adapter.spec}
    library._reader = "another"
    assert library.recorded() == {}
    library.close()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_looks_touched_is_not_known(
    library: AdapterLibrary, kept: AdapterStore, folder: Path, name: str
) -> None:
    with library.fetch(str(folder)) as adapter:
        library.publish("poet", adapter, str(folder))
    place = kept.peek(adapter.spec.revision) / name
    place.chmod(0o600)
    assert library.recorded() == {}
    library.save_record(adapter.spec)
    assert library.recorded()
    place.unlink()
    assert library.recorded() == {}
    library.close()


def test_files_of_revisions_that_an_owner_has_no_room_for_go_once_nothing_reads_them(
    library: AdapterLibrary, kept: AdapterStore, folder: Path, sound: dict[str, Any], tmp_path: Path
) -> None:
    other = replace(sound["LORA"], fields=sound["LORA"].fields | {"revision": "other"})
    with library.fetch(str(folder)) as first:
        library.publish("poet", first, str(folder))
        library.keep(first.spec.revision)
    most = Ownership(owner="acme", max_bytes=first.spec.file_bytes * 3 // 2)
    with library.fetch(str(folder)) as first:
        library.publish("poet", first, str(folder), most)
    with library.fetch(str(other.write(tmp_path / "other"))) as second:
        library.publish("poet", second, "", most)
    assert library.names.histories(["poet"])["poet"][0].revision == second.spec.revision
    assert kept.revisions().keys() == {first.spec.revision, second.spec.revision}
    library.let_go(first.spec.revision)
    assert kept.revisions().keys() == {second.spec.revision}
    library.close()
