"""What is fetched is kept only if it is served."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.guarded import guard
from support.tokenizers import make_tokenizer
from turret_adapters.errors import (
    AdapterFormatError,
    OwnerLimitError,
    RevisionCorruptError,
    RevisionNotFoundError,
    SourceTooLargeError,
    SourceUnavailableError,
    StoreBusyError,
    StoreFailedError,
)
from turret_adapters.formats.files import digest_of_folder
from turret_adapters.formats.tokenizer import BaseTokenizer
from turret_adapters.host import BaseWeights
from turret_adapters.library import AdapterLibrary
from turret_adapters.sources.fetch import Download
from turret_adapters.sources.policy import Policy
from turret_adapters.spec import AdapterSpec, BaseSpec, HeadTask
from turret_adapters.store.names import Names, Ownership
from turret_adapters.store.store import AdapterStore
from turret_adapters.store.uploads import Upload


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[AdapterStore]:
    with closing(AdapterStore(tmp_path / "kept")) as store:
        yield store


@pytest.fixture
def library(kept: AdapterStore, base: BaseSpec, weights: BaseWeights, tmp_path: Path) -> AdapterLibrary:
    names = Names(kept.root / "names.sqlite", "llama")
    return AdapterLibrary(
        store=kept,
        names=names,
        policy=Policy(roots=(tmp_path,)),
        base=base,
        weights=weights,
        tokenizer=BaseTokenizer(make_tokenizer(), None),
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
        closed = pool.submit(library.close)
        library.publish("poet", adapter, str(folder))
        assert not closed.done()
    assert closed.done()


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


def publish(library: AdapterLibrary, name: str, folder: Path) -> str:
    with library.fetch(str(folder)) as adapter:
        library.publish(name, adapter, str(folder))
    return adapter.spec.revision


def fail(*_: object) -> None:
    raise StoreFailedError("no disk")


@pytest.fixture
def other_folder(sound: dict[str, Any], tmp_path: Path) -> Path:
    other = replace(sound["LORA"], fields=sound["LORA"].fields | {"revision": "other"})
    return other.write(tmp_path / "other")


def test_letting_go_is_harmless_as_often_as_it_is_done(library: AdapterLibrary, folder: Path) -> None:
    revision = publish(library, "poet", folder)
    assert library.keep(revision)
    assert not library.keep(revision), "it is kept already"
    with pytest.raises(StoreBusyError):
        library.store.remove(revision)
    for _ in range(3):
        library.let_go(revision)
    library.store.remove(revision)
    library.close()


def test_letting_go_whose_deletion_fails_releases_and_can_be_tried_again(
    library: AdapterLibrary, folder: Path, other_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with library.fetch(str(folder)) as adapter:
        library.publish("poet", adapter, "")
        first = adapter.spec.revision
        library.keep(first)
    limits = Ownership(max_bytes=adapter.spec.file_bytes * 3 // 2)
    with library.fetch(str(other_folder)) as adapter:
        library.publish("poet", adapter, "", limits)
    for failing in (library.names, "needed"), (library.store, "remove"):
        with monkeypatch.context() as patch:
            patch.setattr(*failing, fail)
            with pytest.raises(StoreFailedError):
                library.let_go(first)
    assert first in library.store.revisions()
    assert first not in library.store._held
    library.let_go(first)
    assert library.store.revisions().keys() == {adapter.spec.revision}
    library.close()


@pytest.mark.parametrize("failing", ["needed", "collect"])
def test_what_was_published_is_published_even_if_the_clean_up_fails(
    failing: str,
    library: AdapterLibrary,
    folder: Path,
    other_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    library.store.max_bytes = 1 << 30
    first = publish(library, "poet", folder)
    with monkeypatch.context() as patch:
        patch.setattr(library.names if failing == "needed" else library.store, failing, fail)
        with library.fetch(str(other_folder)) as second:
            limits = Ownership(max_bytes=second.spec.file_bytes * 3 // 2)
            library.publish("poet", second, "", limits)
        assert library.names.current()["poet"].revision == second.spec.revision
        assert "no disk" in caplog.text
    publish(library, "pirate", other_folder)
    assert library.store.revisions().keys() == {second.spec.revision}, f"{first} goes with the next clean-up"
    library.close()


def test_a_failed_fetch_whose_clean_up_fails_says_why_the_fetch_failed(
    library: AdapterLibrary, kept: AdapterStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with monkeypatch.context() as patch:
        patch.setattr(kept, "remove", fail)
        with pytest.raises(AdapterFormatError), library.fetch(str(folder)):
            pass
    assert len(kept.revisions()) == 1
    with pytest.raises(AdapterFormatError), library.fetch(str(folder)):
        pass
    assert kept.revisions() == {}
    library.close()


def test_a_revision_that_another_load_has_in_use_is_not_deleted_by_one_that_fails(
    library: AdapterLibrary, folder: Path
) -> None:
    with library.fetch(str(folder)) as adapter:
        with pytest.raises(ZeroDivisionError), library.fetch(str(folder)):
            raise ZeroDivisionError
        library.publish("poet", adapter, "")
    revision = adapter.spec.revision
    library.read(revision)
    library.names.remove("poet")
    library.keep(revision)
    library.let_go(revision)
    assert revision in library.store.revisions(), "without a budget, what was published stays"
    library.close()


def test_rolling_back_keeps_the_revision_before_it_commits(
    library: AdapterLibrary, folder: Path, other_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = publish(library, "poet", folder), publish(library, "poet", other_folder)
    target = library.names.rollback_target("poet")
    with monkeypatch.context() as patch:
        patch.setattr(library.store, "hold", fail)
        with pytest.raises(StoreFailedError):
            library.rollback(target)
    assert [entry.revision for entry in library.names.history("poet")] == [second, first]
    with monkeypatch.context() as patch:
        patch.setattr(library.names, "rollback", fail)
        with pytest.raises(StoreFailedError):
            library.rollback(target)
    assert first not in library.store._held, "an error changes nothing"
    library.rollback(target)
    assert [entry.revision for entry in library.names.history("poet")] == [first]
    with pytest.raises(StoreBusyError):
        library.store.remove(first)
    library.close()


def test_a_rollback_that_fails_leaves_what_was_kept_before(
    library: AdapterLibrary, folder: Path, other_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish(library, "poet", folder)
    publish(library, "poet", other_folder)
    library.keep(first)
    monkeypatch.setattr(library.names, "rollback", fail)
    with pytest.raises(StoreFailedError):
        library.rollback(library.names.rollback_target("poet"))
    with pytest.raises(StoreBusyError):
        library.store.remove(first)
    library.close()


def test_what_exceeds_the_budget_is_refused_before_it_is_copied(
    library: AdapterLibrary, kept: AdapterStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.max_bytes = 100
    monkeypatch.setattr(kept, "adopt", fail)
    with pytest.raises(SourceTooLargeError), library.fetch(str(folder)):
        pass
    library.close()


def test_fetches_leave_nothing_behind_in_the_librarys_books(library: AdapterLibrary, folder: Path) -> None:
    for _ in range(2):
        publish(library, "poet", folder)
        with pytest.raises(ZeroDivisionError), library.fetch(str(folder)):
            raise ZeroDivisionError
        assert not library._unneeded
        assert not library.store._held
        assert library.downloads.running == []
        assert library._fetching == 0
    library.close()


def test_an_owner_pays_for_the_larger_of_an_adapters_file_and_its_tensors(
    library: AdapterLibrary, folder: Path
) -> None:
    limits = Ownership(owner="acme", max_bytes=1 << 20)
    with library.fetch(str(folder)) as adapter:
        library.publish("poet", adapter, "", limits)
        large = replace(adapter, prefix_kv=torch.zeros(1 << 19))
        with pytest.raises(OwnerLimitError, match="max_adapter_bytes"):
            library.publish("pirate", large, "", limits)
        exact = replace(limits, max_bytes=adapter.spec.file_bytes)
        library.publish("poet", adapter, "", exact)
        with pytest.raises(OwnerLimitError, match="max_adapter_bytes"):
            library.publish("poet", adapter, "", replace(exact, max_bytes=adapter.spec.file_bytes - 1))
    library.close()


def test_reading_from_the_store_ends_when_the_server_stops(library: AdapterLibrary, folder: Path) -> None:
    revision = publish(library, "poet", folder)
    library.interrupt()
    with pytest.raises(SourceUnavailableError, match="is stopping"):
        library.read(revision)
    library.close()


def test_a_closed_library_leaves_its_names_to_the_next_server(
    library: AdapterLibrary, kept: AdapterStore, folder: Path
) -> None:
    revision = publish(library, "poet", folder)
    library.close()
    names = Names(kept.root / "names.sqlite", "llama")
    assert names.current()["poet"].revision == revision
    with pytest.raises(sqlite3.ProgrammingError):
        library.names.current()
    names.close()


def test_a_record_under_the_revision_of_another_is_not_believed(
    library: AdapterLibrary, folder: Path, other_folder: Path
) -> None:
    first, second = publish(library, "poet", folder), publish(library, "other", other_folder)
    records = library.names.records()
    mixed = replace(records[first], marks=records[second].marks)
    library.names.save_record(second, mixed)
    assert library.recorded().keys() == {first}
    library.close()


def test_a_library_that_stops_looks_at_no_source(library: AdapterLibrary, tmp_path: Path) -> None:
    library.interrupt()
    with (
        pytest.raises(SourceUnavailableError, match="is stopping"),
        library.fetch(str(tmp_path / "absent")),
    ):
        pass
    library.close()


@pytest.fixture
def classifier(sound: dict[str, Any], tmp_path: Path) -> Path:
    files = sound["LORA"]
    files.fields["task_type"] = "SEQ_CLS"
    files.tensors["base_model.model.score.weight"] = torch.ones(2, 32)
    return files.write(tmp_path / "classifier")


@pytest.fixture
def classifying(library: AdapterLibrary, base: BaseSpec) -> AdapterLibrary:
    library._base = replace(base, heads={HeadTask.SEQ_CLS: {"score.weight": (0, 32)}})
    return library


def fetched(library: AdapterLibrary, folder: Path) -> AdapterSpec:
    with library.fetch(str(folder)) as adapter:
        library.publish(folder.name, adapter, str(folder))
    return adapter.spec


def test_the_labels_of_a_head_are_kept_and_make_a_revision_of_their_own(
    classifying: AdapterLibrary, kept: AdapterStore, classifier: Path
) -> None:
    without = fetched(classifying, classifier)
    assert without.head
    assert without.head.labels == ("LABEL_0", "LABEL_1")
    config = {"id2label": {"0": "no", "1": "yes"}, "architectures": ["BertForSequenceClassification"]}
    (classifier / "config.json").write_text(json.dumps(config))
    found = fetched(classifying, classifier)
    assert found.revision != without.revision
    assert {path.name for path in kept.path(found.revision).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "turret_labels.json",
    }
    for head in (found.head, classifying.read(found.revision).spec.head):
        assert head
        assert head.labels == ("no", "yes")
    [recorded] = [spec for spec in classifying.recorded().values() if spec.revision == found.revision]
    assert recorded == found
    (classifier / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    assert fetched(classifying, classifier).revision == found.revision
    classifying.close()


def test_labels_of_another_head_leave_nothing_behind(
    classifying: AdapterLibrary, kept: AdapterStore, classifier: Path
) -> None:
    (classifier / "config.json").write_text(json.dumps({"id2label": {"0": "no"}}))
    with (
        pytest.raises(AdapterFormatError, match=r"to have 2 labels.*found 1"),
        classifying.fetch(str(classifier)),
    ):
        pass
    assert kept.revisions() == {}
    classifying.close()


def test_without_a_head_a_configuration_changes_no_revision_and_is_not_kept(
    library: AdapterLibrary, kept: AdapterStore, folder: Path
) -> None:
    before = fetched(library, folder).revision
    (folder / "config.json").write_text("no JSON")
    assert fetched(library, folder).revision == before
    assert {path.name for path in kept.path(before).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    library.close()


def test_after_an_interrupt_no_tokenizer_is_read(library: AdapterLibrary, folder: Path) -> None:
    make_tokenizer().save_pretrained(folder)
    library.interrupt()
    with pytest.raises(SourceUnavailableError):
        library._keep_changes(folder)
    assert (folder / "tokenizer.json").exists()


def test_a_fetch_ends_at_the_next_bytes_after_an_interrupt(library: AdapterLibrary, folder: Path) -> None:
    reports: list[int] = []

    def interrupt(done: int, _total: int | None) -> None:
        reports.append(done)
        library.interrupt()

    with pytest.raises(SourceUnavailableError), library.fetch(str(folder), interrupt):
        pass
    assert len(reports) == 1
    library.close()


def test_a_budget_does_not_raise_the_policys_limit(
    library: AdapterLibrary, kept: AdapterStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.max_bytes = 1 << 30
    library._policy = replace(library._policy, max_bytes=100)
    monkeypatch.setattr(kept, "adopt", fail)
    with pytest.raises(SourceTooLargeError, match="at most"), library.fetch(str(folder)):
        pass
    library.close()


def test_records_of_revisions_without_a_name_go_at_the_next_start(
    library: AdapterLibrary, folder: Path, other_folder: Path
) -> None:
    first = publish(library, "poet", folder)
    publish(library, "other", other_folder)
    library.names.remove("other")
    assert library.recorded().keys() == {first}
    assert library.names.records().keys() == {first}
    library.close()


def test_stored_bytes_of_another_digest_are_not_served(library: AdapterLibrary, folder: Path) -> None:
    revision = publish(library, "poet", folder)
    config = library.store.peek(revision) / "adapter_config.json"
    config.chmod(0o600)
    config.write_bytes(config.read_bytes() + b"\n")
    with pytest.raises(RevisionCorruptError, match="loading it from its source repairs it"):
        library.read(revision)
    assert publish(library, "poet", folder) == revision
    library.read(revision)
    library.close()


def test_the_marks_of_a_folder_are_kept_with_its_name(library: AdapterLibrary, folder: Path) -> None:
    with library.fetch(str(folder)) as adapter:
        library.publish("poet", adapter, str(folder), source_marks="marks")
    assert library.names.current()["poet"].source_marks == "marks"
    library.close()


def test_what_the_block_does_not_publish_does_not_stay(
    library: AdapterLibrary, kept: AdapterStore, folder: Path
) -> None:
    with library.fetch(str(folder)):
        pass
    assert not kept.revisions()
    library.close()


def test_nothing_is_remembered_of_revisions_that_were_deleted(
    library: AdapterLibrary, kept: AdapterStore, folder: Path, other_folder: Path
) -> None:
    with library.fetch(str(folder)) as first:
        pass
    assert (kept.revisions(), library._unneeded) == ({}, set())
    publish(library, "poet", folder)
    library.keep(first.spec.revision)
    limits = Ownership(max_bytes=first.spec.file_bytes * 3 // 2)
    with library.fetch(str(folder)) as first:
        library.publish("poet", first, "", limits)
    with library.fetch(str(other_folder)) as second:
        library.publish("poet", second, "", limits)
    assert library._unneeded == {first.spec.revision}, "it is kept"
    library.let_go(first.spec.revision)
    assert kept.revisions().keys() == {second.spec.revision}
    assert (library._unneeded, library._kept) == (set(), set())
    library.close()


def test_what_disappeared_from_the_store_needs_no_deletion(
    library: AdapterLibrary, kept: AdapterStore, folder: Path
) -> None:
    with library.fetch(str(folder)) as adapter:
        kept.peek(adapter.spec.revision).rename(folder.parent / "gone")
    assert not library._unneeded
    library.close()


def test_the_librarys_books_are_read_and_written_under_its_lock(
    library: AdapterLibrary, folder: Path, other_folder: Path
) -> None:
    guard(library, library._lock.locked, "_kept", "_unneeded")
    guard(library.downloads, library.downloads._lock.locked, "_running")
    revision = publish(library, "poet", folder)
    assert library.keep(revision)
    assert not library.keep(revision)
    with library.fetch(str(other_folder)) as other:
        assert library.downloads.running == []
        library.publish("poet", other, "", Ownership(max_bytes=2 * other.spec.file_bytes))
    library.rollback(library.names.rollback_target("poet"))
    library.let_go(revision)
    library.close()


@pytest.mark.parametrize(("arguments", "name"), [({"name": "poet"}, "poet"), ({}, "")])
def test_a_fetch_is_listed_under_its_name_and_one_without_a_name_under_none(
    arguments: dict[str, str], name: str, library: AdapterLibrary, folder: Path
) -> None:
    seen: list[Download] = []
    with library.fetch(str(folder), lambda *_: seen.extend(library.downloads.running), **arguments):
        assert library.downloads.running == []
    assert {each.name for each in seen} == {name}
    assert seen[-1].num_done == seen[-1].num_total == library.downloads.num_bytes
    library.close()


def upload_of(kept: AdapterStore, folder: Path) -> Upload:
    data = (folder / "adapter_model.safetensors").read_bytes()
    config = (folder / "adapter_config.json").read_bytes()
    upload = kept.receive(digest_of_folder(folder), config, len(data))
    upload.write(upload.offset, data[upload.offset :])
    return upload


def test_what_is_uploaded_is_read_and_stays_if_it_is_named(
    library: AdapterLibrary, kept: AdapterStore, folder: Path, other_folder: Path
) -> None:
    with upload_of(kept, folder) as upload, library.finish(upload) as adapter:
        library.publish("poet", adapter, "")
    published = library.names.current()["poet"]
    assert (published.revision, published.owner, published.source_marks) == (adapter.spec.revision, "", "")
    with upload_of(kept, other_folder) as upload, library.finish(upload):
        pass
    assert kept.revisions().keys() == {adapter.spec.revision}
    assert not kept._held
    library.close()


def test_an_upload_that_ends_while_the_server_stops_goes_on_after_its_restart(
    library: AdapterLibrary, kept: AdapterStore, folder: Path
) -> None:
    with upload_of(kept, folder) as upload:
        library.interrupt()
        with pytest.raises(SourceUnavailableError, match="is stopping"), library.finish(upload):
            pass
    assert kept.revisions() == {}
    with upload_of(kept, folder) as upload:
        assert upload.offset == upload.size, "all of it is still there"
    library.close()


def test_a_library_closes_once_an_upload_has_been_read(
    library: AdapterLibrary, kept: AdapterStore, folder: Path
) -> None:
    with ThreadPoolExecutor() as pool, upload_of(kept, folder) as upload:
        with library.finish(upload) as adapter:
            closed = pool.submit(library.close)
            library.publish("poet", adapter, "")
            assert not closed.done()
        closed.result()


def test_a_revision_exactly_as_large_as_allowed_is_fetched_and_read(
    library: AdapterLibrary, kept: AdapterStore, folder: Path
) -> None:
    config, tensors = (
        (folder / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    kept.max_bytes = config + tensors
    library._policy = replace(library._policy, max_bytes=config + tensors)
    revision = publish(library, "poet", folder)
    assert library.read(revision).spec.revision == revision
    library._policy = replace(library._policy, max_bytes=tensors)
    assert library.read(revision).spec.revision == revision, "only the tensors take memory"
    library._policy = replace(library._policy, max_bytes=tensors - 1)
    with pytest.raises(SourceTooLargeError, match=f"at most {tensors - 1} bytes"):
        library.read(revision)
    library.close()


def test_a_load_that_exceeds_the_budget_evicts_what_cannot_be_rolled_back_to_at_once(
    library: AdapterLibrary, kept: AdapterStore, sound: dict[str, Any], tmp_path: Path
) -> None:
    """Of a name's history the current revision and the one before stay."""
    folders = [
        replace(sound["LORA"], fields=sound["LORA"].fields | {"revision": str(number)}).write(
            tmp_path / str(number)
        )
        for number in range(4)
    ]
    kept.max_bytes = 2 * sum(file.stat().st_size for file in folders[0].iterdir())
    found = [publish(library, "poet", folder) for folder in folders]
    assert kept.revisions().keys() == set(found[2:])
    library.close()


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_stored_file_that_is_missing_is_damage_and_not_a_missing_source(
    missing: str, library: AdapterLibrary, folder: Path
) -> None:
    revision = publish(library, "poet", folder)
    (library.store.peek(revision) / missing).unlink()
    with pytest.raises(RevisionCorruptError, match=f"revision {revision} .* repairs it"):
        library.read(revision)
    with pytest.raises(RevisionNotFoundError):
        library.read("0" * len(revision))
    library.close()


def test_records_that_cannot_be_written_only_cost_time(
    library: AdapterLibrary, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with library.fetch(str(folder)) as adapter:
        library.publish("poet", adapter, "")
    for name in ("save_record", "tidy_records", "forget_record"):
        monkeypatch.setattr(library.names, name, fail)
    library.save_record(adapter.spec)
    library.forget_record(adapter.spec.revision)
    assert library.recorded().keys() == {adapter.spec.revision}
    library.close()
