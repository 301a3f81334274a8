from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.models import MIXTURES
from turret_adapters.spec import ModuleKind
from turret_server.kernels.reference import ReferenceOps
from turret_server.model.load import LoadedModel, load_model, quantization
from turret_server.model.weights import ModelWeights

CPU = torch.device("cpu")
PROJECTIONS = ("gate_up_proj", "down_proj")


def load(model: Path, cache: Path) -> LoadedModel:
    return load_model(str(model), device=CPU, dtype=torch.float32, cache=cache, ops=ReferenceOps())


def weights_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Every expert's, dequantised."""
    modules = {name: loaded.model.get_submodule(name) for name in loaded.base.of_kind(ModuleKind.EXPERT)}
    return {name: dequantize_4bit(own.weight.data, own.weight.state) for name, own in modules.items()}


@pytest.fixture(params=sorted(MIXTURES))
def base(request, base_of) -> Path:
    return base_of(request.param)


@pytest.fixture
def stacked(base, tmp_path) -> Path:
    """The same weights as transformers 5 holds them."""
    folder = shutil.copytree(base, tmp_path / "stacked")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, save_original_format=False)
    assert any(tensor.ndim == 3 for tensor in load_file(folder / "model.safetensors").values())
    return folder


def test_experts_are_the_checkpoints_in_nf4_whatever_its_format(base, stacked, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base)
    found = weights_of(load(base, tmp_path / "cache"))
    others = weights_of(load(stacked, tmp_path / "cache"))
    assert len(found) == 3 * 2 * 4
    for name, weight in found.items():
        parameter, _, expert = name.rpartition(".")
        original = plain.get_parameter(parameter).data[int(expert)]
        data, state = quantize_4bit(original, quant_type="nf4", compress_statistics=True)
        assert torch.equal(weight, dequantize_4bit(data, state))
        assert torch.equal(weight, others[name])


def test_the_copy_that_is_kept_holds_the_same_quantised_weights(base, tmp_path):
    first = weights_of(load(base, tmp_path))
    [kept] = (tmp_path / "nf4").iterdir()
    tensors = load_file(kept / "model.safetensors")
    assert all(
        tensor.dtype == torch.uint8 for name, tensor in tensors.items() if name.endswith("_proj.0.weight")
    )
    assert json.loads((kept / "config.json").read_text())["quantization_config"]["bnb_4bit_use_double_quant"]
    for file in base.glob("tokenizer*"):
        shutil.copy(file, kept)
    for again in (load(base, tmp_path), load(kept, tmp_path / "other")):
        second = weights_of(again)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "other").exists()


def test_what_only_training_needs_is_not_computed(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "asking")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"output_router_logits": True}))
    assert not load(folder, tmp_path / "cache").model.config.output_router_logits


def linears_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    weights = ModelWeights(loaded.model, loaded.ops)
    return {name: weights.weight(name) for name in loaded.base.of_kind(ModuleKind.LINEAR)}


def test_a_checkpoint_in_bitsandbytes_nf4_is_read_as_it_is(base_of, tmp_path):
    base, folder = base_of("llama"), tmp_path / "nf4-checkpoint"
    quantised = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization(torch.float32), dtype=torch.float32
    )
    quantised.save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)
    first, second = linears_of(load(base, tmp_path / "cache")), linears_of(load(folder, tmp_path / "none"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "none").exists()


def test_another_checkpoint_in_the_same_folder_is_quantised_anew(base_of, tmp_path):
    folder = shutil.copytree(base_of("llama"), tmp_path / "model")
    first = linears_of(load(folder, tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)
    model.save_pretrained(folder)
    second = linears_of(load(folder, tmp_path / "cache"))
    assert [name for name in first if not torch.equal(first[name], second[name])] == [
        "model.layers.0.mlp.up_proj"
    ]


def test_the_cache_is_private_to_its_user_also_one_of_before(base_of, tmp_path):
    base = base_of("llama")
    copies = tmp_path / "cache" / "nf4"
    for _ in ("quantised", "read from its copy"):
        load(base, tmp_path / "cache")
        [copy] = copies.iterdir()
        assert {folder.stat().st_mode & 0o777 for folder in (copies, copy)} == {0o700}
        copies.chmod(0o755)
