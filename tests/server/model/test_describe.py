"""The weights of a checkpoint, whatever files hold them and under whatever names.

`clients/cli/test_validate.py` compares them, and the descriptions of models, with those of a server.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape
from turret_server.errors import ConfigError
from turret_server.model.describe import CheckpointWeights

EMBEDDING = ModuleShape(kind=ModuleKind.EMBEDDING, in_features=7, out_features=4)
LINEAR = ModuleShape(kind=ModuleKind.LINEAR, in_features=4, out_features=6, has_bias=True)
PLAIN = ModuleShape(kind=ModuleKind.LINEAR, in_features=4, out_features=6)
BASE = BaseSpec(
    name_or_path="",
    hidden_size=4,
    num_layers=1,
    num_kv_heads=1,
    head_dim=4,
    modules={"model.embed": EMBEDDING, "model.linear": LINEAR, "model.plain": PLAIN},
)


def random_tensors() -> dict[str, torch.Tensor]:
    return {
        "model.embed.weight": torch.randn(7, 4),
        "model.linear.weight": torch.randn(6, 4),
        "model.linear.bias": torch.randn(6),
        "model.plain.weight": torch.randn(6, 4),
    }


def assert_read(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    weights = CheckpointWeights(str(folder), BASE)
    for module in BASE.modules:
        assert torch.equal(weights.weight(module), expected[f"{module}.weight"])
    bias = weights.bias("model.linear")
    assert bias is not None
    assert torch.equal(bias, expected["model.linear.bias"])
    assert weights.bias("model.plain") is None


def test_weights_are_read_from_one_file(tmp_path):
    tensors = random_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_read(tmp_path, tensors)


def test_weights_are_read_from_the_file_that_the_index_says(tmp_path):
    tensors = random_tensors()
    files = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert_read(tmp_path, tensors)


def test_names_may_lack_their_first_component(tmp_path):
    tensors = random_tensors()
    stored = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    assert_read(tmp_path, tensors)


def test_linears_may_be_stored_transposed_and_embeddings_are_not(tmp_path):
    tensors = random_tensors()
    stored = {
        name: tensor.T.contiguous() if "linear.weight" in name else tensor for name, tensor in tensors.items()
    }
    save_file(stored, tmp_path / "model.safetensors")
    assert_read(tmp_path, tensors)


def test_weights_are_given_in_32_bit(tmp_path):
    stored = {name: tensor.bfloat16() for name, tensor in random_tensors().items()}
    save_file(stored, tmp_path / "model.safetensors")
    assert CheckpointWeights(str(tmp_path), BASE).weight("model.linear").dtype == torch.float32
    assert_read(tmp_path, {name: tensor.float() for name, tensor in stored.items()})


def test_a_checkpoint_in_another_format_is_loaded_once_as_a_model(base_of, tmp_path, monkeypatch):
    folder = shutil.copytree(base_of("llama"), tmp_path / "model")
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(expected, folder / "pytorch_model.bin")
    load, loads = LlamaForCausalLM.from_pretrained, []

    def counted(*arguments, **options):
        loads.append(arguments)
        return load(*arguments, **options)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", counted)
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    shape = ModuleShape(kind=ModuleKind.LINEAR, in_features=64, out_features=128)
    base = BaseSpec(
        name_or_path="",
        hidden_size=64,
        num_layers=3,
        num_kv_heads=2,
        head_dim=16,
        modules=dict.fromkeys([*names, "absent"], shape),
    )
    weights = CheckpointWeights(str(folder), base)
    for name in names:
        found = weights.weight(name)
        assert torch.equal(found, expected[f"{name}.weight"])
        assert not found.requires_grad
    with pytest.raises(ConfigError, match=r"validating the adapter needs absent\.weight, which is not in"):
        weights.weight("absent")
    assert len(loads) == 1
