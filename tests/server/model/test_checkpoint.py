"""What --model can name, and what is said of each that is not a checkpoint."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.web import web_server
from turret_server.errors import ConfigError
from turret_server.kernels import ReferenceOps
from turret_server.model import checkpoint
from turret_server.model.checkpoint import check_path, reading
from turret_server.model.describe import describe_model
from turret_server.model.load import load_model

HUB_ID = "owner/model"
LAYER = "model.layers.1.mlp.up_proj.weight"


def load(model: Path | str, cache: Path):
    return load_model(
        str(model), device=torch.device("cpu"), dtype=torch.float32, cache=cache, ops=ReferenceOps()
    )


@pytest.fixture
def model(base_of, tmp_path) -> Path:
    """The test's own copy."""
    return shutil.copytree(base_of("llama"), tmp_path / "model")


def change_config(model: Path, **values: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(model: Path | str, tmp_path: Path) -> str:
    """What is said; by every command alike, in one line, and before anything is written."""
    with pytest.raises(ConfigError) as error:
        load(model, tmp_path / "cache")
    said = str(error.value)
    assert said.startswith(f"--model {model}: ")
    assert len(said.splitlines()) == 1
    assert not [*(tmp_path / "cache").glob("nf4/*")]
    return said.removeprefix(f"--model {model}: ")


def test_a_checkpoint_and_what_may_be_a_name_on_the_hub_pass(model):
    for each in (str(model), "owner/model", "model"):
        check_path(each)


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "../nowhere", "~/nowhere"])
def test_what_can_only_be_a_path_is_there(path):
    with pytest.raises(ConfigError, match="no such folder; check the path"):
        check_path(path)


def test_a_path_that_the_system_refuses_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="found: File name too long"):
        check_path("x" * 300)

    def refuse(_path: Path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ConfigError, match="found: Permission denied"):
        check_path(str(tmp_path))


@pytest.mark.parametrize("has_weights", [True, False])
def test_an_adapter_names_its_base_model(has_weights, model, adapter_of, tmp_path):
    """Also beside weights, where transformers would load both in silence."""
    adapter = model if has_weights else tmp_path / "adapter"
    shutil.copytree(adapter_of("llama", "lora"), adapter, dirs_exist_ok=True)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    expected = f"an adapter of the base model {base}; give its base model, and load the adapter with `turret "
    assert refused(adapter, tmp_path) == f"{expected}adapters load NAME {adapter}`"
    with pytest.raises(ConfigError, match="an adapter of the base model"):
        describe_model(str(adapter))
    (adapter / "adapter_config.json").write_text("[]")
    assert refused(adapter, tmp_path).startswith("an adapter; give its base model")


def test_gguf_is_named(tmp_path):
    file = tmp_path / "gguf" / "model-Q4_0.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    for each in (file, file.parent):
        said = refused(each, tmp_path)
        assert said.startswith(
            "GGUF, which is not served; give the checkpoint of transformers that it was made"
        )


def test_a_file_and_an_empty_folder_are_named(model, tmp_path):
    expected = "expected the folder of a checkpoint of transformers, with config.json; found"
    assert refused(model / "model.safetensors", tmp_path) == f"{expected} a file"
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty", tmp_path) == f"{expected} none"


def test_the_parent_of_checkpoints_says_which_there_are(model, tmp_path):
    for name in ("checkpoint-20", "checkpoint-10"):
        shutil.copytree(model, tmp_path / "run" / name)
    parent = tmp_path / "run"
    assert refused(parent, tmp_path).endswith(
        f"found it below: give {parent}/checkpoint-10 or {parent}/checkpoint-20"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "long_factor"),
        ({"num_attention_heads": "four"}, "expected int, got str"),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads"),
    ],
)
def test_a_configuration_that_transformers_does_not_read_is_refused_in_its_words(
    values, expected, model, tmp_path
):
    change_config(model, **values)
    said = refused(model, tmp_path)
    assert said.startswith("found config.json unreadable: ")
    assert expected in said


def test_a_configuration_that_is_no_json_is_refused(model, tmp_path):
    (model / "config.json").write_text("{")
    assert refused(model, tmp_path).startswith("found config.json unreadable: ")


@pytest.mark.parametrize("own_code", [True, False])
def test_a_type_that_transformers_does_not_know_is_named_and_its_code_not_asked_for(
    own_code, model, tmp_path, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt on the terminal"))
    change_config(
        model, model_type="supernova", **({"auto_map": {"AutoConfig": "own.Config"}} if own_code else {})
    )
    said = refused(model, tmp_path)
    assert said.startswith("config.json has the model_type 'supernova', which transformers 5")
    assert ("its own code (auto_map) is not run" in said) == own_code


def test_a_tokenizer_that_is_missing_or_broken_is_named(model, tmp_path):
    (model / "tokenizer.json").write_text("{}")
    assert refused(model, tmp_path).startswith("found its tokenizer unreadable: KeyError: ")
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert refused(model, tmp_path).startswith("found its tokenizer unreadable: ")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (Path.unlink, "no file named model.safetensors"),
        (cut, "incomplete"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "header too large"),
    ],
    ids=["missing", "cut", "git-lfs"],
)
def test_weights_that_cannot_be_read_are_named(damage, expected, model, tmp_path):
    damage(model / "model.safetensors")
    said = refused(model, tmp_path)
    assert said.startswith("found its weights unreadable: ")
    assert expected in said


@pytest.mark.parametrize("name", [LAYER, "model.layers.1.input_layernorm.weight", "lm_head.weight"])
def test_weights_that_are_missing_are_not_random(name, model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    del tensors[name]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert refused(model, tmp_path) == (
        f"found its weights unreadable: 1 weights that config.json implies are missing, such as {name}"
    )


@pytest.mark.parametrize("name", [LAYER, "model.layers.1.input_layernorm.weight"])
def test_weights_of_another_shape_are_named(name, model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors[name] = tensors[name][:10].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    said = refused(model, tmp_path)
    assert said.startswith("found its weights unreadable: ")
    assert name in said


def test_a_broken_copy_in_the_cache_is_named(model, tmp_path):
    load(model, tmp_path)
    [copy] = (tmp_path / "nf4").iterdir()
    cut(copy / "model.safetensors")
    with pytest.raises(ConfigError, match=f"its quantised copy {copy}, which can be deleted, unreadable: "):
        load(model, tmp_path)


def test_what_the_machine_lacks_and_what_is_refused_already_are_not_unreadable(model):
    for error in (MemoryError(), ConfigError("refused")):
        with pytest.raises(type(error)) as found, reading(str(model), "it"):
            raise error
        assert found.value is error


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of which a test writes the pages; its cache is empty."""
    checkpoint._files_on_hub.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with web_server() as web:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", web.url)
        yield web
    checkpoint._files_on_hub.cache_clear()


def listing(*files: str) -> bytes:
    return json.dumps({"id": HUB_ID, "siblings": [{"rfilename": file} for file in files]}).encode()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (listing("adapter_config.json"), "an adapter; give its base model, and load the adapter with"),
        (listing("model-Q4_0.gguf", "README.md"), "GGUF, which is not served"),
        (
            listing("README.md"),
            "expected the folder of a checkpoint of transformers, with config.json; found none",
        ),
        (
            lambda call: call.answer(404, X_Error_Code="RepoNotFound"),
            "no such folder, and the hub has no such model, or not for everybody; check the name, or set",
        ),
        (
            lambda call: call.answer(403, X_Error_Code="GatedRepo"),
            "access is granted on request; ask for it on the model's page of the hub, and set HF_TOKEN",
        ),
    ],
    ids=["adapter", "gguf", "neither", "none", "gated"],
)
def test_the_hub_is_asked_once_what_a_name_is(answer, expected, hub, tmp_path):
    hub.pages[f"/api/models/{HUB_ID}"] = answer
    assert refused(HUB_ID, tmp_path).startswith(expected)
    assert [page for page in hub.asked if HUB_ID in page] == [f"/api/models/{HUB_ID}"]


def test_what_is_no_name_of_the_hub_is_a_path_that_leads_nowhere(hub, tmp_path):
    assert refused("models/llama/hf", tmp_path) == "no such folder, and not a name on the hub; check the path"
    assert hub.asked == []


@pytest.mark.parametrize("is_down", [True, False])
def test_without_the_hub_a_model_comes_from_the_cache_after_one_attempt(
    is_down, model, hub, tmp_path, monkeypatch, caplog
):
    if is_down:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    else:
        hub.pages[f"/api/models/{HUB_ID}"] = lambda call: call.answer(503)
    expected = (
        "no such folder, the hub does not answer, and its cache has no such model; check the name and the "
        "network, or give a folder"
    )
    assert refused(HUB_ID, tmp_path) == expected
    assert [record.message.partition(" (")[0] for record in caplog.records] == ["the hub does not answer"]
    repo = tmp_path / "hub" / "models--owner--model"
    shutil.copytree(model, repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    loaded = load(HUB_ID, tmp_path / "cache")
    assert loaded.base.name_or_path == HUB_ID
    assert len([page for page in hub.asked if HUB_ID in page]) == (0 if is_down else 1)
    # The quantised copy is of this commit.
    load(HUB_ID, tmp_path / "cache")
    assert len([*(tmp_path / "cache" / "nf4").iterdir()]) == 1
    (repo / "snapshots" / ("0" * 40)).rename(repo / "snapshots" / ("1" * 40))
    (repo / "refs" / "main").write_text("1" * 40)
    load(HUB_ID, tmp_path / "cache")
    assert len([*(tmp_path / "cache" / "nf4").iterdir()]) == 2
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
