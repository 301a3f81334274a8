"""Vectors, classes, tags and scores over a real socket, against peft on the same NF4 base."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from support.encoders import TaskOracle, save_base, save_marked_base, save_task_adapter
from support.serving import serving
from turret_client import (
    Client,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Pooling,
    Problem,
)
from turret_server.config import ServerConfig

TEXTS = ["the quick brown fox", "the lazy dog and the other fox there", "jumps"]
PAIR = ("the quick brown fox", "then these those other")
TOLERANCE = 1e-3
CASES = [("lora", "SEQ_CLS"), ("prefix", "SEQ_CLS"), ("lora", "TOKEN_CLS"), ("lora", "QUESTION_ANS")]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_marked_base(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    found = {
        f"{kind}-{task}": save_task_adapter(kind, task, "bert", base, folder / f"{kind}-{task}")
        for kind, task in CASES
    }
    found["ranker"] = save_task_adapter("lora", "SEQ_CLS", "bert", base, folder / "ranker", num_labels=1)
    return found


@pytest.fixture(scope="module")
def served(base, adapters, quantised_cache):
    config = ServerConfig(
        model=str(base), dtype="float32", device="cpu", memory="16MiB", max_queue=16, cache=quantised_cache
    )
    with serving(config) as served:
        for name, folder in adapters.items():
            served.parts.lifecycle.load(name, str(folder))
        yield served


@pytest.fixture
def client(served):
    with Client(served.address) as client:
        yield client
    served.parts.engine.check_integrity()


@pytest.fixture(scope="module")
def oracle(base) -> TaskOracle:
    return TaskOracle(base)


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def numbers(oracle, tokenizer, task, adapter, *texts) -> torch.Tensor:
    """What transformers and peft compute of one input, as `tokenizer` makes it."""
    encoded = tokenizer(*texts, return_tensors="pt")
    inputs = {"token_type_ids": encoded["token_type_ids"]} if "token_type_ids" in encoded else {}
    if inputs and adapter and "prefix" not in adapter.name and not inputs["token_type_ids"].any():
        inputs = {}
    return oracle.numbers(task, adapter, [encoded["input_ids"][0].tolist()], **inputs)[0]


def test_classes_are_those_of_peft_with_any_adapter(client, adapters, oracle, tokenizer):
    for name in ("lora-SEQ_CLS", "prefix-SEQ_CLS"):
        found = client.classify(TEXTS, adapter=name)
        assert found.problem is Problem.SINGLE_LABEL
        assert found.revision
        for text, result in zip(TEXTS, found.results, strict=True):
            logits = numbers(oracle, tokenizer, "SEQ_CLS", adapters[name], text)[0]
            assert [*result.logits.values()] == pytest.approx(logits.tolist(), abs=TOLERANCE)
            assert [*result.scores.values()] == pytest.approx(logits.softmax(-1).tolist(), abs=TOLERANCE)
            assert result.label == f"LABEL_{int(logits.argmax())}"
            assert result.score == max(result.scores.values())


def test_token_types_of_a_pair_reach_the_model(client, base, adapters, oracle):
    encoded = Tokenizer.from_file(str(base / "tokenizer.json")).encode(*PAIR)
    [expected] = oracle.numbers(
        "SEQ_CLS", adapters["lora-SEQ_CLS"], [encoded.ids], token_type_ids=torch.tensor([encoded.type_ids])
    )
    [found] = client.classify([PAIR], adapter="lora-SEQ_CLS").results
    assert any(encoded.type_ids)
    assert [*found.logits.values()] == pytest.approx(expected[0].tolist(), abs=TOLERANCE)


def test_tags_have_characters_and_leave_special_tokens_out(client, adapters, oracle, tokenizer):
    text = TEXTS[0]
    [tagged] = client.tag([text], adapter="lora-TOKEN_CLS").texts
    rows = numbers(oracle, tokenizer, "TOKEN_CLS", adapters["lora-TOKEN_CLS"], text).softmax(-1)
    expected = rows[1:-1]
    assert [token.label for token in tagged.tokens] == [f"LABEL_{row.argmax()}" for row in expected]
    best = [float(row.max()) for row in expected]
    assert [token.score for token in tagged.tokens] == pytest.approx(best, abs=TOLERANCE)
    assert "".join(text[token.start : token.end] for token in tagged.tokens) == text
    assert "".join(span.text for span in tagged.spans) == text
    [ids_only] = client.tag([tokenizer(text)["input_ids"]], adapter="lora-TOKEN_CLS").texts
    assert len(ids_only.tokens) == len(rows)
    assert ids_only.spans == ()


def test_a_tag_of_the_second_text_says_so(client):
    [tagged] = client.tag([PAIR], adapter="lora-TOKEN_CLS").texts
    for number, text in enumerate(PAIR):
        own = [token for token in tagged.tokens if token.in_second is bool(number)]
        assert "".join(text[token.start : token.end] for token in own) == text
        spans = [span for span in tagged.spans if span.in_second is bool(number)]
        assert "".join(span.text for span in spans) == text


def test_a_score_is_the_sigmoid_of_the_only_logit(client, base, adapters, oracle):
    encoded = Tokenizer.from_file(str(base / "tokenizer.json")).encode(*PAIR)
    types = torch.tensor([encoded.type_ids])
    [logits] = oracle.numbers(
        "SEQ_CLS", adapters["ranker"], [encoded.ids], num_labels=1, token_type_ids=types
    )
    found = client.score([PAIR, PAIR[::-1]], adapter="ranker").scores
    assert found[0] == pytest.approx(float(logits.sigmoid()), abs=TOLERANCE)
    assert found[1] != pytest.approx(found[0], abs=TOLERANCE)
    [classified] = client.classify([PAIR], adapter="ranker").results
    assert [*classified.scores.values()] == pytest.approx([float(logits)], abs=TOLERANCE)


@pytest.mark.parametrize("pooling", Pooling)
def test_vectors_are_those_of_transformers(client, oracle, tokenizer, pooling):
    found = client.embed(TEXTS, pooling=pooling, normalize=False)
    for text, vector in zip(TEXTS, found.vectors, strict=True):
        states = numbers(oracle, tokenizer, "FEATURE_EXTRACTION", None, text)
        weights = torch.arange(1.0, len(states) + 1)[:, None]
        expected = {
            Pooling.CLS: states[0],
            Pooling.MEAN: states.mean(0),
            Pooling.WEIGHTED_MEAN: (states * weights).sum(0) / weights.sum(),
            Pooling.LAST: states[-1],
        }[pooling]
        assert vector == pytest.approx(expected.tolist(), abs=TOLERANCE)
    assert found.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert found.usage.generated_tokens == 0


def test_vectors_are_cut_and_then_scaled(client):
    [whole] = client.embed(TEXTS[:1], normalize=False).vectors
    [cut] = client.embed(TEXTS[:1], dimensions=8).vectors
    expected = np.array(whole[:8]) / np.linalg.norm(whole[:8])
    assert cut == pytest.approx(expected.tolist(), abs=1e-6)


def test_an_encoder_takes_the_mean_unless_it_is_told_otherwise(client):
    assert client.embed(TEXTS).vectors == client.embed(TEXTS, pooling="mean", normalize=True).vectors


def test_an_input_has_the_same_numbers_in_any_batch(client):
    alone = [client.embed([text], adapter="lora-SEQ_CLS").vectors[0] for text in TEXTS]
    assert [*client.embed(TEXTS * 5, adapter="lora-SEQ_CLS").vectors] == alone * 5


def test_text_that_is_too_long_is_refused_or_cut_at_its_end(client, served):
    most = served.parts.loaded.context.tokens
    long = " ".join([TEXTS[0]] * most)
    with pytest.raises(InvalidArgumentError, match=r"inputs\[1\]: the model's context"):
        client.embed([TEXTS[0], long])
    found = client.embed([long], truncate=True)
    assert found.usage.prompt_tokens == most
    tags = client.tag([long, (TEXTS[0], long), (long, long)], truncate=True, adapter="lora-TOKEN_CLS")
    assert [len(text.tokens) for text in tags.texts] == [most - 2, most - 3, most - 3]
    one, short, both = tags.texts
    assert (one.tokens[0].start, one.tokens[-1].in_second) == (0, False)
    first = [token for token in short.tokens if not token.in_second]
    assert "".join(TEXTS[0][token.start : token.end] for token in first) == TEXTS[0]
    assert sum(token.in_second for token in both.tokens) == (most - 2) // 2
    assert client.embed([f"<s>{long}"], truncate=True).usage.prompt_tokens == most
    assert client.embed([[5] * (most + 3)], truncate=True).usage.prompt_tokens == most


def test_requests_for_what_no_head_does_are_refused_by_name(client):
    with pytest.raises(
        FailedPreconditionError, match=r"neither the model nor .* head for SEQ_CLS"
    ) as no_head:
        client.classify(TEXTS)
    assert no_head.value.reason == "UNSUPPORTED_TASK"
    with pytest.raises(FailedPreconditionError, match=r"adapter 'lora-TOKEN_CLS' has .* which Tag uses"):
        client.classify(TEXTS, adapter="lora-TOKEN_CLS")
    with pytest.raises(FailedPreconditionError, match=r"head for QUESTION_ANS, which none of the calls"):
        client.tag(TEXTS, adapter="lora-QUESTION_ANS")
    with pytest.raises(FailedPreconditionError, match=r"head for SEQ_CLS, which Classify uses"):
        client.tag(TEXTS, adapter="prefix-SEQ_CLS")
    with pytest.raises(FailedPreconditionError, match=r"head with one label.* has 3; use Classify"):
        client.score([PAIR], adapter="lora-SEQ_CLS")
    with pytest.raises(InvalidArgumentError, match="request this one alone"):
        client.classify(TEXTS, adapter=["lora-SEQ_CLS", "ranker"])
    with pytest.raises(FailedPreconditionError, match="encoder"):
        client.generate("the quick")
    with pytest.raises(NotFoundError):
        client.embed(TEXTS, adapter="missing")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "the batch has no inputs"),
        ([""] * 17, "at most 16"),
        (["the", [1 << 20]], r"inputs\[1\]: token_ids are below"),
        ([[]], r"inputs\[0\]: the prompt has no tokens"),
    ],
)
def test_invalid_inputs_are_refused_and_leave_nothing_behind(client, inputs, message):
    with pytest.raises(InvalidArgumentError, match=message):
        client.embed(inputs)


@pytest.mark.parametrize(
    "inputs", ["text", 7, [7], [("a", 1)], [("a", "b", "c")], [b"ab"], ["\ud800"], [None]]
)
def test_the_client_refuses_what_is_no_input(client, inputs):
    with pytest.raises(InvalidArgumentError, match="inputs"):
        client.embed(inputs)


def test_unknown_options_and_poolings_are_refused(client):
    with pytest.raises(TypeError, match="unknown option 'temperature'"):
        client.embed(TEXTS, temperature=1)
    with pytest.raises(InvalidArgumentError, match="pooling is one of cls, mean"):
        client.embed(TEXTS, pooling="max")
    with pytest.raises(InvalidArgumentError, match="dimensions is at most 64"):
        client.embed(TEXTS, dimensions=65)


def test_a_classifier_is_swapped_under_load_without_a_wrong_label(client, served, adapters, base, tmp_path):
    """Each answer has the numbers of the revision that it names."""
    other = save_task_adapter("p-tuning-v2", "SEQ_CLS", "bert", base, tmp_path / "other")
    folders = [adapters["lora-SEQ_CLS"], other]
    client.load_adapter("swapped", str(folders[0]))
    expected = {}
    for folder in folders:
        revision = client.load_adapter("swapped", str(folder)).revision
        expected[revision] = client.classify(TEXTS, adapter="swapped").results
    assert len(expected) == 2
    stop, seen, wrong = threading.Event(), Counter(), []

    def ask() -> None:
        with Client(served.address) as own:
            while not stop.is_set():
                found = own.classify(TEXTS, adapter="swapped")
                seen[found.revision] += 1
                if found.results != expected[found.revision]:
                    wrong.append(found)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask) for _ in range(4)]
        for number in range(12):
            before = sum(seen.values())
            client.load_adapter("swapped", str(folders[number % 2]))
            while sum(seen.values()) < before + 4 and not any(each.done() for each in running):
                time.sleep(0.01)
        stop.set()
        for each in running:
            each.result()
    assert wrong == []
    assert set(seen) == set(expected)


def test_a_decoder_writes_classifies_and_embeds_in_one_batch(tmp_path, quantised_cache):
    base = save_base("llama", tmp_path / "base")
    adapter = save_task_adapter("lora", "SEQ_CLS", "llama", base, tmp_path / "classes")
    config = ServerConfig(
        model=str(base), dtype="float32", device="cpu", memory="16MiB", cache=quantised_cache
    )
    with serving(config) as served, Client(served.address) as client:
        client.load_adapter("classes", str(adapter))
        calls = [
            lambda: client.generate(TEXTS[0], max_tokens=20).token_ids,
            lambda: client.classify(TEXTS, adapter="classes").results,
            lambda: client.embed(TEXTS).vectors,
            lambda: client.embed(TEXTS, pooling="mean").vectors,
        ]
        alone = [call() for call in calls]
        with ThreadPoolExecutor(len(calls) * 3) as pool:
            mixed = list(pool.map(lambda call: call(), calls * 3))
        assert mixed == alone * 3
        assert client.embed(TEXTS, pooling="last").vectors == alone[2]
        served.parts.engine.check_integrity()
