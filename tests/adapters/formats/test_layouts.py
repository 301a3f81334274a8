"""Adapters that name the modules of a language model as one version of transformers or another."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from turret_adapters.errors import AdapterBaseError
from turret_adapters.formats.peft import read_adapter

# The language model and its head in the base of this folder's tests, and in other layouts.
OWN = ("model", "lm_head")
LAYOUTS = {
    "alone": OWN,
    "multimodal": ("model.language_model", "lm_head"),
    "multimodal, transformers 4": ("language_model.model", "language_model.lm_head"),
}
LEFT_OUT = ("model.vision_tower", "model.multi_modal_projector")


def renamed(path: str, layout: tuple[str, str]) -> str:
    model, head = layout
    return head + path.removeprefix("lm_head") if path.startswith("lm_head") else model + path[len("model") :]


def in_layout(files, layout):
    prefix = "base_model.model."

    def rename(key):
        return prefix + renamed(key.removeprefix(prefix), layout) if key.startswith(prefix) else key

    return replace(files, tensors={rename(key): tensor for key, tensor in files.tensors.items()})


def base_in(base, layout):
    return replace(
        base,
        modules={renamed(path, layout): shape for path, shape in base.modules.items()},
        left_out=() if layout == OWN else LEFT_OUT,
    )


class Weights:
    """The weights of the base, which is called as in a layout."""

    def __init__(self, weights, base, layout) -> None:
        self._weights = weights
        self._own = {renamed(path, layout): path for path in base.modules}

    def weight(self, module):
        return self._weights.weight(self._own[module])

    def bias(self, module):
        return self._weights.bias(self._own[module])


def deltas(path, base, weights, layout):
    """An adapter's rows, by the names of this folder's base."""
    found = read_adapter(path, base_in(base, layout), Weights(weights, base, layout))
    own = {renamed(path, layout): path for path in base.modules}
    assert [group.module for group in found.spec.rows if group.module not in own] == []
    return {own[module]: delta for module, delta in found.deltas.items()}


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for module, delta in found.items():
        other = expected[module]
        assert (delta.scaling, delta.token_ids) == (other.scaling, other.token_ids)
        assert delta.rows.keys() == other.rows.keys()
        assert all(torch.equal(rows, other.rows[part]) for part, rows in delta.rows.items())


@pytest.mark.parametrize("of_base", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("of_file", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("method", ["LORA", "ADALORA", "VERA", "IA3", "LN_TUNING"])
def test_an_adapter_of_any_layout_fits_a_base_of_any(
    method, of_file, of_base, sound, base, weights, tmp_path
):
    expected = read_adapter(sound[method].write(tmp_path / "own"), base, weights).deltas
    path = in_layout(sound[method], of_file).write(tmp_path / "other")
    assert_equal(deltas(path, base, weights, of_base), expected)


@pytest.mark.parametrize("of_file", LAYOUTS.values(), ids=LAYOUTS)
def test_names_and_patterns_of_the_config_are_those_of_the_layout(
    of_file, save, sound, base, weights, tmp_path
):
    from peft import LoraConfig  # noqa: PLC0415

    config = LoraConfig(
        target_modules=r"model\.layers\.(0|2)\.self_attn\.(q|v)_proj|lm_head",
        rank_pattern={r"model\.layers\.0\..*": 3},
        use_dora=True,
        modules_to_save=["embed_tokens", "model.norm"],
    )
    folder = save(config, seed=5).folder
    fields = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    files = replace(sound["LORA"], fields=fields, tensors=tensors)
    expected = read_adapter(files.write(tmp_path / "own"), base, weights).deltas
    model, head = of_file
    fields = {
        **files.fields,
        "target_modules": rf"{model}\.layers\.(0|2)\.self_attn\.(q|v)_proj|{head}",
        "rank_pattern": {rf"{model}\.layers\.0\..*": 3},
        "modules_to_save": ["embed_tokens", f"{model}.norm"],
    }
    path = in_layout(replace(files, fields=fields), of_file).write(tmp_path / "other")
    for of_base in LAYOUTS.values():
        assert_equal(deltas(path, base, weights, of_base), expected)


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", "vision_tower"),
        ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", "vision_tower"),
        ("model.multi_modal_projector.linear", "multi_modal_projector"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_part_that_is_left_out_is_named(alone, module, part, sound, base, weights, tmp_path):
    files = in_layout(sound["LORA"], LAYOUTS["multimodal"])
    key = f"base_model.model.{module}.lora_A.weight"
    tensors = {key: torch.zeros(4, 32)} if alone else {**files.tensors, key: torch.zeros(4, 32)}
    fields = {**files.fields, "target_modules": ".*vision_tower.*"} if alone else files.fields
    path = replace(files, tensors=tensors, fields=fields).write(tmp_path / "adapter")
    with pytest.raises(AdapterBaseError) as refused:
        read_adapter(path, base_in(base, LAYOUTS["multimodal"]), weights)
    said = str(refused.value)
    assert f"found one of its {part}, which is left out" in said
    assert f'exclude_modules=".*{part}.*"' in said
    assert key in said


def test_a_module_of_no_layout_is_refused_by_its_name(sound, base, weights, tmp_path):
    layout = ("transformer.text", "transformer.head")
    path = in_layout(sound["LORA"], layout).write(tmp_path / "adapter")
    with pytest.raises(AdapterBaseError, match=r"'transformer\.text\.layers\.0.*found none of this path"):
        read_adapter(path, base, weights)
