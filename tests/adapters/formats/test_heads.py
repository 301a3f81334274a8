"""Heads that tasks add to a base: found by their names, with any number of labels, or refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from turret_adapters.errors import AdapterBaseError, AdapterFormatError
from turret_adapters.formats.peft import read_adapter
from turret_adapters.spec import HeadSpec, HeadTask, Part, Problem

WIDTH = 32
SHAPES = {
    HeadTask.SEQ_CLS: {"score.weight": (0, WIDTH)},
    HeadTask.TOKEN_CLS: {"head.weight": (WIDTH,), "score.weight": (0, WIDTH), "score.bias": (0,)},
    HeadTask.QUESTION_ANS: {"qa_outputs.weight": (2, WIDTH), "qa_outputs.bias": (2,)},
}


@pytest.fixture
def base(base):
    return replace(base, heads=SHAPES, prefix="model", task_prefixes=("model", "transformer"))


def with_head(files, task, **tensors):
    fields = {**files.fields, "task_type": task, "modules_to_save": ["classifier", "score", "qa_outputs"]}
    named = {f"base_model.model.{name.replace('__', '.')}": each for name, each in tensors.items()}
    return replace(files, fields=fields, tensors={**files.tensors, **named})


def sequence_head(sound, num_labels=3):
    return with_head(sound["LORA"], "SEQ_CLS", score__weight=torch.randn(num_labels, WIDTH))


@pytest.mark.parametrize("num_labels", [1, 2, 77])
def test_a_head_has_its_own_number_of_labels(num_labels, sound, base, weights, tmp_path):
    files = sequence_head(sound, num_labels)
    found = read_adapter(files.write(tmp_path), base, weights)
    assert found.spec.head == HeadSpec(
        task=HeadTask.SEQ_CLS,
        labels=tuple(f"LABEL_{index}" for index in range(num_labels)),
        problem=Problem.REGRESSION if num_labels == 1 else Problem.SINGLE_LABEL,
    )
    assert torch.equal(found.head["score.weight"], files.tensors["base_model.model.score.weight"])
    [rows] = [group for group in found.spec.rows if group.part is Part.HEAD]
    assert (rows.module, rows.count, rows.width) == ("score.weight", num_labels, WIDTH)
    assert found.num_bytes >= 4 * num_labels * WIDTH


@pytest.mark.parametrize("inside", ["", "modules_to_save.", "modules_to_save.default."])
def test_a_head_may_be_saved_within_its_wrapper(inside, sound, base, weights, tmp_path):
    weight = torch.randn(3, WIDTH)
    files = sequence_head(sound)
    del files.tensors["base_model.model.score.weight"]
    files.tensors[f"base_model.model.score.{inside}weight"] = weight
    found = read_adapter(files.write(tmp_path), base, weights)
    assert torch.equal(found.head["score.weight"], weight)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_a_head_stands_beside_virtual_tokens(method, sound, base, weights, tmp_path):
    weight = torch.randn(3, WIDTH)
    files = with_head(sound[method], "SEQ_CLS")
    files.tensors["base_model.score.weight"] = weight
    found = read_adapter(files.write(tmp_path), base, weights)
    assert torch.equal(found.head["score.weight"], weight)
    assert found.spec.num_virtual_tokens
    assert not found.spec.prefix.per_request


def test_on_an_encoder_embeddings_are_computed_with_each_text(sound, base, weights, tmp_path):
    encoder = replace(base, is_encoder=True)
    files = with_head(sound["PROMPT_TUNING"], "FEATURE_EXTRACTION")
    found = read_adapter(files.write(tmp_path), encoder, weights)
    assert found.spec.prefix.per_request
    assert (found.spec.num_virtual_tokens > 0, found.spec.num_prefix_tokens) == (True, 0)


def test_parts_that_the_base_has_may_be_missing(sound, base, weights, tmp_path):
    tensors = {"score__weight": torch.randn(3, WIDTH), "score__bias": torch.randn(3)}
    files = with_head(sound["LORA"], "TOKEN_CLS", **tensors).write(tmp_path)
    with pytest.raises(AdapterFormatError, match=r"'head.weight'.*modules_to_save': \['head'\]"):
        read_adapter(files, base, weights)
    found = read_adapter(files, replace(base, head_weights=("head.weight",)), weights)
    assert found.head.keys() == {"score.weight", "score.bias"}


def test_a_head_that_is_not_in_the_file_is_refused(sound, base, weights, tmp_path):
    files = with_head(sound["LORA"], "SEQ_CLS")
    with pytest.raises(AdapterFormatError, match=r"'score.weight': expected the head of a SEQ_CLS adapter"):
        read_adapter(files.write(tmp_path), base, weights)


def test_a_head_whose_parts_contradict_each_other_is_refused(sound, base, weights, tmp_path):
    tensors = {"head__weight": torch.ones(WIDTH), "score__weight": torch.randn(3, WIDTH)}
    files = with_head(sound["LORA"], "TOKEN_CLS", **tensors, score__bias=torch.randn(4))
    with pytest.raises(AdapterFormatError, match=r"expected shape \[[34].*found \[[34]"):
        read_adapter(files.write(tmp_path), base, weights)


def test_a_head_of_another_width_is_of_another_base(sound, base, weights, tmp_path):
    files = with_head(sound["LORA"], "SEQ_CLS", score__weight=torch.randn(3, WIDTH + 1))
    with pytest.raises(AdapterBaseError, match="a width of the base model"):
        read_adapter(files.write(tmp_path), base, weights)


def test_a_head_without_labels_is_refused(sound, base, weights, tmp_path):
    files = with_head(sound["LORA"], "SEQ_CLS", score__weight=torch.empty(0, WIDTH))
    with pytest.raises(AdapterFormatError, match="1 to 65536 labels, found 0"):
        read_adapter(files.write(tmp_path), base, weights)


@pytest.mark.parametrize(
    ("task", "change"), [("CAUSAL_LM", {"is_encoder": True}), ("SEQ_CLS", {"heads": {}})]
)
def test_a_task_that_the_base_does_not_do_is_refused(task, change, sound, base, weights, tmp_path):
    files = sequence_head(sound)
    files.fields["task_type"] = task
    with pytest.raises(AdapterFormatError, match=f"'task_type' to be empty or what .* does.*{task}"):
        read_adapter(files.write(tmp_path), replace(base, **change), weights)


def test_keys_and_values_before_the_text_need_a_base_that_takes_them(sound, base, weights, tmp_path):
    files = with_head(sound["PREFIX_TUNING"], "FEATURE_EXTRACTION")
    with pytest.raises(AdapterBaseError, match="takes no keys and values before the first token"):
        read_adapter(files.write(tmp_path), replace(base, takes_prefix=False), weights)


@pytest.mark.parametrize("prefix", ["", "model.", "transformer."])
def test_modules_are_named_as_in_each_class_for_a_task(prefix, sound, base, weights, tmp_path):
    files = sequence_head(sound)
    own = "base_model.model.model."
    renamed = {key.replace(own, f"base_model.model.{prefix}"): each for key, each in files.tensors.items()}
    found = read_adapter(replace(files, tensors=renamed).write(tmp_path), base, weights)
    assert {group.module for group in found.spec.rows if group.part is Part.LORA_A} <= base.modules.keys()


def test_a_copy_of_the_embedding_beside_virtual_tokens_is_not_taken_for_a_classs_own_name(
    sound, base, weights, tmp_path
):
    """peft writes base_model.model.embed_tokens there, which a model without a head has below it."""
    files = sound["PROMPT_TUNING"]
    files.tensors["base_model.model.embed_tokens.weight"] = weights.weight("model.embed_tokens")
    found = read_adapter(files.write(tmp_path), base, weights)
    assert not found.deltas
