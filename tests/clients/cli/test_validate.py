from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoTokenizer

from support.adapters import KINDS
from support.encoders import save_task_adapter
from support.models import FAMILIES
from turret_adapters.errors import AdapterError
from turret_adapters.formats.peft import read_adapter
from turret_adapters.spec import ModuleKind
from turret_cli.main import main
from turret_server.model.arena import Arena
from turret_server.model.describe import CheckpointWeights, describe_model
from turret_server.model.load import LoadedModel, ModelWeights, load_model

CPU = torch.device("cpu")
FOUND = "something there already (INVALID_CONFIG)\n"


@pytest.fixture
def turret() -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def served(base_of: Callable[[str], Path], quantised_cache: Path) -> Callable[[str], LoadedModel]:
    def load(family: str) -> LoadedModel:
        return load_model(str(base_of(family)), device=CPU, dtype=torch.float32, cache=quantised_cache)

    return load


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_described_as_the_server_describes_it(family, base_of, served):
    described = describe_model(str(base_of(family)))
    loaded = served(family).base
    assert described == loaded
    assert list(described.modules) == list(loaded.modules)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gpt-neox"])
def test_weights_come_from_the_checkpoint(family, base_of, served):
    loaded = served(family)
    ours = CheckpointWeights(str(base_of(family)), loaded.base)
    theirs = ModelWeights(loaded.model, loaded.ops)
    for name, shape in loaded.base.modules.items():
        if shape.kind is ModuleKind.NORM:  # nothing is computed with theirs
            continue
        own, other = ours.weight(name), theirs.weight(name)
        assert own.shape == other.shape
        # Nothing but the rounding to 4 bits is between them.
        assert torch.linalg.vector_norm(own - other) <= 0.15 * torch.linalg.vector_norm(other)
        assert (ours.bias(name) is not None) == shape.has_bias
        if shape.has_bias:
            assert torch.equal(ours.bias(name), theirs.bias(name))


def test_a_quantised_checkpoint_serves_too(base_of, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: PLC0415

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(base_of("llama"), quantization_config=config)
    model.save_pretrained(tmp_path)
    described = describe_model(str(tmp_path))
    assert described.modules == describe_model(str(base_of("llama"))).modules
    name = "model.layers.1.mlp.up_proj"
    weight = CheckpointWeights(str(tmp_path), described).weight(name)
    plain = CheckpointWeights(str(base_of("llama")), described).weight(name)
    assert torch.linalg.vector_norm(weight - plain) <= 0.15 * torch.linalg.vector_norm(plain)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_validate_says_what_the_server_will(kind, turret, base_of, adapter_of):
    model, path = base_of("llama"), adapter_of("llama", kind)
    result = turret("adapters", "validate", path, "--model", model, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    base = describe_model(str(model))
    spec = read_adapter(path, base, CheckpointWeights(str(model), base)).spec
    arena = Arena(base, 0, dtype=torch.float32, device=CPU)
    num_pages = spec.num_pages(arena.page_elements, arena.block_size)
    assert found["arena_pages"] == num_pages * max(spec.num_tasks, 1)
    assert found["arena_bytes"] == found["arena_pages"] * found["page_bytes"]
    assert found["page_bytes"] == arena.page_elements * getattr(torch, found["page_dtype"]).itemsize
    assert (found["method"], found["max_rank"]) == (spec.method.value, spec.max_rank)
    assert (found["num_virtual_tokens"], found["num_tasks"]) == (spec.num_virtual_tokens, spec.num_tasks)
    assert (found["num_parameters"], found["file_bytes"]) == (spec.num_parameters, spec.file_bytes)
    assert found["invocation_tokens"] == list(spec.invocation_tokens)
    assert sum(found["modules"].values()) == len({group.module for group in spec.rows})


def test_a_validation_prints_the_range_of_ranks(turret, base_of, adapter_of):
    result = turret("adapters", "validate", adapter_of("llama", "rslora"), "--model", base_of("llama"))
    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["method"] == "lora"
    assert lines["modules"] == "15 linear"
    assert lines["rank"] == "2 to 8"
    assert lines["file"].endswith(" in float32")


def test_what_the_dtype_of_a_file_is(turret, base_of, adapter_of):
    arguments = ["--model", base_of("llama"), "--json"]
    result = turret("adapters", "validate", adapter_of("llama", "lora-bf16"), *arguments)
    assert json.loads(result.stdout)["dtypes"] == ["bfloat16"]


def _nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def _broken_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def _other_rank(folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 6}))


def _cut(folder: Path) -> None:
    tensors = folder / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])


@pytest.mark.parametrize("spoil", [_nothing, _broken_config, _other_rank, _cut])
def test_a_refusal_is_the_servers_in_one_line(spoil, turret, base_of, adapter_of, served, tmp_path):
    folder = tmp_path / "spoilt"
    shutil.copytree(adapter_of("llama", "lora"), folder)
    spoil(folder)
    loaded = served("llama")
    with pytest.raises(AdapterError) as refused:
        read_adapter(folder, loaded.base, ModelWeights(loaded.model, loaded.ops))
    result = turret("adapters", "validate", folder, "--model", base_of("llama"))
    expected = f"error: {refused.value} ({refused.value.reason})\n"
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", expected)


def test_an_adapter_of_another_base_is_refused(turret, base_of, adapter_of):
    result = turret("adapters", "validate", adapter_of("qwen3", "lora"), "--model", base_of("llama"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: tensor ")
    assert result.stderr.endswith(" (ADAPTER_BASE_MISMATCH)\n")


def test_saved_copies_are_held_against_the_models_weights(turret, base_of, adapter_of):
    path = adapter_of("llama", "lora-embedding-head")
    for model, replaced in (("llama", 0), ("llama-tied", 2)):
        result = turret("adapters", "validate", path, "--model", base_of(model), "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["parts"].get("weight", 0) == replaced


def test_a_vocabulary_and_a_tokenizer_of_its_own_are_told(turret, base_of, adapter_of, tmp_path):
    folder = shutil.copytree(adapter_of("llama", "vocabulary-added"), tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(base_of("llama"))
    tokenizer.save_pretrained(folder)
    told = turret("adapters", "validate", folder, "--model", base_of("llama")).stdout
    assert re.search(r"vocabulary +323 tokens\ntokenizer +the base model's\n", told)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    told = turret("adapters", "validate", folder, "--model", base_of("llama")).stdout
    assert re.search(r"tokenizer +its own\n", told)
    tokenizer.add_tokens([f"<more{index}>" for index in range(324 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    refused = turret("adapters", "validate", folder, "--model", base_of("llama"))
    assert (refused.exit_code, "below 323, the rows of the embedding" in refused.stderr) == (1, True)


def test_a_head_and_its_labels_are_told(turret, base_of, adapter_of, tmp_path):
    folder = save_task_adapter("lora", "SEQ_CLS", "llama", base_of("llama"), tmp_path / "classifier")
    told = turret("adapters", "validate", folder, "--model", base_of("llama")).stdout
    head = r"head +SEQ_CLS, single_label_classification\nlabels +"
    assert re.search(rf"{head}LABEL_0, LABEL_1, LABEL_2\n", told)
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate("abc"))}))
    told = turret("adapters", "validate", folder, "--model", base_of("llama")).stdout
    assert re.search(rf"{head}a, b, c\n", told)
    told = turret("adapters", "validate", adapter_of("llama", "lora"), "--model", base_of("llama")).stdout
    assert re.search(r"head +-\nlabels +-\n", told)


def test_a_model_that_is_not_there_or_not_served_is_refused(turret, adapter_of, tmp_path):
    path = adapter_of("llama", "lora")
    result = turret("adapters", "validate", path, "--model", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.endswith(" (INVALID_CONFIG)\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    result = turret("adapters", "validate", path, "--model", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.endswith(" (UNSUPPORTED_MODEL)\n")
    assert result.stderr.count("\n") == 1


def test_no_weight_is_read_where_none_is_needed(turret, base_of, adapter_of, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_of("llama") / name, tmp_path)
    for kind in ("lora", "prefix", "ia3", "trainable-tokens", "modules-to-save"):
        result = turret("adapters", "validate", adapter_of("llama", kind), "--model", tmp_path)
        assert result.exit_code == 0, result.stderr


def test_what_is_not_installed_is_named(tmp_path):
    script = "import sys; sys.modules['torch'] = None; from turret_cli.main import main; main()"
    run: Any = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script, "adapters", "validate", ".", "--model", "m"],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        text=True,
    )
    expected = (
        "error: torch is not installed; in Turret's source folder, install it with: "
        'pip install ".[server]"\n'
    )
    assert (run.returncode, run.stdout, run.stderr) == (1, "", expected)
