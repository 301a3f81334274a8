"""The labels of an adapter's head go with it into the store, however it comes; without a head, none do."""

from __future__ import annotations

import json
import shutil

import pytest

from support.encoders import save_task_adapter
from support.serving import serving
from turret_client import Client, Problem
from turret_client.errors import FailedPreconditionError, InvalidArgumentError
from turret_server.config import ServerConfig

LABELS = ("bad", "so so", "good")


@pytest.fixture(scope="module")
def folder(base_of, tmp_path_factory):
    folder = save_task_adapter(
        "lora", "SEQ_CLS", "llama", base_of("llama"), tmp_path_factory.mktemp("classifier")
    )
    config = {"id2label": dict(enumerate(LABELS)), "problem_type": "multi_label_classification"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def config(base_of, quantised_cache, tmp_path):
    model = str(base_of("llama"))
    return ServerConfig(model=model, memory="8MiB", cache=quantised_cache, store=tmp_path / "store")


def check(client, name):
    found = client.classify(["the quick brown fox"], adapter=name)
    assert found.problem is Problem.MULTI_LABEL
    assert tuple(found.results[0].scores) == LABELS


def test_they_come_with_a_load_and_an_upload_and_stay_over_a_restart(config, folder):
    with serving(config) as served, Client(served.address) as client:
        loaded = client.load_adapter("loaded", str(folder))
        assert client.upload_adapter("sent", folder).revision == loaded.revision
        check(client, "loaded")
        check(client, "sent")
    with serving(config) as served, Client(served.address) as client:
        check(client, "loaded")
    [revision] = (config.store / "adapters").iterdir()
    assert {path.name for path in revision.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "turret_labels.json",
    }


def test_an_adapter_without_a_head_is_the_same_with_a_configuration_beside_it(config, adapter_of, tmp_path):
    folder = shutil.copytree(adapter_of("llama", "lora"), tmp_path / "lora")
    with serving(config) as served, Client(served.address) as client:
        before = client.load_adapter("before", str(folder)).revision
        (folder / "config.json").write_text("no JSON")
        assert client.load_adapter("loaded", str(folder)).revision == before
        assert client.upload_adapter("sent", folder).revision == before


def test_labels_of_another_head_are_refused_and_leave_nothing_behind(config, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "config.json").write_text(json.dumps({"id2label": {"0": "alone"}}))
    with serving(config) as served, Client(served.address) as client:
        for load in (
            lambda: client.load_adapter("broken", str(broken)),
            lambda: client.upload_adapter("broken", broken),
        ):
            with pytest.raises((FailedPreconditionError, InvalidArgumentError), match=r"3 labels.*found 1"):
                load()
        for kept in ("adapters", "staging", "uploads"):
            assert list((config.store / kept).iterdir()) == []
