"""Encoders in packed batches: positions, types of tokens, poolers, and heads that a checkpoint has."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import count, islice

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    T5Config,
)

from support.encoders import FAMILIES, save_base
from support.tokenizers import save_tokenizer
from turret_adapters.spec import HeadTask, Problem
from turret_server.engine.pooling import Pooling
from turret_server.engine.step import PoolingStep, SequenceStep, Step
from turret_server.kernels import ReferenceOps
from turret_server.model.arena import Arena
from turret_server.model.classes import is_encoder
from turret_server.model.describe import describe_model
from turret_server.model.load import ModelWeights, load_model
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler

CPU = torch.device("cpu")
ENCODERS = [family for family in FAMILIES if family != "llama"]
PAD = 2


def load(folder, cache, **options):
    loaded = load_model(
        str(folder), device=CPU, dtype=torch.float32, cache=cache, ops=ReferenceOps(), **options
    )
    return ModelRunner(loaded, Arena(loaded.base, 1 << 22, dtype=loaded.dtype, device=CPU), None, Sampler())


def first_states(runner, *texts, types=()):
    """The state of each text's first token, computed together."""
    pages = count()
    size = runner._arena.block_size
    sequences = tuple(
        SequenceStep(
            sequence_id=index,
            token_ids=tuple(text),
            start=0,
            block_table=tuple(islice(pages, -(-len(text) // size))),
            pooling=PoolingStep(weights=tuple(Pooling.CLS.weight(at, len(text)) for at in range(len(text)))),
            token_type_ids=tuple(types),
        )
        for index, text in enumerate(texts)
    )
    rows = runner.run(Step(sequences=sequences)).rows
    return [torch.tensor(rows[index].values) for index in range(len(texts))]


def with_unquantised_weights(runner, folder):
    """Transformers' model with the weights of the server's, dequantised."""
    loaded = runner._loaded
    model, weights = AutoModel.from_pretrained(folder), ModelWeights(loaded.model, loaded.ops)
    with torch.no_grad():
        for name in loaded.base.modules:
            model.get_submodule(name).weight.copy_(weights.weight(name))
    return model.eval()


@pytest.fixture(scope="module", params=ENCODERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return save_base(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def runner(folder, quantised_cache):
    return load(folder, quantised_cache)


def test_an_encoder_is_computed_as_by_transformers(runner):
    runner.check()


def test_padding_tokens_within_a_text_are_numbered_as_by_transformers(runner, folder):
    texts = [[50, PAD, 60, 61, PAD, PAD, 70], [80, 90], [PAD, 55, 56]]
    model = with_unquantised_weights(runner, folder)
    with torch.inference_mode():
        for text, found in zip(texts, first_states(runner, *texts), strict=True):
            ids = torch.tensor([text])
            expected = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 0]
            torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0)


def test_types_of_tokens_are_those_of_transformers(runner, folder):
    encoder = runner._loaded.encoder
    if encoder.num_token_types == 1:
        pytest.skip("it has none")
    text, types = [50, 60, 70, 80], [0, 0, 1, 1]
    model = with_unquantised_weights(runner, folder)
    with torch.inference_mode():
        expected = model(torch.tensor([text]), token_type_ids=torch.tensor([types])).last_hidden_state[0, 0]
    [found] = first_states(runner, text, types=types)
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0)
    [plain] = first_states(runner, text)
    assert (plain - found).abs().max() > 0.01


def test_its_description_is_that_of_the_loaded_model(runner, folder):
    assert describe_model(str(folder)) == runner._loaded.base


def test_its_context_ends_where_its_positions_do(family, runner):
    first = 3 if "roberta" in family else 0
    assert runner._loaded.context.tokens == FAMILIES[family].max_position_embeddings - first


def test_a_checkpoint_without_a_pooler_has_no_heads_that_need_one(tmp_path):
    model = AutoModelForMaskedLM.from_config(FAMILIES["bert"])
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    for _ in range(2):  # and from its quantised copy
        loaded = load(tmp_path / "model", tmp_path / "cache")._loaded
        assert loaded.base.heads.keys() == {HeadTask.TOKEN_CLS, HeadTask.QUESTION_ANS}


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_a_checkpoint_may_have_a_head_of_its_own(family, tmp_path):
    config = deepcopy(FAMILIES[family])
    config.id2label, config.problem_type = {0: "no", 1: "yes"}, "multi_label_classification"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    runner = load(tmp_path / "model", tmp_path / "cache")
    base = runner._loaded.base
    assert (base.head.labels, base.head.problem) == (("no", "yes"), Problem.MULTI_LABEL)
    text = SequenceStep(
        sequence_id=1,
        token_ids=(50, 60, 70),
        start=0,
        block_table=(0,),
        pooling=PoolingStep(task=HeadTask.SEQ_CLS),
    )
    found = runner.run(Step(sequences=(text,))).rows[1]
    inner = with_unquantised_weights(runner, tmp_path / "model")
    setattr(model, model.base_model_prefix, inner)
    with torch.inference_mode():
        expected = model.eval()(torch.tensor([text.token_ids])).logits[0]
    torch.testing.assert_close(torch.tensor(found.values).float(), expected, atol=1e-4, rtol=0)


def test_types_that_fill_masks_are_encoders_unless_they_are_decoders():
    assert is_encoder(BertConfig())
    assert not is_encoder(BertConfig(is_decoder=True))
    assert not is_encoder(T5Config())


def test_numbers_that_are_not_finite_fail_their_text_alone(runner, monkeypatch):
    forward = runner._forward

    def broken(batch, calls, states):
        found = forward(batch, calls, states)
        with torch.inference_mode():
            states[0][0] = torch.nan
        return found

    monkeypatch.setattr(runner, "_forward", broken)
    pooling = PoolingStep(weights=(1.0,))
    one = SequenceStep(sequence_id=1, token_ids=(50,), start=0, block_table=(0,), pooling=pooling)
    two = replace(one, sequence_id=2, block_table=(1,))
    result = runner.run(Step(sequences=(one, two)))
    assert result.errors.keys() == {1}
    assert "not finite" in str(result.errors[1])
