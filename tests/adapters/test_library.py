"""What is fetched is kept only if it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from turret_adapters.errors import AdapterFormatError
from turret_adapters.host import BaseWeights
from turret_adapters.library import AdapterLibrary
from turret_adapters.names import Names
from turret_adapters.policy import Policy
from turret_adapters.spec import BaseSpec
from turret_adapters.store import AdapterStore
from turret_adapters.store_errors import SourceUnavailableError


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
        library.publish("poet", adapter.spec.revision, "https://user:secret@example.com/poet?token=secret")
    assert list(kept.revisions()) == [adapter.spec.revision]
    assert library.names()["poet"].source == "https://example.com/poet"
    library.close()


def test_what_cannot_be_served_does_not_stay(
    library: AdapterLibrary, kept: AdapterStore, folder: Path
) -> None:
    with library.fetch(str(folder)) as adapter:
        library.publish("poet", adapter.spec.revision, str(folder))
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
        pytest.raises(SourceUnavailableError, match="the server stops"),
        library.fetch(str(folder), lambda *_: library.close()),
    ):
        pass
    assert list((kept.root / "staging").iterdir()) == []
    assert list((kept.root / "adapters").iterdir()) == []
