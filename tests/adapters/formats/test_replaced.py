"""Weights of the base in an adapter's file: those that peft would load over the base's own replace them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file

from support.peft_modules import ia3, lora, vera
from support.peft_modules import tokens as trainable_tokens
from support.refusals import refused
from turret_adapters.errors import AdapterFormatError
from turret_adapters.formats import replaced
from turret_adapters.formats.files import TENSORS_NAME
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import BaseWeights, HostAdapter
from turret_adapters.spec import BaseSpec, Part

HEAD, EMBED = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
BOTH = {"embed_tokens": [7, 2], "lm_head": [30, 1, 2]}
# family, config, and a key by which peft saves a copy of base weights
CASES: dict[str, tuple[str, Callable[[], Any], str]] = {
    "not wrapped": ("llama", lora(), f"{EMBED}.weight"),
    "not wrapped, tied": ("llama-tied", lora(), f"{HEAD}.weight"),
    "not wrapped, biased": ("phi", lora(), f"{HEAD}.bias"),
    "adapted": ("llama", lora(target_modules=["embed_tokens", "lm_head"]), f"{EMBED}.base_layer.weight"),
    "adapted, by path": ("llama", lora(target_modules=["model.embed_tokens"]), f"{EMBED}.base_layer.weight"),
    "adapted, tied": (
        "llama-tied",
        lora(target_modules=["embed_tokens", "lm_head"]),
        f"{HEAD}.base_layer.weight",
    ),
    "embedding adapted, tied": (
        "llama-tied",
        lora(target_modules=["embed_tokens"]),
        f"{EMBED}.base_layer.weight",
    ),
    "head adapted, tied": ("llama-tied", lora(target_modules=["lm_head"]), f"{HEAD}.base_layer.weight"),
    "head, DoRA": ("phi", lora(target_modules=["lm_head"], use_dora=True), f"{HEAD}.base_layer.weight"),
    "head, lora_bias": ("phi", lora(target_modules=["lm_head"], lora_bias=True), f"{HEAD}.base_layer.bias"),
    "head, IA3": (
        "phi",
        ia3(target_modules=["lm_head"], feedforward_modules=[]),
        f"{HEAD}.base_layer.bias",
    ),
    "head, VeRA": ("llama", vera(target_modules=["lm_head"]), f"{HEAD}.base_layer.weight"),
    "whole": ("llama", lora(modules_to_save=["embed_tokens", "lm_head"]), f"{EMBED}.original_module.weight"),
    "whole, twice": ("llama", lora(modules_to_save=["embed_tokens"]), f"{EMBED}.modules_to_save.weight"),
    "whole, biased": ("phi", lora(modules_to_save=["lm_head"]), f"{HEAD}.original_module.bias"),
    "whole embedding, tied": (
        "llama-tied",
        lora(modules_to_save=["embed_tokens"]),
        f"{EMBED}.original_module.weight",
    ),
    "whole head, tied": ("llama-tied", lora(modules_to_save=["lm_head"]), f"{HEAD}.original_module.weight"),
    "tying": (
        "llama-tied",
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        f"{HEAD}.modules_to_save.weight",
    ),
    "tokens": ("llama", lora(trainable_token_indices=[7, 2]), f"{EMBED}.token_adapter.base_layer.weight"),
    "tokens of each": (
        "llama",
        lora(trainable_token_indices=BOTH),
        f"{HEAD}.token_adapter.base_layer.weight",
    ),
    "tokens, tied": (
        "llama-tied",
        lora(trainable_token_indices=[7, 2]),
        f"{HEAD}.token_adapter.trainable_tokens_delta",
    ),
    "tokens, whole head": (
        "llama",
        lora(trainable_token_indices=[7, 2], modules_to_save=["lm_head"]),
        f"{EMBED}.token_adapter.base_layer.weight",
    ),
    "tokens, adapted head, tied": (
        "llama-tied",
        lora(trainable_token_indices=[7, 2], target_modules=[r"lm_head", "q_proj"]),
        f"{EMBED}.token_adapter.trainable_tokens_delta",
    ),
    "DoRA, by path": (
        "llama",
        lora(target_modules=["model.embed_tokens"], use_dora=True),
        f"{EMBED}.lora_magnitude_vector.weight",
    ),
    "trainable_tokens": ("llama", trainable_tokens(), f"{EMBED}.base_layer.weight"),
    "trainable_tokens, tied": ("llama-tied", trainable_tokens(), f"{EMBED}.base_layer.weight"),
    "norms": (
        "llama",
        lambda: LNTuningConfig(target_modules=["norm"], task_type="CAUSAL_LM"),
        f"{EMBED}.weight",
    ),
}


def weights_replaced(found: HostAdapter) -> set[str]:
    return {name for name, delta in found.deltas.items() if Part.WEIGHT in delta.rows}


@pytest.mark.parametrize(("family", "config", "key"), CASES.values(), ids=CASES.keys())
def test_trained_embeddings_are_those_that_peft_loads(
    *,
    family: str,
    config: Callable[[], Any],
    key: str,
    save: Callable,
    read_as_peft: Callable,
) -> None:
    saved = save(config(), family=family, seed=3, embeddings="trained")
    assert key in load_file(saved.folder / TENSORS_NAME)
    read_as_peft(saved.folder, family)


@pytest.mark.parametrize(
    ("saved_whole", "kept"),
    [
        ("embed_tokens", f"{EMBED}.original_module.weight"),
        ("lm_head", f"{HEAD}.original_module.weight"),
        ("norm", f"{EMBED}.weight"),
        ("norm", f"{HEAD}.weight"),
    ],
)
def test_one_copy_is_that_of_both_tied_modules(
    saved_whole: str, kept: str, save: Callable, read_as_peft: Callable
) -> None:
    config = lora(modules_to_save=[saved_whole])
    file = save(config(), family="llama-tied", seed=3, embeddings="trained").folder / TENSORS_NAME
    tensors = load_file(file)
    copies = {f"{module}.{inside}weight" for module in (EMBED, HEAD) for inside in ("", "original_module.")}
    trained = {f"{module}.weight" for module in (EMBED, HEAD) if module.endswith(saved_whole)}
    for key in tensors.keys() & copies - trained - {kept}:
        del tensors[key]
    assert kept in tensors
    save_file(tensors, file)
    read_as_peft(file.parent, "llama-tied")


@pytest.mark.parametrize("case", ["not wrapped, tied", "adapted", "tokens", "tokens, tied", "whole"])
def test_embeddings_of_the_base_are_dropped(
    case: str, save: Callable, base_of_family: Callable, weights_of_family: Callable
) -> None:
    family, config, key = CASES[case]
    base, weights = base_of_family(family), weights_of_family(family)
    found = {}
    for embeddings in ("", "saved"):
        saved = save(config(), family=family, seed=3, embeddings=embeddings)
        found[embeddings] = read_adapter(saved.folder, base, weights)
    assert key in load_file(saved.folder / TENSORS_NAME)
    assert found["saved"].spec.rows == found[""].spec.rows
    assert weights_replaced(found["saved"]) == weights_replaced(found[""])


def test_a_prompt_beside_trained_embeddings(
    save: Callable, load: Callable, base: BaseSpec, weights: BaseWeights
) -> None:
    saved = save(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), embeddings="trained")
    found = read_adapter(saved.folder, base, weights)
    assert list(found.deltas) == ["model.embed_tokens", "lm_head"]
    loaded = load(saved.folder).base_model
    for name, delta in found.deltas.items():
        torch.testing.assert_close(delta.rows[Part.WEIGHT], loaded.get_submodule(name).weight, rtol=0, atol=0)


def test_biases_of_modules_that_are_saved_whole(save: Callable, read_as_peft: Callable) -> None:
    """With bias="all" peft also writes the biases inside its wrappers."""
    saved = save(lora(bias="all", modules_to_save=["lm_head", "final_layernorm"])(), family="phi", seed=3)
    assert f"{HEAD}.modules_to_save.bias" in load_file(saved.folder / TENSORS_NAME)
    read_as_peft(saved.folder, "phi")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_of_the_base_may_be_rounded(
    dtype: torch.dtype, save: Callable, base: BaseSpec, weights: BaseWeights
) -> None:
    config = lora(target_modules=["embed_tokens", "lm_head", "q_proj"])()
    found = read_adapter(save(config, dtype=dtype).folder, base, weights)
    assert not weights_replaced(found)
    vocabulary = 2 * 61 * 32
    assert found.spec.num_parameters == vocabulary + 4 * (3 * (32 + 48) + 2 * (61 + 32))


class Rounded:
    """The base's weights on a server that computes in bfloat16."""

    def __init__(self, weights: BaseWeights) -> None:
        self._weights = weights

    def weight(self, module: str) -> torch.Tensor:
        return self._weights.weight(module).bfloat16().float()

    def bias(self, module: str) -> torch.Tensor | None:
        return self._weights.bias(module)


def test_the_base_may_be_rounded(save: Callable, base: BaseSpec, weights: BaseWeights) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        saved = save(lora()(), dtype=dtype, embeddings="saved")
        assert not weights_replaced(read_adapter(saved.folder, base, Rounded(weights)))


@pytest.mark.parametrize("row", [0, 31, 60])
def test_a_copy_with_one_number_changed_a_little_replaces(
    *, row: int, save: Callable, base: BaseSpec, weights: BaseWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers differ less than their roundings to bfloat16 would."""
    monkeypatch.setattr(replaced, "ROWS_COMPARED", 30)
    file = save(lora()(), embeddings="saved").folder / TENSORS_NAME
    assert not weights_replaced(read_adapter(file.parent, base, weights))
    tensors = load_file(file)
    tensors[f"{HEAD}.weight"][row, 31] *= 1 + 2**-20
    save_file(tensors, file)
    assert weights_replaced(read_adapter(file.parent, base, weights)) == {"lm_head"}


def test_a_bias_that_differs_replaces_alone(
    save: Callable, base_of_family: Callable, weights_of_family: Callable
) -> None:
    base, weights = base_of_family("phi"), weights_of_family("phi")
    file = save(lora()(), family="phi", embeddings="saved").folder / TENSORS_NAME
    tensors = load_file(file)
    tensors[f"{HEAD}.bias"][60] += 1
    save_file(tensors, file)
    found = read_adapter(file.parent, base, weights)
    assert list(found.deltas["lm_head"].rows) == [Part.BIAS]


def test_an_activated_lora_beside_trained_embeddings(
    save: Callable, base: BaseSpec, weights: BaseWeights
) -> None:
    """Its rows apply from the invocation on, but peft's replacements to every token."""
    config = lora(alora_invocation_tokens=[5])
    assert read_adapter(save(config(), embeddings="saved").folder, base, weights).spec.invocation_tokens
    refused(
        save(config(), embeddings="trained").folder,
        base,
        AdapterFormatError,
        "embed_tokens",
        "alora_invocation_tokens",
        weights=weights,
    )
