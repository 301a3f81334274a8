"""Multimodal checkpoints as language models."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, modeling_utils

from support.models import MULTIMODAL
from support.oracle import Oracle
from turret_server.errors import UnsupportedModelError
from turret_server.model.arena import Arena
from turret_server.model.classes import left_out, model_class
from turret_server.model.describe import CheckpointWeights
from turret_server.model.load import ModelWeights, load_model
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler

CPU = torch.device("cpu")
PROMPT, ANSWER = list(range(60, 100)), list(range(120, 150))
TOWERS = {
    "gemma3-vision": ("model.vision_tower", "model.multi_modal_projector"),
    "mistral3": ("model.vision_tower", "model.multi_modal_projector"),
    "qwen2.5-vl": ("model.visual",),
    "qwen3-vl": ("model.visual",),
}

each_family = pytest.mark.parametrize("family", MULTIMODAL)


def load(model, cache):
    return load_model(str(model), device=CPU, dtype=torch.float32, cache=cache)


@each_family
def test_a_multimodal_checkpoint_computes_text_as_transformers_does_with_all_of_it(family, base_of, tmp_path):
    [expected_TV] = Oracle(base_of(family), {}).logits(None, [(PROMPT, ANSWER)])
    first, second = load(base_of(family), tmp_path), load(base_of(family), tmp_path)  # and from its copy
    for loaded in (first, second):
        arena = Arena(loaded.base, 1 << 22, dtype=loaded.dtype, device=CPU)
        runner = ModelRunner(loaded, arena, None, Sampler())
        runner.check()
        logits_TV, _ = runner._all_logits([ANSWER, PROMPT + ANSWER])
        found_TV = logits_TV[len(ANSWER) + len(PROMPT) - 1 : -1]
        assert expected_TV.std() > 1
        torch.testing.assert_close(found_TV, expected_TV, rtol=0, atol=1e-4)


@each_family
def test_its_towers_are_left_out(family, base_of, quantised_cache):
    loaded = load(base_of(family), quantised_cache)
    assert loaded.base.left_out == left_out(loaded.model) == TOWERS[family]
    for path in TOWERS[family]:
        with pytest.raises(AttributeError):
            loaded.model.get_submodule(path)
    assert all(name.startswith(("model.language_model.", "lm_head")) for name in loaded.base.modules)


class Recording:
    """A safetensors file that notes which tensors are read."""

    def __init__(self, read: set[str], *arguments, **options) -> None:
        self._file = safe_open(*arguments, **options)
        self._read = read

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def get_slice(self, key):
        found = self._file.get_slice(key)

        def read(index):
            self._read.add(key)
            return found[index]

        class Slice(SimpleNamespace):
            __getitem__ = staticmethod(read)

        return Slice(get_shape=found.get_shape, get_dtype=found.get_dtype)


@each_family
def test_their_weights_are_not_read(family, base_of, tmp_path, monkeypatch, caplog):
    read: set[str] = set()
    monkeypatch.setattr(
        modeling_utils, "safe_open", lambda *arguments, **options: Recording(read, *arguments, **options)
    )
    load(base_of(family), tmp_path)
    with safe_open(base_of(family) / "model.safetensors", "pt") as tensors:
        in_file = set(tensors.keys())
    towers = {key for key in in_file if any(f"{path.rpartition('.')[2]}." in key for path in TOWERS[family])}
    assert len(towers) > 10
    assert read == in_file - towers
    assert caplog.messages == []


@each_family
def test_validation_reads_the_weights_of_its_checkpoint(family, base_of, quantised_cache):
    loaded = load(base_of(family), quantised_cache)
    theirs = ModelWeights(loaded.model, loaded.ops)
    ours = CheckpointWeights(str(base_of(family)), loaded.base)
    for name in ("model.language_model.layers.1.self_attn.q_proj", "lm_head"):
        own, other = ours.weight(name), theirs.weight(name)
        assert torch.linalg.vector_norm(own - other) <= 0.15 * torch.linalg.vector_norm(other)


def test_a_quantised_copy_is_of_the_class_of_its_checkpoint(base_of, tmp_path):
    load(base_of("qwen2.5-vl"), tmp_path)
    [copy] = (tmp_path / "nf4").iterdir()
    said = json.loads((copy / "config.json").read_text())["architectures"]
    assert said == ["Qwen2_5_VLForConditionalGeneration"]


def test_a_model_of_text_alone_has_its_own_class():
    assert model_class(LlamaConfig()) is LlamaForCausalLM
    with torch.device("meta"):
        assert left_out(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))) == ()


def test_a_model_that_generates_no_text_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"t5 models .* no causal language model") as refused:
        model_class(T5Config())
    assert refused.value.metadata == {"model": "t5"}
