"""Adapters that were trained with resized embeddings, as peft saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from support.peft_modules import check, ia3, lora
from turret_adapters.errors import AdapterBaseError, AdapterFormatError
from turret_adapters.formats.files import CONFIG_NAME, TENSORS_NAME
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, Part

EMBED, HEAD = "model.embed_tokens", "lm_head"
BASE_SIZE = 61
BOTH = ["embed_tokens", "lm_head"]
# family, config, what else is trained, size of the vocabulary
CASES: dict[str, tuple[str, Callable[[], Any], str, int]] = {
    "added": ("llama", lora(), "saved", 64),
    "added, tied": ("llama-tied", lora(), "saved", 64),
    "added, biased": ("phi", lora(), "saved", 64),
    "added, all trained": ("llama", lora(), "trained", 64),
    "removed": ("llama", lora(), "saved", 50),
    "removed, tied": ("llama-tied", lora(), "saved", 50),
    "removed, all trained": ("llama", lora(), "trained", 50),
    "whole": ("llama", lora(modules_to_save=BOTH), "saved", 64),
    "whole, tied": ("llama-tied", lora(modules_to_save=BOTH), "saved", 64),
    "whole, removed": ("llama", lora(modules_to_save=BOTH), "saved", 50),
    "whole embedding": ("llama", lora(modules_to_save=["embed_tokens"]), "saved", 64),
    "adapted": ("llama", lora(target_modules=BOTH), "saved", 64),
    "adapted, removed": ("llama", lora(target_modules=BOTH), "saved", 50),
    "adapted, DoRA": ("llama", lora(target_modules=BOTH, use_dora=True), "saved", 64),
    "adapted, DoRA, removed": ("llama", lora(target_modules=BOTH, use_dora=True), "saved", 50),
    "adapted, biased": ("phi", lora(target_modules=BOTH), "saved", 64),
    "head adapted, removed": ("llama", lora(target_modules=["lm_head"]), "saved", 50),
    "tokens": ("llama", lora(trainable_token_indices=[63, 7]), "saved", 64),
    "tokens, all trained": ("llama", lora(trainable_token_indices=[63, 7]), "trained", 64),
    "tokens, tied": ("llama-tied", lora(trainable_token_indices=[63, 7]), "saved", 64),
    "IA3": ("llama", ia3(), "saved", 64),
}


class Resized:
    """The base's weights after `resize_token_embeddings`, with zeros for new tokens."""

    def __init__(self, weights: BaseWeights, base: BaseSpec) -> None:
        self._weights = weights
        self._base = base

    def weight(self, module: str) -> torch.Tensor:
        weight = self._weights.weight(module)
        num_rows = self._base.modules[module].num_tokens if module in (EMBED, HEAD) else len(weight)
        return pad(weight, (0, 0, 0, num_rows - len(weight)))

    def bias(self, module: str) -> torch.Tensor | None:
        bias = self._weights.bias(module)
        if bias is None or module != HEAD:
            return bias
        return pad(bias, (0, self._base.modules[module].num_tokens - len(bias)))


@pytest.mark.parametrize(("family", "config", "embeddings", "size"), CASES.values(), ids=CASES.keys())
def test_every_module_is_that_of_peft(
    *,
    family: str,
    config: Callable[[], Any],
    embeddings: str,
    size: int,
    save: Callable,
    load: Callable,
    base_of_family: Callable[[str], BaseSpec],
    weights_of_family: Callable[[str], BaseWeights],
    make_model: Callable[[str], Any],
) -> None:
    base, weights = base_of_family(family), weights_of_family(family)
    saved = save(config(), family=family, seed=3, embeddings=embeddings, vocab_size=size)
    plain = make_model(family)
    plain.resize_token_embeddings(size, mean_resizing=False)

    found = read_adapter(saved.folder, base, weights)

    assert found.spec.vocab_size == size
    resized = base.resized(size)
    loaded = load(saved.folder, family=family, vocab_size=size)
    check(found, resized, Resized(weights, resized), plain, loaded)


def test_rows_that_are_the_bases_take_no_memory(save: Callable, base: BaseSpec, weights: BaseWeights) -> None:
    added = read_adapter(save(lora()(), embeddings="saved", vocab_size=64).folder, base, weights)
    assert added.deltas[EMBED].token_ids == added.deltas[HEAD].token_ids == (61, 62, 63)
    assert set(added.deltas[EMBED].rows) == {Part.TOKENS}
    assert all(rows.untyped_storage().nbytes() == rows.nbytes for rows in added.deltas[EMBED].rows.values())
    removed = read_adapter(save(lora()(), embeddings="saved", vocab_size=50).folder, base, weights)
    assert removed.deltas.keys().isdisjoint({EMBED, HEAD})


def test_a_prompt_may_have_a_vocabulary(save: Callable, base: BaseSpec, weights: BaseWeights) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    found = read_adapter(save(config, embeddings="saved", vocab_size=64).folder, base, weights)
    assert (found.spec.vocab_size, found.spec.num_virtual_tokens) == (64, 5)
    assert found.deltas[EMBED].token_ids == (61, 62, 63)


@pytest.mark.parametrize("embeddings", ["", "saved"])
def test_the_bases_vocabulary_is_none_of_its_own(
    embeddings: str, save: Callable, base: BaseSpec, weights: BaseWeights
) -> None:
    assert read_adapter(save(lora()(), embeddings=embeddings).folder, base, weights).spec.vocab_size is None


@pytest.mark.parametrize("module", [EMBED, HEAD])
def test_one_module_of_another_size_is_refused(
    module: str, save: Callable, base: BaseSpec, weights: BaseWeights
) -> None:
    folder = save(lora()(), embeddings="saved", vocab_size=64).folder
    tensors = load_file(folder / TENSORS_NAME)
    del tensors[f"base_model.model.{module}.weight"]
    save_file(tensors, folder / TENSORS_NAME)
    with pytest.raises(AdapterBaseError, match=r"with 64 rows in the file, as many as .* found none"):
        read_adapter(folder, base, weights)
    tensors[f"base_model.model.{module}.weight"] = torch.zeros(63, 32)
    save_file(tensors, folder / TENSORS_NAME)
    with pytest.raises(AdapterBaseError, match=r"expected shape \[6[34], 32\], found \[6[34], 32\]"):
        read_adapter(folder, base, weights)


def test_a_token_of_the_tokenizer_without_a_row_is_refused(
    save: Callable, base: BaseSpec, weights: BaseWeights
) -> None:
    tokens = {"num_rows": 64, "added_tokens": [{"id": 63, "content": "<tool>"}]}
    changes = json.dumps({"tokens": tokens, "chat_template": None}).encode()
    folders = {size: save(lora()(), embeddings="saved", vocab_size=size).folder for size in (None, 63, 64)}
    assert read_adapter(folders[64], base, weights, tokenizer=changes).spec.tokenizer
    for size, rows in ((None, BASE_SIZE), (63, 63)):
        with pytest.raises(AdapterBaseError, match=f"below {rows}, .* found '<tool>' with id 63"):
            read_adapter(folders[size], base, weights, tokenizer=changes)


def test_an_activated_lora_may_only_have_removed_tokens(
    save: Callable, base: BaseSpec, weights: BaseWeights
) -> None:
    """Rows of added tokens would apply from the invocation on, and peft's to the whole prompt."""
    folders = [save(lora()(), embeddings="saved", vocab_size=size).folder for size in (64, 50)]
    for folder in folders:
        config = json.loads((folder / CONFIG_NAME).read_text())
        (folder / CONFIG_NAME).write_text(json.dumps(config | {"alora_invocation_tokens": [5, 6]}))
    with pytest.raises(AdapterFormatError, match="'alora_invocation_tokens' to be empty"):
        read_adapter(folders[0], base, weights)
    assert read_adapter(folders[1], base, weights).spec.vocab_size == 50
