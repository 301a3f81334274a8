"""Vectors, classes and scores over HTTP: the same numbers as over gRPC, in the forms that clients know."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from safetensors.torch import load_file, save_file

from support.encoders import save_marked_base, save_task_adapter
from support.serving import serving
from turret_client import Client
from turret_server.config import ServerConfig
from turret_server.web.pooling import ClassifyBody, EmbeddingBody, RerankBody, ScoreBody

TEXTS = ["the quick brown fox", "the lazy dog and the other fox there", "jumps"]
COMMON: dict[str, object] = {
    "model": "classes",
    "user": "me",
    "truncate": True,
    "truncate_prompt_tokens": -1,
    "add_special_tokens": False,
    "priority": 1,
    "cache_salt": "s",
    "routing_key": "me",
}
# Path, body, values that are served and no defaults, and a request to set them in.
ENDPOINTS = [
    (
        "/v1/embeddings",
        EmbeddingBody,
        {
            "input": [[5, 6], [7]],
            "encoding_format": "base64",
            "dimensions": 8,
            "normalize": False,
            "pooling": "cls",
        },
        {"input": TEXTS},
    ),
    ("/classify", ClassifyBody, {"input": [5, 6]}, {"input": TEXTS, "model": "classes"}),
    (
        "/score",
        ScoreBody,
        {"model": "ranker", "text_1": ["a"], "text_2": "b"},
        {"text_1": TEXTS[0], "text_2": TEXTS, "model": "ranker"},
    ),
    (
        "/v1/rerank",
        RerankBody,
        {
            "model": "ranker",
            "query": "fox",
            "documents": [{"text": "a"}],
            "top_n": 1,
            "return_documents": False,
        },
        {"query": TEXTS[0], "documents": TEXTS, "model": "ranker"},
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_marked_base(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def served(base, tmp_path_factory, quantised_cache):
    config = ServerConfig(
        model=str(base),
        dtype="float32",
        device="cpu",
        memory="16MiB",
        cache=quantised_cache,
        http="127.0.0.1:0",
    )
    folder = tmp_path_factory.mktemp("adapters")
    with serving(config) as served:
        for name, labels in (("classes", 3), ("ranker", 1)):
            adapter = save_task_adapter("lora", "SEQ_CLS", "bert", base, folder / name, num_labels=labels)
            served.parts.lifecycle.load(name, str(adapter))
        yield served
        served.parts.engine.check_integrity()


@pytest.fixture
def web(served):
    with httpx.Client(base_url=served.http, timeout=600) as web:
        yield web


@pytest.fixture
def client(served):
    with Client(served.address) as client:
        yield client


@pytest.mark.parametrize(("path", "body", "samples", "request_"), ENDPOINTS)
def test_every_field_that_is_listed_as_served_is(web, path, body, samples, request_):
    assert {*COMMON, *samples} == set(body.model_fields)
    for name, value in (COMMON | samples).items():
        answer = web.post(path, json=request_ | {name: value})
        assert answer.status_code == 200, (name, answer.text)


@pytest.mark.parametrize(("path", "body", "request_"), [(each[0], each[1], each[3]) for each in ENDPOINTS])
def test_every_other_field_is_refused_by_its_name(web, path, body, request_):
    for name in (*body.refused, "anything_else"):
        answer = web.post(path, json=request_ | {name: "any"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert web.post(path, json=request_ | {"truncate_prompt_tokens": 5}).status_code == 400


def test_openais_client_gets_the_vectors_of_grpc(served, client):
    openai = OpenAI(base_url=f"{served.http}/v1", api_key="none", max_retries=0)
    model = served.parts.model.model.name
    for more in ({}, {"encoding_format": "float"}, {"dimensions": 8}):
        answer = openai.embeddings.create(model=model, input=TEXTS, **more)
        expected = client.embed(TEXTS, dimensions=more.get("dimensions"))
        assert [tuple(each.embedding) for each in answer.data] == [*expected.vectors]
        assert [each.index for each in answer.data] == [0, 1, 2]
        assert answer.usage.total_tokens == answer.usage.prompt_tokens == expected.usage.prompt_tokens
    with pytest.raises(BadRequestError, match="dimensions is at most 64"):
        openai.embeddings.create(model=model, input="the fox", dimensions=65)


def test_an_adapter_changes_the_vectors(web):
    def vectors(**fields: object) -> list[list[float]]:
        answer = web.post("/v1/embeddings", json={"input": TEXTS} | fields).json()
        return [each["embedding"] for each in answer["data"]]

    base = vectors()
    assert np.linalg.norm(base, axis=1) == pytest.approx([1, 1, 1])
    assert vectors(model="classes") != base
    assert vectors(normalize=False) != base
    assert vectors(pooling="last") != base
    assert vectors(pooling="mean") == base


def test_classes_have_the_form_of_vllm(web, client):
    answer = web.post("/classify", json={"model": "classes", "input": TEXTS}).json()
    expected = client.classify(TEXTS, adapter="classes")
    assert answer["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert answer["system_fingerprint"] == expected.revision
    assert (answer["object"], answer["model"]) == ("list", "classes")
    for index, (found, result) in enumerate(zip(answer["data"], expected.results, strict=True)):
        assert (found["index"], found["label"], found["num_classes"]) == (index, result.label, 3)
        assert found["probs"] == pytest.approx([*result.scores.values()])


def test_one_text_is_scored_with_each_or_each_with_its_own(web, client):
    pairs = [(TEXTS[0], text) for text in TEXTS]
    expected = pytest.approx(client.score(pairs, adapter="ranker").scores)

    def scores(first: object, path: str = "/score") -> list[float]:
        answer = web.post(path, json={"model": "ranker", "text_1": first, "text_2": TEXTS}).json()
        return [each["score"] for each in answer["data"]]

    assert scores(TEXTS[0]) == expected
    assert scores([TEXTS[0]] * 3, "/v1/score") == expected
    refused = web.post("/score", json={"model": "ranker", "text_1": TEXTS[:2], "text_2": TEXTS})
    assert refused.status_code == 400
    assert "found 2 and 3" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_ordered_by_their_scores(web, client, path):
    scores = client.score([("the fox", text) for text in TEXTS], adapter="ranker").scores
    request = {"model": "ranker", "query": "the fox", "documents": [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]}
    results = web.post(path, json=request).json()["results"]
    order = sorted(range(3), key=lambda index: -scores[index])
    assert [each["index"] for each in results] == order
    assert [each["document"]["text"] for each in results] == [TEXTS[index] for index in order]
    assert [each["relevance_score"] for each in results] == pytest.approx([scores[index] for index in order])
    [best] = web.post(path, json=request | {"top_n": 1, "return_documents": False}).json()["results"]
    assert best["index"] == order[0]
    assert "document" not in best


def test_documents_are_ordered_where_their_scores_are_the_same(served, web, tmp_path, base):
    folder = save_task_adapter("lora", "SEQ_CLS", "bert", base, tmp_path / "sure", num_labels=1)
    tensors = load_file(folder / "adapter_model.safetensors")
    sure = {name: each * (1000 if "classifier" in name else 1) for name, each in tensors.items()}
    save_file(sure, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    served.parts.lifecycle.load("sure", str(folder))
    with Client(served.address) as client:
        texts = [f"the fox {word}" for word in ("jumps", "there", "dog", "these", "over", "lazy", "quick")]
        found = client.score([("fox", text) for text in texts], adapter="sure")
    assert len({*found.scores}) < len({*found.logits}) == len(texts)
    answer = web.post("/v1/rerank", json={"model": "sure", "query": "fox", "documents": texts}).json()
    order = sorted(range(len(texts)), key=lambda index: -found.logits[index])
    assert [each["index"] for each in answer["results"]] == order


def test_what_is_too_long_is_cut_if_that_is_asked_for(web):
    long = {"input": "the fox " * 200}
    assert web.post("/v1/embeddings", json=long).status_code == 400
    for more in ({"truncate": True}, {"truncate_prompt_tokens": -1}):
        assert web.post("/v1/embeddings", json=long | more).json()["usage"]["prompt_tokens"] == 128


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": [[1], []]}, "input"),
        ("/v1/embeddings", {"input": "a", "priority": 11}, "priority"),
        ("/v1/embeddings", {"input": "a", "model": "classes@zzz"}, "model"),
        ("/v1/embeddings", {"input": "a", "dimensions": 65}, "dimensions"),
        ("/score", {"text_1": "a", "text_2": [], "model": "ranker"}, "text_2"),
        ("/v1/rerank", {"query": "a", "documents": ["b" * 999], "model": "ranker"}, "documents"),
        ("/v1/rerank", {"query": "b" * 999, "documents": ["a"], "model": "ranker"}, "documents"),
    ],
)
def test_an_error_names_the_field_of_the_body(web, path, body, param):
    error = web.post(path, json=body).json()["error"]
    assert error["param"] == param
    assert "inputs[" not in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/classify", {"input": "the fox"}, 422, "have a head for SEQ_CLS"),
        ("/score", {"text_1": "a", "text_2": "b", "model": "classes"}, 422, "use Classify"),
        ("/v1/embeddings", {"input": []}, 400, "no inputs"),
        ("/v1/embeddings", {"input": [""], "add_special_tokens": False}, 400, "has no tokens"),
        ("/v1/embeddings", {"input": "a", "model": "missing"}, 404, "missing"),
        ("/v1/rerank", {"query": "a", "documents": [], "model": "ranker"}, 400, "no inputs"),
        ("/v1/completions", {"prompt": "a"}, 422, "encoder"),
    ],
)
def test_what_cannot_be_done_is_refused(web, path, body, status, message):
    answer = web.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]
