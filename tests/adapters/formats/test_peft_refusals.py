"""Every adapter whose config is not served is refused by name, with the right error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.peft_types import PeftType

from support.refusals import NO_WEIGHTS, NoWeights, refused
from turret_adapters.errors import AdapterBaseError, AdapterFormatError
from turret_adapters.formats import targets
from turret_adapters.formats.files import MAX_TENSORS_BYTES
from turret_adapters.formats.kinds import CONVERTIBLE, KINDS, lora, prompts, vera
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, ModuleKind

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
MANY = {f"p{index}": 1 for index in range(5000)}


FIELDS: list[tuple[str, str, Any]] = [
    ("LORA", "target_parameters", ["experts.gate_up_proj"]),
    ("LORA", "layer_replication", [[0, 2], [1, 3]]),
    ("LORA", "use_qalora", True),
    ("LORA", "use_bdlora", {"nblocks": 2}),
    ("LORA", "megatron_config", {"a": 1}),
    ("LORA", "arrow_config", {"top_k": 2}),
    ("LORA", "kasa_config", {"beta": 1}),
    ("LORA", "monteclora_config", {"num_samples": 4}),
    ("LORA", "velora_config", {"num_groups": 4}),
    ("LORA", "ensure_weight_tying", 1),
    *[
        ("LORA", "init_lora_weights", value)
        for value in ("pissa", "PiSSA", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new", 1)
    ],
    ("LORA", "task_type", "SEQ_CLS"),
    ("LORA", "task_type", 7),
    ("LORA", "a_field_of_the_future", True),
    ("LORA", "a_field_of_the_future", 0),
    ("LORA", "a_field_of_the_future", {"a": "b" * 5000}),
    ("LORA", "use_rslora", 1),
    ("LORA", "use_rslora", "yes"),
    *[("LORA", "r", value) for value in (0, -1, 513, True, 4.0, "4", None)],
    *[("LORA", "lora_alpha", value) for value in (None, "8", True, 1e7, -1e7, [8])],
    *[("LORA", "rank_pattern", value) for value in ([], "q_proj", MANY, {"q_proj": 0}, {"q_proj": 2.0})],
    *[("LORA", "alpha_pattern", value) for value in ([], 3, {"q_proj": "8"}, {"q_proj": None})],
    ("LORA", "rank_pattern", {"(": 2}),
    ("LORA", "alpha_pattern", {"q_proj": 2, "[": 2}),
    *[("LORA", "target_modules", value) for value in (None, [], "", {}, [1], ["q_proj", None], 3)],
    ("LORA", "target_modules", "*"),
    *[("LORA", "exclude_modules", value) for value in ([1], ["up_proj", 1])],
    ("LORA", "exclude_modules", "("),
    *[("LORA", "layers_to_transform", value) for value in ("1", [True], [1.0], [1, True], {"a": 1})],
    *[("LORA", "layers_pattern", value) for value in ("layers", ["layers"], ["("], [1], 5)],
    *[("LORA", field, value) for field in ("use_dora", "lora_bias") for value in (1, "yes", [1])],
    ("LORA", "bias", "some"),
    ("LORA", "bias", "vera_only"),
    *[
        ("LORA", "alora_invocation_tokens", value)
        for value in (True, 5, "x", [-1], [True], [5.0], [2**31], [5, -1], [5, True], [1] * 4097)
    ],
    *[
        ("LORA", "modules_to_save", value)
        for value in ("lm_head", [1], ["lm_head", 1], ["("], ["lm_head", ""], {"a": 1})
    ],
    *[("LORA", "modules_to_save", [value]) for value in ("q_proj", "model.layers.0.mlp.up_proj", "j")],
    *[
        ("LORA", "trainable_token_indices", value)
        for value in (True, 5, "x", [61], [-1], [True], [1.0], ["1"], [3, 61], [3, True], [3, 4, 3])
    ],
    *[
        ("LORA", "trainable_token_indices", value)
        for value in (
            {"norm": [1]},
            {"q_proj": [1]},
            {"absent": [1]},
            {"embed_tokens": []},
            {"embed_tokens": 3},
            {"embed_tokens": [1], "lm_head": 3},
            {"embed_tokens": [1], "tokens": [2]},
            {"lm_head": [61]},
        )
    ],
    ("LORA", "target_modules", ["q_proj", "norm"]),
    *[(method, "target_modules", ["q_proj", "embed_tokens"]) for method in ("ADALORA", "IA3", "VERA")],
    ("LN_TUNING", "target_modules", ["norm", "q_proj"]),
    ("LN_TUNING", "target_modules", "all-linear"),
    ("LN_TUNING", "modules_to_save", "lm_head"),
    *[
        ("TRAINABLE_TOKENS", "token_indices", value)
        for value in (None, [], 3, "x", [61], [-1], [True], [1.0], [3, 3], {"embed_tokens": [3]})
    ],
    *[("TRAINABLE_TOKENS", "target_modules", value) for value in ([], ".*norm", ["q_proj"], ["norm"], 3)],
    *[("IA3", "feedforward_modules", value) for value in (None, 3, [1], "(")],
    ("IA3", "bias", "all"),
    ("VERA", "save_projection", False),
    ("VERA", "save_projection", 1),
    *[("VERA", "r", value) for value in (0, 1025, None)],
    ("VERA", "bias", "lora_only"),
    ("VERA", "exclude_modules", ["up_proj"]),
    *[("ADALORA", "init_r", value) for value in (0, 513, None)],
    *[
        ("ADALORA", "rank_pattern", value)
        for value in (
            [],
            {f"{Q0.removeprefix('base_model.model.')}.lora_E": [True] * 3},
            {f"{Q0.removeprefix('base_model.model.')}.lora_E": [1, 1, 1, 1]},
            {f"{Q0.removeprefix('base_model.model.')}.lora_E": [True, True, True, 1]},
            {f"{Q0.removeprefix('base_model.model.')}.lora_E": 4},
            {f"{Q0.removeprefix('base_model.model.')}.lora_A": [True] * 4},
            {"model.layers.0.self_attn.k_proj.lora_E": [True] * 4},
        )
    ],
    *[("ADALORA", field, True) for field in ("use_dora", "lora_bias")],
    ("ADALORA", "lora_alpha", "8"),
    *[
        ("MULTITASK_PROMPT_TUNING", field, value)
        for field in ("num_tasks", "num_ranks")
        for value in (0, 1025, "3", None)
    ],
    *[
        (method, field, value)
        for method in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
        for field, value in [
            *[("num_virtual_tokens", value) for value in (None, 0, 4097, 5.0, "5", True)],
            ("num_transformer_submodules", 2),
            ("num_layers", "3"),
            ("token_dim", 0),
            ("num_attention_heads", 2.0),
            ("modules_to_save", ["lm_head"]),
            ("task_type", "SEQ_2_SEQ_LM"),
            ("use_dora", True),
        ]
    ],
]


@pytest.mark.parametrize(
    ("method", "field", "value"), FIELDS, ids=[f"{m}-{f}-{v!r}"[:60] for m, f, v in FIELDS]
)
def test_a_field_that_is_not_served(
    *, method: str, field: str, value: Any, sound: dict[str, Any], base: BaseSpec, tmp_path: Path
) -> None:
    sound[method].fields[field] = value
    refused(sound[method].write(tmp_path), base, AdapterFormatError, "adapter_config.json", field)


LARGEST: list[tuple[str, str, int]] = [
    ("LORA", "r", lora.MAX_RANK),
    ("ADALORA", "init_r", lora.MAX_RANK),
    ("VERA", "r", vera.MAX_RANK),
    ("MULTITASK_PROMPT_TUNING", "num_tasks", prompts.MAX_TASKS),
    ("MULTITASK_PROMPT_TUNING", "num_ranks", prompts.MAX_TASK_RANK),
    *[
        (method, "num_virtual_tokens", prompts.MAX_VIRTUAL_TOKENS)
        for method in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
    ],
]


@pytest.mark.parametrize(("method", "field", "most"), LARGEST)
def test_a_size_is_served_up_to_its_limit(
    *, method: str, field: str, most: int, sound: dict[str, Any], base: BaseSpec, tmp_path: Path
) -> None:
    """Of the largest, only the tensors of this file are not the config's."""
    sound[method].fields[field] = most
    message = refused(sound[method].write(tmp_path), base, AdapterFormatError, "expected shape", str(most))
    assert message.startswith("tensor ")
    sound[method].fields[field] = most + 1
    refused(sound[method].write(tmp_path), base, AdapterFormatError, f"{field!r} to be an integer from 1 to")


def test_invocation_tokens_up_to_the_limits(sound: dict[str, Any], base: BaseSpec, tmp_path: Path) -> None:
    tokens = [0, 2**31 - 1] * (lora.MAX_INVOCATION_TOKENS // 2)
    sound["LORA"].fields["alora_invocation_tokens"] = tokens
    found = read_adapter(sound["LORA"].write(tmp_path), base, NO_WEIGHTS)
    assert list(found.spec.invocation_tokens) == tokens


EMBEDDING = ["q_proj", "embed_tokens"]
COMBINATIONS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True, "lora_bias": True}, "lora_bias"),
    ({"lora_bias": True, "target_modules": EMBEDDING}, "lora_bias"),
    ({"alora_invocation_tokens": [5], "target_modules": EMBEDDING}, "alora_invocation_tokens"),
    ({"alora_invocation_tokens": [5], "use_dora": True}, "use_dora"),
    ({"alora_invocation_tokens": [5], "modules_to_save": ["norm"]}, "modules_to_save"),
    ({"alora_invocation_tokens": [5], "trainable_token_indices": [5]}, "trainable_token_indices"),
    ({"trainable_token_indices": [5], "target_modules": EMBEDDING}, "trainable_token_indices"),
    ({"trainable_token_indices": [5], "modules_to_save": ["embed_tokens"]}, "trainable_token_indices"),
]


@pytest.mark.parametrize(("fields", "named"), COMBINATIONS)
def test_fields_that_are_not_served_together(
    fields: dict[str, Any], named: str, sound: dict[str, Any], base: BaseSpec, tmp_path: Path
) -> None:
    sound["LORA"].fields.update(fields)
    refused(
        sound["LORA"].write(tmp_path), base, AdapterFormatError, "adapter_config.json", f"{named!r} to be"
    )


def test_an_activated_lora_beside_trained_biases(
    sound: dict[str, Any], base_of_family: Callable[[str], BaseSpec], tmp_path: Path
) -> None:
    sound["LORA"].fields.update({"alora_invocation_tokens": [5], "bias": "all"})
    refused(sound["LORA"].write(tmp_path), base_of_family("qwen2"), AdapterFormatError, "'bias'", "'all'")


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"], "trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}},
    ],
)
def test_tokens_of_a_tied_base_whose_head_is_adapted(
    fields: dict[str, Any], sound: dict[str, Any], base_of_family: Callable[[str], BaseSpec], tmp_path: Path
) -> None:
    sound["LORA"].fields.update({"trainable_token_indices": [5], **fields})
    base = base_of_family("llama-tied")
    refused(sound["LORA"].write(tmp_path), base, AdapterFormatError, "trainable_token_indices", "'lm_head'")


def test_tokens_of_a_tied_base_below_dora(
    sound: dict[str, Any], base_of_family: Callable[[str], BaseSpec], tmp_path: Path
) -> None:
    """peft has no bias in its wrapper, and fails."""
    fields = {"trainable_token_indices": [5], "target_modules": ["lm_head"], "use_dora": True}
    sound["LORA"].fields.update(fields)
    base = base_of_family("llama-tied")
    refused(sound["LORA"].write(tmp_path), base, AdapterFormatError, "use_dora", "'lm_head'")


def test_tokens_of_both_modules_of_a_tied_base(
    sound: dict[str, Any], base_of_family: Callable[[str], BaseSpec], tmp_path: Path
) -> None:
    """peft wraps the head twice, and fails."""
    sound["TRAINABLE_TOKENS"].fields["target_modules"] = ["embed_tokens", "lm_head"]
    base = base_of_family("llama-tied")
    refused(sound["TRAINABLE_TOKENS"].write(tmp_path), base, AdapterFormatError, "target_modules", "lm_head")


def test_tokens_of_a_biased_head(
    sound: dict[str, Any], base_of_family: Callable[[str], BaseSpec], tmp_path: Path
) -> None:
    sound["LORA"].fields["trainable_token_indices"] = {"lm_head": [5]}
    refused(
        sound["LORA"].write(tmp_path), base_of_family("phi"), AdapterFormatError, "has a bias", "'lm_head'"
    )


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [("VERA", "r", 1024), ("MULTITASK_PROMPT_TUNING", "num_tasks", 1024)],
)
def test_more_than_memory_holds(
    *, method: str, field: str, value: int, sound: dict[str, Any], base: BaseSpec, tmp_path: Path
) -> None:
    sound[method].fields.update({field: value, "num_virtual_tokens": 4096, "token_dim": None})
    if method == "VERA":
        del sound[method].fields["num_virtual_tokens"], sound[method].fields["token_dim"]
    wide = with_linears(dataclasses.replace(base, hidden_size=8192), in_features=1 << 20)
    refused(sound[method].write(tmp_path), wide, AdapterFormatError, field, str(MAX_TENSORS_BYTES))


@pytest.mark.parametrize(
    ("method", "module", "num_bytes"),
    [
        # 3 layers of q_proj (32 to 48) and down_proj (40 to 32) with rank 4.
        ("VERA", vera, 3 * (32 + 48 + 40 + 32) * 4 * 4),
        # 3 tasks of 5 virtual tokens.
        ("MULTITASK_PROMPT_TUNING", prompts, 3 * 5 * 32 * 4),
    ],
)
def test_what_is_computed_may_be_as_large_as_a_file(
    *,
    method: str,
    module: Any,
    num_bytes: int,
    sound: dict[str, Any],
    base: BaseSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = sound[method].write(tmp_path)
    monkeypatch.setattr(module, "MAX_TENSORS_BYTES", num_bytes)
    read_adapter(folder, base, NO_WEIGHTS)
    monkeypatch.setattr(module, "MAX_TENSORS_BYTES", num_bytes - 1)
    refused(folder, base, AdapterFormatError, f"at most {num_bytes - 1} bytes")


@pytest.mark.parametrize("peft_type", ["LOHA", "LOKR"])
def test_a_method_that_can_be_converted(
    peft_type: str, sound: dict[str, Any], base: BaseSpec, tmp_path: Path
) -> None:
    sound["LORA"].fields["peft_type"] = peft_type
    refused(sound["LORA"].write(tmp_path), base, AdapterFormatError, peft_type, "turret adapters convert")


HEAD, EMBED = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
RESIZED: list[tuple[dict[str, Any], str, tuple[int, ...]]] = [
    ({}, f"{HEAD}.weight", (64, 32)),
    ({"target_modules": ["lm_head"]}, f"{HEAD}.base_layer.weight", (64, 32)),
    ({"target_modules": ["lm_head"]}, f"{HEAD}.lora_B.weight", (64, 4)),
    ({"target_modules": ["embed_tokens"]}, f"{EMBED}.base_layer.weight", (64, 32)),
    ({"target_modules": ["embed_tokens"]}, f"{EMBED}.lora_embedding_A", (4, 64)),
    ({"modules_to_save": ["lm_head"]}, f"{HEAD}.weight", (64, 32)),
    ({"modules_to_save": ["embed_tokens"]}, f"{EMBED}.weight", (64, 32)),
    ({"modules_to_save": ["embed_tokens"]}, f"{EMBED}.modules_to_save.weight", (64, 32)),
    ({"modules_to_save": ["lm_head"]}, f"{HEAD}.original_module.weight", (64, 32)),
    ({"trainable_token_indices": [5]}, f"{EMBED}.token_adapter.base_layer.weight", (64, 32)),
]


@pytest.mark.parametrize(("fields", "key", "shape"), RESIZED, ids=[row[1] for row in RESIZED])
def test_a_resized_vocabulary_without_the_whole_embedding_and_head(
    *,
    fields: dict[str, Any],
    key: str,
    shape: tuple[int, ...],
    sound: dict[str, Any],
    base: BaseSpec,
    tmp_path: Path,
) -> None:
    sound["LORA"].fields.update(fields)
    sound["LORA"].tensors.clear()
    sound["LORA"].tensors[key] = torch.zeros(shape)
    parts = ("with 64 rows in the file", "found none", "modules_to_save")
    if "lora_" in key:
        parts = (key, str(list(shape)), "where 61 is the vocabulary", "resized", "tiny-llama")
    refused(sound["LORA"].write(tmp_path), base, AdapterBaseError, *parts)


def test_a_copy_beside_trained_tokens_of_the_same_module_is_none(
    sound: dict[str, Any], base: BaseSpec, weights: BaseWeights, tmp_path: Path
) -> None:
    files = sound["LORA"]
    files.fields["trainable_token_indices"] = [5]
    files.tensors[f"{EMBED}.token_adapter.trainable_tokens_delta"] = torch.ones(1, 32)
    files.tensors[f"{HEAD}.weight"] = weights.weight("lm_head").clone()
    read_adapter(files.write(tmp_path), base, weights)
    files.tensors[f"{EMBED}.weight"] = weights.weight("model.embed_tokens").clone()
    refused(
        files.write(tmp_path), base, AdapterFormatError, f"{EMBED}.weight", "only tensors", weights=weights
    )


def test_numbers_that_are_finite_only_in_the_file(
    sound: dict[str, Any], base: BaseSpec, weights: BaseWeights, tmp_path: Path
) -> None:
    files = sound["ADALORA"]
    files.tensors[f"{Q0}.lora_A"].fill_(1e30)
    files.tensors[f"{Q0}.lora_E"].fill_(1e30)
    refused(files.write(tmp_path), base, AdapterFormatError, "layers.0.self_attn.q_proj", "NaN")

    files = sound["LORA"]
    files.fields["use_dora"] = True
    for key in list(files.tensors):
        if key.endswith("lora_B.weight"):
            out = files.tensors[key].shape[0]
            files.tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.full((out,), 3e38)
            files.tensors[key][:] = 0
    files.tensors[f"{Q0}.lora_magnitude_vector"][0] = 3e38
    refused(files.write(tmp_path), base, AdapterFormatError, "NaN", weights=weights)


class LargeBias(NoWeights):
    def bias(self, module: str) -> torch.Tensor | None:
        assert module == Q0_NAME
        return torch.full((48,), 3.0)


Q0_NAME = Q0.removeprefix("base_model.model.")


@pytest.mark.parametrize(
    ("method", "fields", "large", "named"),
    [
        ("VERA", {}, {f"{Q0}.vera_lambda_b": (48,), f"{Q0}.vera_lambda_d": (4,)}, Q0_NAME),
        (
            "MULTITASK_PROMPT_TUNING",
            {},
            {"prefix_task_cols": (3, 5, 2), "prefix_task_rows": (3, 2, 32)},
            "prompt_embeddings",
        ),
        ("IA3", {}, {f"{Q0}.ia3_l": (48, 1)}, Q0_NAME),
        ("LORA", {"lora_bias": True, "lora_alpha": 16}, {f"{Q0}.lora_B.bias": (48,)}, Q0_NAME),
    ],
    ids=["vera", "multitask", "ia3 with a bias", "lora with a bias"],
)
def test_what_is_computed_is_finite(
    *,
    method: str,
    fields: dict[str, Any],
    large: dict[str, tuple[int, ...]],
    named: str,
    sound: dict[str, Any],
    base_of_family: Callable[[str], BaseSpec],
    tmp_path: Path,
) -> None:
    """qwen2's query has a bias."""
    files = sound[method]
    if method in ("IA3", "LORA"):
        files.fields["target_modules"] = [Q0_NAME]
        for key in [key for key in files.tensors if not key.startswith(f"{Q0}.")]:
            del files.tensors[key]
    files.fields.update(fields)
    files.tensors.update({key: torch.full(shape, 3e38) for key, shape in large.items()})

    base = base_of_family("qwen2")
    refused(files.write(tmp_path), base, AdapterFormatError, repr(named), "NaN", weights=LargeBias())


@pytest.mark.parametrize("field", ["layers_to_transform", "layers_pattern"])
def test_layers_beside_a_regular_expression(
    field: str, sound: dict[str, Any], base: BaseSpec, tmp_path: Path
) -> None:
    sound["LORA"].fields.update({"target_modules": ".*q_proj", field: [1] if "to" in field else ["layers"]})
    refused(sound["LORA"].write(tmp_path), base, AdapterFormatError, field)


@pytest.mark.parametrize("peft_type", sorted({kind.value for kind in PeftType} - set(KINDS)))
def test_a_method_that_is_not_served(
    peft_type: str, sound: dict[str, Any], base: BaseSpec, tmp_path: Path
) -> None:
    sound["LORA"].fields["peft_type"] = peft_type
    message = refused(sound["LORA"].write(tmp_path), base, AdapterFormatError, "peft_type", peft_type)
    assert ", ".join(KINDS) in message
    assert ("turret adapters convert" in message) == (peft_type in CONVERTIBLE)


@pytest.mark.parametrize("peft_type", [None, 3, ["LORA"], {"a": 1}, "lora"])
def test_a_method_that_is_none(peft_type: Any, sound: dict[str, Any], base: BaseSpec, tmp_path: Path) -> None:
    sound["LORA"].fields["peft_type"] = peft_type
    refused(sound["LORA"].write(tmp_path), base, AdapterFormatError, "peft_type")


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("PREFIX_TUNING", "num_layers", 4),
        ("PREFIX_TUNING", "token_dim", 32),
        ("PREFIX_TUNING", "num_attention_heads", 4),
        ("PROMPT_TUNING", "num_layers", 4),
        ("PROMPT_TUNING", "token_dim", 64),
        ("P_TUNING", "num_layers", 1),
        ("P_TUNING", "token_dim", 24),
    ],
)
def test_a_config_of_another_base(
    *, method: str, field: str, value: int, sound: dict[str, Any], base: BaseSpec, tmp_path: Path
) -> None:
    expected = str(sound[method].fields[field])
    sound[method].fields[field] = value
    refused(sound[method].write(tmp_path), base, AdapterBaseError, field, expected, str(value), "tiny-llama")


def test_a_regular_expression_that_never_ends(
    sound: dict[str, Any], base: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "MAX_MATCH_SECONDS", 1)
    sound["LORA"].fields["target_modules"] = r"((\w|\.|_)+)*!"
    refused(sound["LORA"].write(tmp_path), base, AdapterFormatError, "target_modules", "longer")


def test_targets_that_the_base_lacks(sound: dict[str, Any], base: BaseSpec, tmp_path: Path) -> None:
    sound["LORA"].fields["target_modules"] = ["c_attn"]
    refused(sound["LORA"].write(tmp_path), base, AdapterBaseError, "target_modules", "c_attn", "tiny-llama")


def with_linears(base: BaseSpec, **changes: Any) -> BaseSpec:
    linears = base.of_kind(ModuleKind.LINEAR).items()
    changed = {name: dataclasses.replace(shape, **changes) for name, shape in linears}
    return dataclasses.replace(base, modules={**base.modules, **changed})


BASE_CHANGES: list[tuple[str, Callable[[BaseSpec], BaseSpec], tuple[str, ...]]] = [
    (
        "LORA",
        lambda base: dataclasses.replace(
            base, modules={name: s for name, s in base.modules.items() if ".2." not in name}
        ),
        ("model.layers.2.mlp.down_proj", "tiny-llama"),
    ),
    (
        "LORA",
        lambda base: with_linears(base, in_features=99),
        ("model.layers.0.mlp.down_proj.lora_A.weight", "[4, 99]", "[4, 40]", "tiny-llama"),
    ),
    (
        "LORA",
        lambda base: with_linears(base, out_features=99),
        ("model.layers.0.mlp.down_proj.lora_B.weight", "[99, 4]", "[32, 4]", "tiny-llama"),
    ),
    (
        "PREFIX_TUNING",
        lambda base: dataclasses.replace(base, num_layers=4),
        ("num_layers", "4", "3", "tiny-llama"),
    ),
    (
        "PROMPT_TUNING",
        lambda base: dataclasses.replace(base, hidden_size=64),
        ("token_dim", "64", "32", "tiny-llama"),
    ),
]


@pytest.mark.parametrize(("method", "change", "parts"), BASE_CHANGES)
def test_another_base(
    *,
    method: str,
    change: Callable[[BaseSpec], BaseSpec],
    parts: tuple[str, ...],
    sound: dict[str, Any],
    base: BaseSpec,
    tmp_path: Path,
) -> None:
    refused(sound[method].write(tmp_path), change(base), AdapterBaseError, *parts)
