"""Files with other keys and fields than peft writes today, which mean the same."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.peft_modules import adalora, ia3, lora, vera
from turret_adapters.formats.files import CONFIG_NAME, TENSORS_NAME
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec

CASES: dict[str, Callable[[], Any]] = {
    "lora": lora(target_modules=["q_proj", "embed_tokens"]),
    "dora": lora(target_modules=["q_proj", "embed_tokens"], use_dora=True),
    "lora_bias": lora(lora_bias=True),
    "whole": lora(modules_to_save=["lm_head"]),
    "adalora": adalora(),
    "vera": vera(),
    "ia3": ia3(),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_keys_of_a_models_state_dict(
    config: Callable[[], Any], save: Callable, read_as_peft: Callable
) -> None:
    """They have the adapter's name in them, and peft loads them under that name."""
    saved = save(config(), seed=3)
    file = saved.folder / TENSORS_NAME
    today = load_file(file)
    state = {
        key: tensor.clone()
        for key, tensor in saved.model.state_dict().items()
        # peft saves no number of ranks, and VeRA's matrices once.
        if ".default" in key and not re.search(r"ranknum|layers.*vera_[AB]", key)
    }
    whole = {key: tensor for key, tensor in today.items() if key.endswith("lm_head.weight")}
    assert state
    save_file(whole | state, file)
    read_as_peft(saved.folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dtype": "bf16", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6, "swift_type": "LORA"},
        {"init_lora_weights": "Gaussian"},
    ],
)
def test_fields_of_other_tools(
    fields: dict[str, Any], sound: dict[str, Any], base: BaseSpec, weights: BaseWeights, tmp_path: Path
) -> None:
    expected = read_adapter(sound["LORA"].write(tmp_path), base, weights)
    sound["LORA"].fields.update(fields)
    found = read_adapter(sound["LORA"].write(tmp_path), base, weights)
    assert found.spec.rows == expected.spec.rows


def test_a_config_that_begins_with_a_byte_order_mark(
    sound: dict[str, Any], base: BaseSpec, weights: BaseWeights, tmp_path: Path
) -> None:
    expected = read_adapter(sound["LORA"].write(tmp_path), base, weights)
    file = tmp_path / CONFIG_NAME
    file.write_bytes(codecs.BOM_UTF8 + json.dumps(sound["LORA"].fields).encode())
    found = read_adapter(tmp_path, base, weights)
    assert found.spec.rows == expected.spec.rows
    assert found.spec.revision != expected.spec.revision


def test_a_tensor_under_both_keys(
    sound: dict[str, Any], base: BaseSpec, weights: BaseWeights, tmp_path: Path
) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    files = sound["LORA"]
    files.tensors[key.replace(".weight", ".default.weight")] = files.tensors[key].clone()
    found = read_adapter(files.write(tmp_path), base, weights)
    assert torch.equal(
        next(iter(found.deltas["model.layers.0.self_attn.q_proj"].rows.values())), files.tensors[key]
    )
