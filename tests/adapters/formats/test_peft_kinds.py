"""The rows of every kind, put into the formula of `Part`, give what peft's own modules give."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    MultitaskPromptTuningConfig,
    VeraConfig,
)

from support.peft_modules import TASK, adalora, ia3, linear, ln, lora, tokens, vera
from turret_adapters.formats.kinds import lora as formats_lora
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, Method, ModuleKind, Part, PrefixKind

A, B, GAIN, INPUT_GAIN, BIAS, WEIGHT, TOKENS, _HEAD = Part
NEOX = ["query_key_value", "dense_4h_to_h"]
# family, config, and the parts that must be found
CASES: dict[str, tuple[str, Callable[[], Any], set[Part]]] = {
    "lora, biased base": ("qwen2", lora(target_modules=["q_proj", "o_proj"]), {A, B}),
    "lora, head": ("llama", lora(target_modules=["q_proj", "lm_head"]), {A, B}),
    "lora, embedding": ("llama", lora(target_modules=["q_proj", "embed_tokens"], use_rslora=True), {A, B}),
    "lora, rank 1": ("llama", lora(target_modules=["q_proj", "embed_tokens", "lm_head"], r=1), {A, B}),
    "lora, both, tied": ("llama-tied", lora(target_modules=["embed_tokens", "lm_head"]), {A, B}),
    "lora, embedding by regex": ("llama", lora(target_modules=r".*(embed_tokens|lm_head|1.*q_proj)"), {A, B}),
    "lora, other names": ("neox", lora(target_modules=["embed_in", "lm_head"]), {A, B}),
    "lora, ranks of the head": (
        "llama",
        lora(
            target_modules=["q_proj", "lm_head", "embed_tokens"],
            rank_pattern={"lm_head": 7, "embed_tokens": 2},
        ),
        {A, B},
    ),
    "lora, conv1d": ("gpt2", lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), {A, B}),
    "dora": ("llama", lora(target_modules="all-linear", use_dora=True), {A, B, GAIN}),
    "dora, biased base": ("qwen2", lora(target_modules=["q_proj", "o_proj"], use_dora=True), {A, B, GAIN}),
    "dora, rslora, head": (
        "llama",
        lora(target_modules=["lm_head", "up_proj"], use_dora=True, use_rslora=True),
        {A, B, GAIN},
    ),
    "dora, biased head": ("phi", lora(target_modules=["lm_head", "fc1"], use_dora=True), {A, B, GAIN}),
    "dora, conv1d": (
        "gpt2",
        lora(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True),
        {A, B, GAIN},
    ),
    "dora, trained biases": (
        "qwen2",
        lora(target_modules=["q_proj", "o_proj"], use_dora=True, bias="lora_only"),
        {A, B, GAIN, BIAS},
    ),
    "dora, embedding": (
        "llama",
        lora(target_modules=["q_proj", "embed_tokens"], use_dora=True),
        {A, B, GAIN},
    ),
    "dora, embedding and head, tied": (
        "llama-tied",
        lora(target_modules=["embed_tokens", "lm_head"], use_dora=True, use_rslora=True),
        {A, B, GAIN},
    ),
    "lora_bias": ("qwen2", lora(target_modules=["q_proj", "o_proj"], lora_bias=True), {A, B, BIAS}),
    "lora_bias, head": ("phi", lora(target_modules=["lm_head"], lora_bias=True), {A, B, BIAS}),
    "lora_bias, trained biases": (
        "qwen2",
        lora(target_modules=["q_proj", "o_proj"], lora_bias=True, bias="lora_only"),
        {A, B, BIAS},
    ),
    "lora_only, unbiased": ("llama", lora(bias="lora_only"), {A, B}),
    "lora_only": ("neox", lora(target_modules=NEOX, bias="lora_only"), {A, B, BIAS}),
    "all biases": ("neox", lora(target_modules=NEOX, bias="all"), {A, B, BIAS}),
    "all biases, biased head": ("phi", lora(bias="all"), {A, B, BIAS}),
    "all biases, adapted head": ("phi", lora(target_modules=["lm_head"], bias="all"), {A, B, BIAS}),
    "whole head": ("llama", lora(modules_to_save=["lm_head"]), {A, B, WEIGHT}),
    "whole biased head": ("phi", lora(modules_to_save=["lm_head"]), {A, B, WEIGHT, BIAS}),
    "whole head and embedding": ("llama", lora(modules_to_save=["lm_head", "embed_tokens"]), {A, B, WEIGHT}),
    "whole head, tied": ("llama-tied", lora(modules_to_save=["lm_head"]), {A, B, WEIGHT}),
    "whole embedding, tied": ("llama-tied", lora(modules_to_save=["embed_tokens"]), {A, B, WEIGHT}),
    "whole norms": ("llama", lora(modules_to_save=["norm"]), {A, B, WEIGHT}),
    "one whole norm": ("llama", lora(modules_to_save=["1.input_layernorm", "absent"]), {A, B, WEIGHT}),
    "whole norms with biases": (
        "neox",
        lora(target_modules=NEOX, modules_to_save=["final_layer_norm", "lm_head"]),
        {A, B, WEIGHT, BIAS},
    ),
    "saved, so not targeted": (
        "llama",
        lora(target_modules=r".*(lm_head|q_proj)", modules_to_save=["lm_head"]),
        {A, B, WEIGHT},
    ),
    "tokens": ("llama", lora(trainable_token_indices=[7, 60, 0, 5]), {A, B, TOKENS}),
    "tokens by name": (
        "neox",
        lora(target_modules=NEOX, trainable_token_indices={"embed_in": [3]}),
        {A, B, TOKENS},
    ),
    "tokens, tied": ("llama-tied", lora(trainable_token_indices=[7, 60, 0, 5]), {A, B, TOKENS}),
    "tokens of both, tied": (
        "llama-tied",
        lora(trainable_token_indices={"embed_tokens": [7, 2], "lm_head": [7, 2]}),
        {A, B, TOKENS},
    ),
    "tokens of each, tied": (
        "llama-tied",
        lora(trainable_token_indices={"embed_tokens": [7, 2], "lm_head": [2, 7]}),
        {A, B, TOKENS},
    ),
    "tokens of the head, tied": (
        "llama-tied",
        lora(trainable_token_indices={"lm_head": [7, 2]}),
        {A, B, TOKENS},
    ),
    "tokens of each": (
        "llama",
        lora(trainable_token_indices={"embed_tokens": [7, 2], "lm_head": [30, 1, 2]}),
        {A, B, TOKENS},
    ),
    "tokens, adapted head": (
        "llama",
        lora(trainable_token_indices=[7, 2], target_modules=["lm_head"], use_dora=True),
        {A, B, GAIN, TOKENS},
    ),
    "tokens, adapted head, tied": (
        "llama-tied",
        lora(trainable_token_indices=[7, 2], target_modules=["q_proj", "lm_head"]),
        {A, B, TOKENS},
    ),
    "tokens, head with lora_bias, tied": (
        "llama-tied",
        lora(trainable_token_indices=[7, 2], target_modules=["lm_head"], lora_bias=True),
        {A, B, BIAS, TOKENS},
    ),
    "adalora, tokens, adapted head, tied": (
        "llama-tied",
        adalora(trainable_token_indices=[7, 2], target_modules=["lm_head"]),
        {A, B, TOKENS},
    ),
    "lora, embedding, tied": ("llama-tied", lora(target_modules=["q_proj", "embed_tokens"]), {A, B}),
    **{
        f"tying, {name}": ("llama-tied", lora(**fields, ensure_weight_tying=True), {A, B, *more})
        for name, fields, more in [
            ("neither", {}, ()),
            ("embedding adapted", {"target_modules": ["q_proj", "embed_tokens"]}, ()),
            ("head adapted", {"target_modules": ["q_proj", "lm_head"]}, ()),
            ("adapted by regex", {"target_modules": r"(.*q_proj|.*embed_tokens)"}, ()),
            ("embedding whole", {"modules_to_save": ["embed_tokens"]}, (WEIGHT,)),
            ("head whole", {"modules_to_save": ["lm_head", "norm"]}, (WEIGHT,)),
            ("tokens", {"trainable_token_indices": [5, 2]}, (TOKENS,)),
        ]
    },
    "tying, untied base": (
        "llama",
        lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
        {A, B},
    ),
    "ia3": ("llama", ia3(), {GAIN, INPUT_GAIN}),
    "ia3, biased base": ("qwen2", ia3(target_modules=["k_proj"], feedforward_modules=[]), {GAIN, BIAS}),
    "ia3, biases everywhere": (
        "neox",
        ia3(target_modules=NEOX, feedforward_modules=["dense_4h_to_h"]),
        {GAIN, INPUT_GAIN, BIAS},
    ),
    "ia3, regexes": (
        "llama",
        ia3(target_modules=r".*\.[02].*(q_proj|up_proj)", feedforward_modules=r".*up_proj"),
        {GAIN, INPUT_GAIN},
    ),
    "ia3, head": ("llama", ia3(target_modules=["lm_head", "k_proj"], feedforward_modules=[]), {GAIN}),
    "ia3, biased head": ("phi", ia3(target_modules=["lm_head"], feedforward_modules=[]), {GAIN, BIAS}),
    "ia3, feed-forward head": (
        "phi",
        ia3(target_modules=["lm_head"], feedforward_modules=["lm_head"], modules_to_save=["final_layernorm"]),
        {INPUT_GAIN, WEIGHT, BIAS},
    ),
    "adalora": ("llama", adalora(target_modules=["q_proj", "down_proj", "lm_head"]), {A, B}),
    "adalora, no alpha": ("llama", adalora(lora_alpha=0, use_rslora=True), {A, B}),
    "adalora, negative alpha": ("llama", adalora(lora_alpha=-3), {A, B}),
    "adalora, biases": ("qwen2", adalora(bias="all", modules_to_save=["lm_head"]), {A, B, BIAS, WEIGHT}),
    "adalora, tokens": ("llama", adalora(trainable_token_indices=[9, 2]), {A, B, TOKENS}),
    "vera": ("llama", vera(), {A, B}),
    "vera, head": ("llama", vera(target_modules=["q_proj", "lm_head"]), {A, B}),
    "vera, layers": ("llama", vera(target_modules=["q_proj"], layers_to_transform=[1]), {A, B}),
    "vera, all biases": ("qwen2", vera(bias="all"), {A, B, BIAS}),
    "vera_only": ("qwen2", vera(bias="vera_only"), {A, B, BIAS}),
    "trainable_tokens": ("llama", tokens(), {TOKENS}),
    "trainable_tokens, tied": ("llama-tied", tokens(), {TOKENS}),
    "trainable_tokens, tied, by name": ("llama-tied", tokens("embed_tokens"), {TOKENS}),
    "trainable_tokens, regex": ("neox", tokens(target_modules=r".*embed_in"), {TOKENS}),
    "trainable_tokens, head": ("llama", tokens("lm_head"), {TOKENS}),
    "trainable_tokens, tied head": ("llama-tied", tokens("lm_head"), {TOKENS}),
    "trainable_tokens, both": ("llama", tokens("embed_tokens", "lm_head", init_weights=False), {TOKENS}),
    "ln_tuning": ("llama", ln("norm", "input_layernorm"), {WEIGHT}),
    "ln_tuning, biases": ("neox", ln("final_layer_norm", "post_attention_layernorm"), {WEIGHT, BIAS}),
    "ln_tuning, head": ("llama", ln("norm", modules_to_save=["lm_head"]), {WEIGHT}),
}


@pytest.mark.parametrize(("family", "config", "parts"), CASES.values(), ids=CASES.keys())
def test_rows_give_what_peft_gives(
    *,
    family: str,
    config: Callable[[], Any],
    parts: set[Part],
    save: Callable,
    read_as_peft: Callable,
    base_of_family: Callable[[str], BaseSpec],
) -> None:
    base = base_of_family(family)
    found = read_as_peft(save(config(), family=family, seed=3).folder, family)
    assert {part for delta in found.deltas.values() for part in delta.rows} == parts
    assert list(found.deltas) == [name for name in base.modules if name in found.deltas]
    assert found.spec.method.name == config().peft_type.value
    assert (found.spec.prefix, found.spec.num_tasks, found.tasks) == (None, 0, ())
    ranks = [
        rows[A].shape[base.modules[name].kind is ModuleKind.EMBEDDING]
        for name, rows in ((name, delta.rows) for name, delta in found.deltas.items())
        if A in rows
    ]
    assert found.spec.max_rank == max(ranks, default=0)
    widths = {
        width
        for shape in base.of_kind(ModuleKind.LINEAR).values()
        for width in (shape.in_features, shape.out_features)
    }
    assert all(group.width <= max(*widths, found.spec.max_rank) for group in found.spec.rows)
    assert all(rows.is_contiguous() for delta in found.deltas.values() for rows in delta.rows.values())


def test_a_pruned_adalora(save: Callable, read_as_peft: Callable) -> None:
    # As RankAllocator leaves it: the last layer's is gone.
    kept = [[True] * 5, [True, False, True, False, False], [False] * 5]
    for alpha in (3, 0):
        config = adalora(lora_alpha=alpha)()
        config.rank_pattern = {
            f"model.layers.{i}.self_attn.q_proj.lora_E": mask for i, mask in enumerate(kept)
        }
        found = read_as_peft(save(config, seed=3).folder)
        assert [delta.rows[A].shape[0] for delta in found.deltas.values()] == [5, 2]
        assert found.spec.max_rank == 5


def test_a_large_modules_norms_are_computed_in_parts(
    save: Callable, read_as_peft: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(lora(target_modules=["lm_head", "embed_tokens", "up_proj"], use_dora=True)(), seed=3)
    monkeypatch.setattr(formats_lora, "DORA_ROWS", 30)
    read_as_peft(saved.folder)


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(target_modules=["q_proj"], total_step=9),
        VeraConfig(target_modules=["q_proj"]),
        MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_absent_fields_have_the_defaults_of_each_kind_in_peft(
    config: Any, save: Callable, base: BaseSpec, weights: BaseWeights
) -> None:
    path = save(config, seed=3).folder / "adapter_config.json"
    expected = read_adapter(path.parent, base, weights)
    given = ("peft_type", "target_modules", "num_virtual_tokens")
    fields = {name: value for name, value in json.loads(path.read_text()).items() if name in given}
    path.write_text(json.dumps(fields))

    found = read_adapter(path.parent, base, weights)

    assert found.spec.rows == expected.spec.rows
    assert (found.spec.max_rank, len(found.tasks)) == (expected.spec.max_rank, len(expected.tasks))
    assert {name: delta.scaling for name, delta in found.deltas.items()} == {
        name: delta.scaling for name, delta in expected.deltas.items()
    }


def test_an_activated_lora(save: Callable, load: Callable, base: BaseSpec, weights: BaseWeights) -> None:
    saved = save(lora(alora_invocation_tokens=[5, 6, 5], target_modules=["q_proj", "lm_head"])(), seed=3)

    found = read_adapter(saved.folder, base, weights)

    assert found.spec.invocation_tokens == (5, 6, 5)
    loaded = load(saved.folder)
    for name, delta in found.deltas.items():
        x_1NI = torch.randn(1, 4, base.modules[name].in_features)
        with torch.no_grad():
            theirs = loaded.base_model.model.get_submodule(name)(x_1NI, alora_offsets=[4])[0]
        y_NO = linear(base.modules[name], delta, weights.weight(name), None, x_1NI[0])
        torch.testing.assert_close(y_NO, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_multitask_prompt(dtype: torch.dtype, save: Callable, base: BaseSpec, weights: BaseWeights) -> None:
    config = MultitaskPromptTuningConfig(**TASK, num_virtual_tokens=5, num_tasks=3, num_ranks=2)
    saved = save(config, seed=3, dtype=dtype)

    found = read_adapter(saved.folder, base, weights)

    spec = found.spec
    assert (spec.method, spec.num_tasks, spec.rows) == (Method.MULTITASK_PROMPT_TUNING, 3, ())
    assert (found.deltas, found.prefix_kv, found.prompt_embeddings) == ({}, None, None)
    assert spec.num_parameters == 5 * 32 + 3 * 2 * (5 + 32)
    assert [task.spec.revision for task in found.tasks] == [f"{spec.revision}#{task}" for task in range(3)]
    assert [task.spec.revision for task in found.tasks] == spec.resident_revisions
    encoder = saved.model.prompt_encoder["default"].float()
    for index, task in enumerate(found.tasks):
        assert (task.spec.num_tasks, task.spec.method, task.spec.prefix) == (0, spec.method, spec.prefix)
        assert task.spec.prefix is not None
        assert (task.spec.prefix.kind, task.spec.num_virtual_tokens) == (PrefixKind.EMBEDDING, 5)
        with torch.no_grad():
            expected_NE = encoder(torch.arange(5)[None], torch.tensor([index]))[0]
        torch.testing.assert_close(task.prompt_embeddings, expected_NE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_what_is_computed_changes_its_dtype(
    dtype: torch.dtype, save: Callable, base_of_family: Callable, weights_of_family: Callable
) -> None:
    base, weights = base_of_family("qwen2"), weights_of_family("qwen2")
    dora = save(lora(use_dora=True, modules_to_save=["norm"])(), family="qwen2", dtype=dtype)
    found = read_adapter(dora.folder, base, weights).deltas
    rows = found["model.layers.0.self_attn.q_proj"].rows
    assert {part: tensor.dtype for part, tensor in rows.items()} == {A: dtype, B: dtype, GAIN: torch.float32}
    assert found["model.norm"].rows[WEIGHT].dtype == dtype

    folded = save(vera()(), family="qwen2", dtype=dtype)
    rows = read_adapter(folded.folder, base, weights).deltas["model.layers.0.self_attn.q_proj"].rows
    assert {part: tensor.dtype for part, tensor in rows.items()} == {A: dtype, B: torch.float32}


def test_modules_of_one_width_share_veras_rows(save: Callable, base: BaseSpec, weights: BaseWeights) -> None:
    deltas = read_adapter(save(vera()()).folder, base, weights).deltas
    assert len(deltas) == 6
    assert len({delta.rows[A].data_ptr() for delta in deltas.values()}) == 2
