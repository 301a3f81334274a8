"""The configs that peft has written since autumn 2024, kept in `formats/` by `formats/make.py`.

Their tensors have had today's names and shapes ever since, but where `tensors.json` says otherwise, so each
config is read here with the tensors that today's peft saves, and says the same as today's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from turret_adapters.errors import AdapterBaseError, AdapterFormatError
from turret_adapters.formats.files import CONFIG_NAME, TENSORS_NAME
from turret_adapters.formats.kinds import KINDS
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import HostAdapter
from turret_server.model.describe import CheckpointWeights, describe_model

FORMATS = Path(__file__).parent / "saved"
OTHER_TENSORS = "tensors"
# Which of the methods' fields came when: before, a version has no such adapter.
LATER = {"lora-bias": "0.14.0", "trainable-tokens": "0.15.2", "alora": "0.18.1"}
LATER["trainable-tokens-alone"] = "0.15.2"
WIDE = "p-tuning-v2-qwen3"
"""Its heads are wider than its hidden size says."""

VERSIONS = sorted(folder.name for folder in FORMATS.glob("peft-*"))
KINDS_MADE = sorted({path.stem for path in FORMATS.glob("peft-*/*.json")} - {OTHER_TENSORS, WIDE})


@pytest.fixture(scope="module")
def read(base_of: Callable[[str], Path]) -> Callable[..., HostAdapter]:
    described = functools.cache(describe_model)

    def read(folder: Path, family: str = "llama") -> HostAdapter:
        model = str(base_of(family))
        return read_adapter(folder, described(model), CheckpointWeights(model, described(model)))

    return read


def contents(adapter: HostAdapter) -> list[object]:
    """All of it but its revision and size, which are those of the file."""
    spec = dataclasses.replace(adapter.spec, revision="", file_bytes=0)
    deltas = [(name, delta.scaling, delta.token_ids) for name, delta in adapter.deltas.items()]
    return [spec, deltas, *(contents(task) for task in adapter.tasks)]


def tensors(adapter: HostAdapter) -> list[torch.Tensor]:
    own = [adapter.prefix_kv, adapter.prompt_embeddings]
    rows = [row for delta in adapter.deltas.values() for row in delta.rows.values()]
    tasks = [tensor for task in adapter.tasks for tensor in tensors(task)]
    return [tensor for tensor in own if tensor is not None] + rows + tasks


@pytest.mark.parametrize("kind", KINDS_MADE)
def test_a_config_of_any_version_reads_as_todays(kind, adapter_of, read, tmp_path):
    today = adapter_of("llama", kind)
    expected = read(today)
    assert tensors(expected)
    shutil.copy(today / TENSORS_NAME, tmp_path)
    for config in sorted(FORMATS.glob(f"peft-*/{kind}.json")):
        shutil.copy(config, tmp_path / CONFIG_NAME)
        found = read(tmp_path)
        assert contents(found) == contents(expected), config
        assert all(map(torch.equal, tensors(found), tensors(expected))), config


def test_only_the_prefix_of_a_model_with_wide_heads_had_other_tensors():
    others = {path.parent.name: json.loads(path.read_text()) for path in FORMATS.glob("*/tensors.json")}
    # Half as wide as the keys and values of 3 layers, 2 heads and 32 elements.
    assert others == {
        f"peft-{version}": {WIDE: {"prompt_embeddings": [20, 192]}}
        for version in ("0.13.2", "0.14.0", "0.15.2", "0.16.0", "0.17.1")
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_a_prefix_for_wide_heads_is_read_or_refused_by_its_width(version, adapter_of, read, tmp_path):
    config, other = FORMATS / version / f"{WIDE}.json", FORMATS / version / "tensors.json"
    today = adapter_of("qwen3", "p-tuning-v2")
    shutil.copy(config, tmp_path / CONFIG_NAME)
    if not other.exists():
        shutil.copy(today / TENSORS_NAME, tmp_path)
        assert torch.equal(read(tmp_path, "qwen3").prefix_kv, read(today, "qwen3").prefix_kv)
        return
    shapes = json.loads(other.read_text())[WIDE]
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / TENSORS_NAME)
    with pytest.raises(AdapterBaseError, match=r"expected 'token_dim' to be 64, .* found 32"):
        read(tmp_path, "qwen3")
    fields = json.loads(config.read_text())
    del fields["token_dim"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(fields))
    with pytest.raises(AdapterBaseError, match=r"expected shape \[20, 384\], found \[20, 192\]"):
        read(tmp_path, "qwen3")


def test_every_method_and_version_is_here():
    for version in VERSIONS:
        paths = {path.stem: path for path in (FORMATS / version).glob("*.json")}
        configs = [json.loads(path.read_text()) for name, path in paths.items() if name != OTHER_TENSORS]
        later = {"TRAINABLE_TOKENS"} if version.removeprefix("peft-") < "0.15.2" else set()
        assert {config["peft_type"] for config in configs} == KINDS.keys() - later
        assert not paths.keys() & {
            name for name, since in LATER.items() if version.removeprefix("peft-") < since
        }
        assert {
            name for name, since in LATER.items() if version.removeprefix("peft-") >= since
        } <= paths.keys()


def test_a_field_that_no_version_had_is_refused(adapter_of, read, tmp_path):
    today = adapter_of("llama", "lora")
    fields = json.loads((FORMATS / "peft-0.13.2" / "lora.json").read_text()) | {"lora_gamma": 2}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(fields))
    save_file(load_file(today / TENSORS_NAME), tmp_path / TENSORS_NAME)
    with pytest.raises(AdapterFormatError, match="'lora_gamma'"):
        read(tmp_path)
