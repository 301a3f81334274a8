"""The reader against peft: whatever peft saves and we serve comes back as peft itself holds it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    EvaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from safetensors.torch import load_file

from turret_adapters.errors import AdapterFormatError
from turret_adapters.formats import peft
from turret_adapters.formats.kinds import KINDS
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import BaseWeights, HostAdapter
from turret_adapters.spec import BaseSpec, Method, Part, PrefixKind

PATTERNS = {
    "rank_pattern": {"q_proj": 6, r"layers\.[12]\.mlp\.(up|down)_proj": 3, "^model.layers.0.mlp.up_proj": 5},
    "alpha_pattern": {
        "layers.1.self_attn.q_proj": 7,
        r".*\.down_proj": 0.5,
        "0.mlp.up_proj|2.self_attn.q_proj": 9,
        "q": 1,
        "up": 1,
        "_proj": 1,
    },
}
LORA = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 5, "lora_alpha": 3},
    "float alpha": {"target_modules": ["o_proj"], "lora_alpha": 2.5},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.layers\.[02]\.(self_attn\.[qo]_proj|mlp\.down_proj)"},
    "regex of the whole path": {"target_modules": r".*\.q_pro|self_attn.k_proj|.*\.1.*\.k_proj"},
    "whole paths": {"target_modules": ["model.layers.1.self_attn.k_proj", "layers.2.mlp.up_proj"]},
    "partly absent": {"target_modules": ["q_proj", "W_pack"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layers of a pattern": {
        "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "excluded by name": {
        "target_modules": "all-linear",
        "exclude_modules": ["down_proj", "layers.1.mlp.up_proj"],
    },
    "excluded by regex": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.1\..*k_proj"},
    "patterns": {"target_modules": ["q_proj", "up_proj", "down_proj"], **PATTERNS},
    "patterns, rslora": {
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "use_rslora": True,
        **PATTERNS,
    },
    "no task": {"target_modules": ["q_proj"], "task_type": None},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.3},
    "fan_in_fan_out": {"target_modules": ["q_proj"], "qalora_group_size": 4, "megatron_core": "other"},
    **{
        f"init {init}": {"target_modules": ["q_proj"], "init_lora_weights": init, **more}
        for init, more in [
            (True, {}),
            ("gaussian", {}),
            ("orthogonal", {}),
            ("mica", {}),
            ("MiCA", {}),
            ("Gaussian", {}),
            ("eva", {"eva_config": EvaConfig()}),
        ]
    },
}
PROMPTS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning MLP": PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=12, encoder_dropout=0.0
    ),
    "p-tuning LSTM": PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=16,
        encoder_num_layers=1,
    ),
}


def lora_layers(model: PeftModel) -> dict[str, Any]:
    modules = model.base_model.model.named_modules()
    return {name: module for name, module in modules if hasattr(module, "lora_A")}


def assert_owned(tensor: torch.Tensor) -> None:
    assert tensor.is_contiguous()
    assert tensor.storage_offset() == 0
    assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def assert_lora(found: HostAdapter, model: PeftModel, base: BaseSpec) -> None:
    layers = lora_layers(model)
    assert list(found.deltas) == [name for name in base.modules if name in layers]
    assert found.deltas.keys() == layers.keys()
    ranks = []
    for name, delta in found.deltas.items():
        layer, (a_RI, b_RO) = layers[name], (delta.rows[Part.LORA_A], delta.rows[Part.LORA_B])
        assert list(delta.rows) == [Part.LORA_A, Part.LORA_B]
        torch.testing.assert_close(a_RI, layer.lora_A["default"].weight, rtol=0, atol=0)
        torch.testing.assert_close(b_RO, layer.lora_B["default"].weight.t(), rtol=0, atol=0)
        assert delta.scaling == layer.scaling["default"]
        assert a_RI.shape == (layer.r["default"], layer.in_features)
        assert b_RO.shape == (layer.r["default"], layer.out_features)
        assert_owned(a_RI)
        assert_owned(b_RO)
        ranks.append(layer.r["default"])
    assert found.spec.max_rank == max(ranks)
    assert [(g.module, g.part) for g in found.spec.rows] == [
        (name, part) for name in found.deltas for part in (Part.LORA_A, Part.LORA_B)
    ]
    assert [g.count for g in found.spec.rows] == [rank for rank in ranks for _ in range(2)]


@pytest.mark.parametrize("kwargs", LORA.values(), ids=LORA.keys())
def test_lora_is_what_peft_holds(
    kwargs: dict[str, Any], save: Callable, load: Callable, base: BaseSpec, weights: BaseWeights
) -> None:
    defaults = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12, "init_lora_weights": False}
    saved = save(LoraConfig(**{**defaults, **kwargs}))

    found = read_adapter(saved.folder, base, weights)

    # peft writes a config with sorted keys, so the patterns' order is the file's, not the trained model's.
    loaded = load(saved.folder)
    assert_lora(found, loaded, base)
    parameters = [p for name, p in saved.model.named_parameters() if "lora_" in name]
    assert found.spec.num_parameters == sum(p.numel() for p in parameters)
    assert found.spec.method is Method.LORA
    assert found.spec.prefix is None
    assert (found.prefix_kv, found.prompt_embeddings) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lora_keeps_the_files_dtype(
    dtype: torch.dtype, save: Callable, base: BaseSpec, weights: BaseWeights
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    saved = save(config, dtype=dtype)

    found = read_adapter(saved.folder, base, weights)

    assert {rows.dtype for delta in found.deltas.values() for rows in delta.rows.values()} == {dtype}
    assert_lora(found, saved.model, base)


def test_all_linear_that_was_never_resolved_leaves_out_the_output_embedding(
    save: Callable, base: BaseSpec, weights: BaseWeights
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    saved = save(config)
    fields = json.loads((saved.folder / "adapter_config.json").read_text())
    (saved.folder / "adapter_config.json").write_text(json.dumps({**fields, "target_modules": "All-Linear"}))

    assert_lora(read_adapter(saved.folder, base, weights), saved.model, base)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_is_the_cache_that_peft_makes(
    *,
    projection: bool,
    dtype: torch.dtype,
    save: Callable,
    base: BaseSpec,
    weights: BaseWeights,
) -> None:
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=20
    )
    saved = save(config, dtype=dtype)

    found = read_adapter(saved.folder, base, weights)

    assert found.spec.prefix is not None
    assert (found.spec.method, found.spec.prefix.kind) == (Method.PREFIX_TUNING, PrefixKind.KEY_VALUE)
    assert found.spec.num_virtual_tokens == 5
    assert found.spec.num_parameters == 5 * base.kv_width
    assert (found.deltas, found.spec.rows, found.prompt_embeddings) == ({}, (), None)
    assert found.prefix_kv is not None
    assert found.prefix_kv.shape == (5, base.num_layers, 2, base.num_kv_heads, base.head_dim)
    assert_owned(found.prefix_kv)
    with torch.no_grad():
        cache = saved.model.get_prompt(1)
    for index, layer in enumerate(cache.layers):
        for half, expected_1HND in enumerate((layer.keys, layer.values)):
            expected_NHD = expected_1HND[0].transpose(0, 1)
            torch.testing.assert_close(found.prefix_kv[:, index, half], expected_NHD, rtol=0, atol=0)


@pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prompt_embeddings_are_what_peft_feeds(
    config: Any, dtype: torch.dtype, save: Callable, base: BaseSpec, weights: BaseWeights
) -> None:
    saved = save(dataclasses.replace(config), dtype=dtype)

    found = read_adapter(saved.folder, base, weights)

    with torch.no_grad():
        fed_NE = saved.model.get_prompt(1)[0]
    saved_NE = saved.model.get_prompt_embedding_to_save("default")
    assert found.prompt_embeddings is not None
    torch.testing.assert_close(found.prompt_embeddings, saved_NE, rtol=0, atol=0)
    # An LSTM rounds differently where it keeps what a gradient would need.
    torch.testing.assert_close(found.prompt_embeddings, fed_NE)
    assert_owned(found.prompt_embeddings)
    assert found.spec.prefix is not None
    assert found.spec.prefix.kind is PrefixKind.EMBEDDING
    assert found.spec.method.name == config.peft_type.value
    assert found.spec.num_virtual_tokens == config.num_virtual_tokens
    assert (found.deltas, found.prefix_kv) == ({}, None)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights", "ignore:.*is_gradient_checkpointing")
def test_a_pissa_adapter_is_served_once_converted(
    save: Callable, load: Callable, base: BaseSpec, weights: BaseWeights, tmp_path: Path
) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights="pissa", lora_alpha=3
    )
    model = save(config).model
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight += 0.1
    model.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(AdapterFormatError, match=r"'init_lora_weights'.*found 'pissa'") as refusal:
        read_adapter(tmp_path / "raw", base, weights)
    assert "path_initial_model_for_weight_conversion" in str(refusal.value)

    model.save_pretrained(
        str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )

    loaded = load(tmp_path / "converted")
    assert_lora(read_adapter(tmp_path / "converted", base, weights), loaded, base)


def test_the_policies_cover_the_fields_of_peft() -> None:
    of_others = {"lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "swift_type"}
    for name, kind in KINDS.items():
        fields = dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[name])
        assert kind.fields.keys() - of_others == {field.name for field in fields}, name


def test_every_method_is_a_kind() -> None:
    assert {name: kind.method.name for name, kind in KINDS.items()} == {
        name: name for name in Method.__members__
    }


@pytest.mark.parametrize("method", KINDS)
def test_revision_is_the_digest_of_both_files(
    method: str, sound: dict[str, Any], base: BaseSpec, weights: BaseWeights, tmp_path: Path
) -> None:
    files = sound[method]
    folder = files.write(tmp_path / "one")
    first = read_adapter(folder, base, weights).spec
    assert read_adapter(files.write(tmp_path / "two"), base, weights).spec == first
    assert len(first.revision) == 32
    assert int(first.revision, 16) >= 0
    assert first.file_bytes == sum(file.stat().st_size for file in folder.iterdir())

    next(iter(files.tensors.values())).view(-1)[0] += 1
    other_tensors = read_adapter(files.write(folder), base, weights).spec
    files.fields["peft_version"] = "0.0.0"
    other_config = read_adapter(files.write(folder), base, weights).spec
    tensors = folder / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes().replace(b'"format":"pt"', b'"format":"np"'))
    other_header = read_adapter(folder, base, weights).spec

    specs = [first, other_tensors, other_config, other_header]
    assert len({spec.revision for spec in specs}) == len(specs)


def test_progress_is_the_place_of_each_tensor_before_it_is_read(
    sound: dict[str, Any],
    base: BaseSpec,
    weights: BaseWeights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files, seen, read, read_tensor = sound["LORA"], [], [], peft.read_tensor

    def reading(*arguments: Any) -> torch.Tensor:
        read.append(arguments)
        return read_tensor(*arguments)

    def progress(done: int, total: int | None) -> None:
        assert len(read) == len(seen)
        seen.append((done, total))

    monkeypatch.setattr(peft, "read_tensor", reading)
    folder = files.write(tmp_path)
    read_adapter(folder, base, weights, progress)
    tensors = load_file(folder / "adapter_model.safetensors").values()
    done = [done for done, _ in seen]
    assert {total for _, total in seen} == {(folder / "adapter_model.safetensors").stat().st_size}
    assert (len(done), done[0], done) == (len(tensors), 0, sorted(set(done)))
    assert sum(tensor.nbytes for tensor in tensors) - done[-1] in {tensor.nbytes for tensor in tensors}


def test_fields_that_only_training_reads_are_free(
    sound: dict[str, Any], base: BaseSpec, weights: BaseWeights, tmp_path: Path
) -> None:
    files = sound["LORA"]
    files.fields.update(
        {
            "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
            "base_model_name_or_path": "/another/place",
            "corda_config": {"cache_file": "x"},
            "fan_in_fan_out": True,
            "inference_mode": False,
            "loftq_config": {"loftq_bits": 4},
            "lora_dropout": 0.5,
            "revision": "main",
            "runtime_config": {"ephemeral_gpu_offload": True},
            "a_field_of_the_future": None,
            "another": False,
            "a_third": [],
            "a_fourth": {},
        }
    )
    assert read_adapter(files.write(tmp_path), base, weights).spec.max_rank == 4


def test_absent_fields_have_the_defaults_of_peft(
    sound: dict[str, Any],
    base: BaseSpec,
    weights: BaseWeights,
    tmp_path: Path,
    save: Callable,
    load: Callable,
) -> None:
    saved = save(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    (saved.folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]})
    )
    loaded = load(saved.folder)
    assert_lora(read_adapter(saved.folder, base, weights), loaded, base)

    files = sound["PREFIX_TUNING"]
    files.fields.clear()
    files.fields.update({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5})
    assert read_adapter(files.write(tmp_path), base, weights).spec.num_virtual_tokens == 5
