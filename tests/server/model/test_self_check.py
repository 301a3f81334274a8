from __future__ import annotations

import pytest
import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

from support.models import VOCAB_SIZE
from support.tokenizers import save_tokenizer
from turret_server.engine.step import DeviceLostError
from turret_server.errors import UnsupportedModelError
from turret_server.kernels import ReferenceOps
from turret_server.model.arena import Arena
from turret_server.model.context import current_step
from turret_server.model.load import load_model
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler

CPU = torch.device("cpu")


def load(folder, cache, num_pages=8, dtype=torch.float32):
    loaded = load_model(str(folder), device=CPU, dtype=dtype, cache=cache, ops=ReferenceOps())
    one = Arena(loaded.base, 1, dtype=dtype, device=CPU)
    arena = Arena(loaded.base, one.page_bytes * num_pages, dtype=dtype, device=CPU)
    assert arena.num_pages == num_pages
    return ModelRunner(loaded, arena, None, Sampler())


def alter(runner, change):
    """Changes what a norm returns, on all ways."""
    norm = runner._loaded.model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda *arguments: change(arguments[-1]))


def failing(error):
    def fail(_):
        raise error

    return fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_pages", [1, 2, 3, 8])
def test_a_model_that_is_computed_as_by_transformers_passes(base_of, quantised_cache, num_pages, dtype):
    runner = load(base_of("llama"), quantised_cache, num_pages, dtype)
    runner.check()
    assert runner._loaded.model.config._attn_implementation == "turret"


def test_attention_that_looks_at_later_tokens_is_found(base_of, quantised_cache):
    """Past the gate, as with a family that it does not know."""
    runner = load(base_of("llama"), quantised_cache)
    for layer in runner._loaded.model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(
        UnsupportedModelError, match=r"llama models.*a prompt's first step, .* differ.*standard"
    ) as refused:
        runner.check()
    assert refused.value.metadata["model"] == "llama"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_depends_on_the_company_is_found(base_of, quantised_cache, dtype):
    runner = load(base_of("llama"), quantised_cache, dtype=dtype)
    alter(runner, lambda y: y + y.mean(1, keepdim=True))
    with pytest.raises(UnsupportedModelError, match="of a prompt's first step, beside another, differ"):
        runner.check()


def test_what_depends_on_where_a_prompt_is_cut_is_found(base_of, quantised_cache):
    runner = load(base_of("llama"), quantised_cache)
    alter(runner, lambda y: y * 1.5 if y.shape[1] == 6 else y)  # the second step: 2 of one, 4 of the other
    with pytest.raises(UnsupportedModelError, match="of a prompt's second step, beside another, differ"):
        runner.check()


def test_layers_that_call_attention_twice_are_found(tmp_path):
    """The second call would overwrite the keys and values that later tokens need of the first."""
    config = DiffLlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    DiffLlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    said = "diffllama models .*: of 2 layers, 2 call the attention function, 4 times; use"
    with pytest.raises(UnsupportedModelError, match=said):
        load(tmp_path / "model", tmp_path / "cache").check()


def test_what_depends_on_the_server_alone_is_found(base_of, quantised_cache):
    runner = load(base_of("llama"), quantised_cache)
    config = runner._loaded.model.config

    alter(runner, lambda y: y * 1.05 if config._attn_implementation == "turret" else y)
    with pytest.raises(UnsupportedModelError, match=r"of a prompt's first step, .* differ"):
        runner.check()


def test_logits_that_are_not_finite_are_found(base_of, quantised_cache):
    runner = load(base_of("llama"), quantised_cache)
    alter(runner, lambda y: y * float("nan"))
    with pytest.raises(UnsupportedModelError, match=r"are not finite in float32; use another --dtype, such"):
        runner.check()


def test_a_model_that_fails_is_refused_by_name(base_of, quantised_cache):
    runner = load(base_of("llama"), quantised_cache)

    alter(runner, failing(RuntimeError("shapes do not match")))
    expected = "llama models are not supported: a first prompt failed with RuntimeError: shapes do not match"
    with pytest.raises(UnsupportedModelError, match=expected):
        runner.check()
    assert runner._loaded.model.config._attn_implementation == "turret"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), MemoryError),
        (torch.OutOfMemoryError(), MemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError),
        (torch.AcceleratorError("lost"), DeviceLostError),
    ],
    ids=repr,
)
def test_what_the_machine_lacks_is_not_the_models_fault(base_of, quantised_cache, error, expected):
    runner = load(base_of("llama"), quantised_cache)
    alter(runner, failing(error))
    with pytest.raises(expected):
        runner.check()


def test_prompts_are_as_long_as_there_is_room_for(base_of, quantised_cache):
    beside = {(0, 1, 4), (0, 2, 6), (0, 7)}
    for num_pages, expected in ((1, {(0, 3), (0, 4), (0, 7)}), (2, beside), (8, beside)):
        runner = load(base_of("llama"), quantised_cache, num_pages)
        computed = []
        alter(runner, lambda _, computed=computed: computed.append(current_step().attention.query_bounds))
        runner.check()
        assert {tuple(each.tolist()) for each in computed} == expected
