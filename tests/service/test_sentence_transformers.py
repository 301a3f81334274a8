"""Vectors of bases that sentence-transformers saved are its vectors, or refused while the rest is served."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from support.encoders import TaskOracle, save_base, save_task_adapter
from support.serving import serving
from turret_client import Client, FailedPreconditionError, Pooling
from turret_demo.real_model import real_encoder
from turret_server.config import ServerConfig

TOLERANCE = 1e-4
TEXTS = ("A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_base("bert", tmp_path_factory.mktemp("bert"))


def save(bert, folder, pooling, *more):
    """The base, as sentence-transformers saves it."""
    shutil.copytree(bert, folder)
    names = ["Transformer", "Pooling", *more]
    modules = [
        {
            "idx": index,
            "path": f"{index}_{name}" if index else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for index, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return folder


def config(model, cache):
    return ServerConfig(model=str(model), dtype="float32", device="cpu", memory="16MiB", cache=cache)


def states(model, texts):
    """transformers' hidden states of each text, [T, hidden], on the same NF4 base."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return TaskOracle(model).numbers(
        "FEATURE_EXTRACTION", None, [tokenizer(text).input_ids for text in texts]
    )


def normalised(vectors):
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1).numpy()


@pytest.mark.parametrize("normalises", [True, False])
def test_a_request_that_names_no_pooling_gets_the_bases_own(normalises, bert, quantised_cache, tmp_path):
    model = save(bert, tmp_path / "model", "cls_token", *["Normalize"] * normalises)
    expected = [text[0] for text in states(model, TEXTS)]
    with serving(config(model, quantised_cache)) as served, Client(served.address) as client:
        found = np.array(client.embed(TEXTS).vectors)
    expected = normalised(expected) if normalises else torch.stack(expected).numpy()
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


def test_vectors_of_a_base_with_a_dense_layer_are_refused_and_the_rest_is_served(
    bert, quantised_cache, tmp_path
):
    model = save(bert, tmp_path / "model", "mean_tokens", "Dense")
    adapter = save_task_adapter("lora", "SEQ_CLS", "bert", bert, tmp_path / "classifier")
    with serving(config(model, quantised_cache)) as served, Client(served.address) as client:
        with pytest.raises(FailedPreconditionError, match=r"Transformer, Pooling, Dense \(name the pooling"):
            client.embed(TEXTS)
        assert len(client.embed(TEXTS, pooling=Pooling.MEAN).vectors) == 3
        client.load_adapter("classifier", str(adapter))
        assert len(client.classify(TEXTS, adapter="classifier").results) == 3


@pytest.mark.slow
@pytest.mark.xdist_group("real-model")
def test_vectors_of_a_real_encoder_are_those_of_transformers_and_say_what_is_alike(quantised_cache):
    model = real_encoder()
    with serving(config(model, quantised_cache)) as served, Client(served.address) as client:
        found = np.array(client.embed(TEXTS).vectors)
        assert served.parts.loaded.vectors.max_tokens == 256
    expected = normalised([text.mean(0) for text in states(model, TEXTS)])
    assert np.abs(found - expected).max() < TOLERANCE
    alike = found @ found.T
    assert alike[0, 1] > 0.6
    assert alike[0, 2] < 0.2
