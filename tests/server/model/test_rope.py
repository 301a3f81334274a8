from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3TextConfig, LlamaConfig, Phi3Config

from support.models import FAMILIES, MAX_CONTEXT
from support.oracle import Oracle
from turret_server.errors import ConfigError
from turret_server.model import rope
from turret_server.model.arena import Arena
from turret_server.model.load import load_model
from turret_server.model.rope import ContextLength, context_length
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler

CPU = torch.device("cpu")
HALF = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, **HALF}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def note(rope_type: str) -> str:
    return f", beyond which its rotary embedding ({rope_type}) would change for the whole batch"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=900), ContextLength(900)),
        (
            LlamaConfig(
                max_position_embeddings=900,
                rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
            ),
            ContextLength(900),
        ),
        (
            LlamaConfig(max_position_embeddings=900, rope_parameters=DYNAMIC),
            ContextLength(900, note("dynamic")),
        ),
        (
            LlamaConfig(
                max_position_embeddings=900,
                rope_parameters={**LONGROPE, "original_max_position_embeddings": 300},
            ),
            ContextLength(300, note("longrope")),
        ),
        (FAMILIES["phi3-longrope"], ContextLength(MAX_CONTEXT, note("longrope"))),
        # As Phi-3 is published: the length beside the factors.
        (
            Phi3Config(
                max_position_embeddings=900,
                original_max_position_embeddings=300,
                rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            ),
            ContextLength(300, note("longrope")),
        ),
        # Without the length, that of the context.
        (
            LlamaConfig(max_position_embeddings=900, rope_parameters=LONGROPE),
            ContextLength(900, note("longrope")),
        ),
        # The types of layer of a multimodal model's language model have parameters of their own.
        (
            Gemma3Config(
                text_config=Gemma3TextConfig(
                    max_position_embeddings=900,
                    rope_parameters={
                        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                        "full_attention": DYNAMIC,
                    },
                ).to_dict()
            ),
            ContextLength(900, note("dynamic")),
        ),
    ],
)
def test_the_context_ends_where_frequencies_change(config, expected):
    assert context_length(config, None) == expected
    assert context_length(config, expected.tokens) == expected
    assert context_length(config, 200) == ContextLength(200, " (--max-context)")
    refused = f"--max-context {expected.tokens + 1}: the model's context has {expected.tokens} tokens"
    with pytest.raises(ConfigError) as error:
        context_length(config, expected.tokens + 1)
    assert str(error.value) == f"{refused}{expected.note}; give at most {expected.tokens}"


@pytest.fixture(params=["longrope", "dynamic"])
def base(request, base_of, tmp_path):
    if request.param == "longrope":
        return base_of("phi3-longrope")
    folder = shutil.copytree(base_of("llama"), tmp_path / "dynamic")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": {**DYNAMIC, "factor": 8.0}}))
    return folder


def test_up_to_there_every_token_is_that_of_transformers_whoever_shares_the_batch(base, tmp_path):
    random = torch.Generator().manual_seed(3)
    tokens = torch.randint(50, 320, (MAX_CONTEXT + 1,), generator=random).tolist()
    loaded = load_model(str(base), device=CPU, dtype=torch.float32, cache=tmp_path)
    assert loaded.context.tokens == MAX_CONTEXT
    runner = ModelRunner(loaded, Arena(loaded.base, 1 << 22, dtype=loaded.dtype, device=CPU), None, Sampler())
    runner.check()
    found_TV, _ = runner._all_logits([tokens[:9], tokens[:MAX_CONTEXT]])
    oracle = Oracle(base, {})
    for part_TV, length in ((found_TV[:9], 9), (found_TV[9:], MAX_CONTEXT)):
        [expected_TV] = oracle.logits(None, [(tokens[:1], tokens[1:length])])
        torch.testing.assert_close(part_TV[:-1], expected_TV, rtol=0, atol=1e-4)
    # One token more, and transformers computes all of them otherwise.
    [expected_TV] = oracle.logits(None, [(tokens[:1], tokens[1:])])
    assert (found_TV[9:] - expected_TV).abs().max() > 0.01


def test_a_longer_context_is_refused_before_weights_are_read(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ConfigError, match=r"^--max-context 257: .* 256 tokens, beyond which its rotary"):
        load_model(str(folder), device=CPU, dtype=torch.float32, cache=tmp_path, max_context=MAX_CONTEXT + 1)


def test_types_that_change_are_fixed_and_others_stay():
    model = nn.Module()
    types = {"one": "dynamic", "other": "yarn", "layers": {"full": "longrope", "sliding": "linear"}}
    for name, rope_type in types.items():
        model.add_module(name, nn.Module())
        model.get_submodule(name).rope_type = rope_type
    rope.fix(model)
    assert {name: model.get_submodule(name).rope_type for name in types} == {
        "one": "default",
        "other": "yarn",
        "layers": {"full": "default", "sliding": "linear"},
    }
