from __future__ import annotations

import asyncio
from array import array
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TokenClassificationPipeline

from support.tokenizers import make_tokenizer
from turret_adapters.spec import Problem
from turret_server.engine.admission import TenantLimits
from turret_server.engine.pooling import Rows
from turret_server.engine.request import FinishReason as EngineEnd
from turret_server.engine.request import Output
from turret_server.errors import (
    InvalidRequestError,
    OutOfMemoryError,
    PromptTooLongError,
    QuotaExceededError,
)
from turret_server.serving.pooling import _scores, _spans
from turret_server.serving.request import AdapterRef, EmbedRequest, TaggedToken, TextBatch, Usage

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC", "B-", "I"]
TOKENIZER = make_tokenizer()
TEXT = "the quick brown fox jumps over the lazy dog"


def test_scores_follow_from_the_problem():
    logits = np.array([[1000.0, -1000.0], [0.0, 1.0]])
    share = np.e / (1 + np.e)
    assert _scores(logits, Problem.SINGLE_LABEL) == pytest.approx(np.array([[1, 0], [1 - share, share]]))
    assert _scores(logits, Problem.MULTI_LABEL) == pytest.approx(np.array([[1, 0], [0.5, share]]))
    assert _scores(logits, Problem.REGRESSION) is logits


@given(st.lists(st.sampled_from(LABELS), min_size=1, max_size=12), st.randoms())
def test_spans_are_those_of_transformers(labels, random):
    encoded = TOKENIZER.backend_tokenizer.encode(TEXT)
    tokens = [
        TaggedToken(token_id=token_id, label=label, score=random.random(), start=start, end=end)
        for token_id, label, (start, end) in zip(encoded.ids, labels, encoded.offsets, strict=False)
    ]
    pipeline = object.__new__(TokenClassificationPipeline)
    pipeline.tokenizer = TOKENIZER
    entities = [
        {
            "entity": token.label,
            "score": np.float64(token.score),
            "word": TOKENIZER.convert_ids_to_tokens(token.token_id),
            "start": token.start,
            "end": token.end,
        }
        for token in tokens
    ]
    expected = [
        (group["entity_group"], float(group["score"]), group["start"], group["end"])
        for group in pipeline.group_entities(entities)
        if group["entity_group"] != "O"
    ]
    found = _spans(tokens, [TEXT])
    assert [(span.label, span.score, span.start, span.end) for span in found] == expected
    assert all(span.text == TEXT[span.start : span.end] for span in found)


def test_a_span_ends_with_its_text():
    tokens = [
        TaggedToken(token_id=5, label="I-PER", score=0.5, source=source, start=0, end=3) for source in (0, 1)
    ]
    assert [span.text for span in _spans(tokens, ["the fox", "dog"])] == ["the", "dog"]


def test_token_ids_have_no_spans():
    assert _spans([TaggedToken(token_id=5, label="I-PER", score=0.5)], []) == []


ROWS = Output(finish_reason=EngineEnd.POOLED, rows=Rows(2, array("d", [3.0, 4.0])), cached_tokens=2)


@pytest.fixture
def computed(services):
    services.engine.outputs = [ROWS]
    return services


async def test_inputs_become_jobs_of_one_request(computed, admin):
    batch = TextBatch(
        inputs=[[5, 6], [7]],
        adapters=[AdapterRef(name="poet")],
        priority=3,
        cache_salt="salt",
        deadline=12.0,
    )
    found = await computed.pooling.embed(EmbedRequest(batch=batch), admin)
    assert found.vectors.tolist() == pytest.approx(np.array([[0.6, 0.8]] * 2))
    assert found.usage == Usage(prompt_tokens=3, cached_tokens=4, generated_tokens=0)
    assert found.revision == "1" * 32
    jobs = computed.engine.jobs
    assert [job.prompt_token_ids for job in jobs] == [(5, 6), (7,)]
    assert len({job.request_id for job in jobs}) == 2
    assert {(job.priority, job.cache_salt, job.deadline) for job in jobs} == {(3, "acme/salt", 12.0)}
    [entry] = computed.usage.entries
    assert (entry["prompt_tokens"], entry["cached_tokens"], entry["finish_reason"]) == (3, 4, "pooled")
    assert computed.used("acme", "poet", "prompt") == 3
    assert computed.count("ok") == 1
    assert computed.registry.status("poet").active_requests == 0


async def test_results_are_in_the_order_of_the_inputs(services, admin):
    request = replace(request_of([[5], [6]]), normalize=False)
    task = asyncio.create_task(services.pooling.embed(request, admin))
    first, second = [await services.engine.arrivals.get() for _ in range(2)]
    for job, value in ((second, 2.0), (first, 1.0)):
        job.sink(Output(finish_reason=EngineEnd.POOLED, rows=Rows(2, array("d", [value, 0.0]))))
    assert (await task).vectors[:, 0].tolist() == [1.0, 2.0]


async def test_a_call_that_is_cancelled_cancels_its_jobs(services, admin):
    task = asyncio.create_task(services.pooling.embed(request_of([[5], [6]], "poet"), admin))
    jobs = [await services.engine.arrivals.get() for _ in range(2)]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {each for kind, each in services.engine.calls if kind == "cancel"} == {
        job.request_id for job in jobs
    }
    assert services.registry.status("poet").active_requests == 0


async def test_an_input_that_fails_ends_the_call_and_the_others(services, admin):
    services.engine.outputs = [Output(finish_reason=EngineEnd.FAILED, error=OutOfMemoryError("no memory"))]
    with pytest.raises(OutOfMemoryError):
        await services.pooling.embed(request_of([[5], [6]]), admin)
    assert len([kind for kind, _ in services.engine.calls if kind == "cancel"]) == 2
    assert services.count("out_of_memory") == 1


async def test_all_inputs_are_charged_together(computed, caller_of):
    caller = caller_of(tokens_per_minute=5)
    await computed.pooling.embed(request_of([[5, 6], [7]]), caller)
    with pytest.raises(QuotaExceededError):
        await computed.pooling.embed(request_of([[5, 6], [7]]), caller)
    await computed.pooling.embed(request_of([[5, 6]]), caller)


async def test_more_tokens_than_the_tenant_may_queue_are_refused(computed, caller_of):
    caller = caller_of(limits=TenantLimits(max_queued_tokens=3, max_queued_requests=2))
    await computed.pooling.embed(request_of([[5, 6], [7]]), caller)
    with pytest.raises(InvalidRequestError, match="at most 3 tokens"):
        await computed.pooling.embed(request_of([[5, 6], [7, 8]]), caller)
    with pytest.raises(InvalidRequestError, match="at most 2 inputs"):
        await computed.pooling.embed(request_of([[5]] * 3), caller)
    assert len(computed.engine.jobs) == 2


async def test_a_decoders_head_reads_the_last_token_before_the_padding(computed, admin):
    batch = TextBatch(inputs=[[5, 2, 6, 2, 2], [2, 2]], adapters=[AdapterRef(name="judge")])
    await computed.pooling.classify(batch, admin)
    assert [job.prompt_token_ids for job in computed.engine.jobs] == [(5, 2, 6), (2,)]
    await computed.pooling.embed(request_of([[5, 2]]), admin)
    assert computed.engine.jobs[-1].prompt_token_ids == (5, 2)


async def test_an_input_may_fill_the_context_beside_virtual_tokens(computed, admin):
    await computed.pooling.embed(request_of([[5] * 62], "first"), admin)
    with pytest.raises(PromptTooLongError, match=r"inputs\[0\]: "):
        await computed.pooling.embed(request_of([[5] * 63], "first"), admin)
    cut = TextBatch(inputs=[[5] * 90], adapters=[AdapterRef(name="first")], truncate=True)
    await computed.pooling.embed(EmbedRequest(batch=cut), admin)
    assert [len(job.prompt_token_ids) for job in computed.engine.jobs] == [62, 62]


def request_of(inputs, *adapters):
    return EmbedRequest(batch=TextBatch(inputs=inputs, adapters=[AdapterRef(name=name) for name in adapters]))


async def test_texts_for_vectors_are_cut_to_the_length_that_the_model_was_trained_with(computed, admin):
    computed.pooling._pooling = replace(computed.pooling._pooling, max_tokens=5)
    batch = TextBatch(inputs=[[5] * 9], truncate=True)
    await computed.pooling.embed(EmbedRequest(batch=batch), admin)
    await computed.pooling.embed(request_of([[5] * 9]), admin)
    await computed.pooling.classify(replace(batch, adapters=[AdapterRef(name="judge")]), admin)
    assert [len(job.prompt_token_ids) for job in computed.engine.jobs] == [5, 9, 9]


async def test_the_label_is_the_likeliest_where_scores_are_the_same(computed, admin):
    computed.engine.outputs = [replace(ROWS, rows=Rows(2, array("d", [800.0, 900.0])))]
    found = await computed.pooling.classify(
        TextBatch(inputs=[[5]], adapters=[AdapterRef(name="judge")]), admin
    )
    alike = replace(found, scores=np.ones((1, 2)))
    assert alike.label(0) == "LABEL_1"


async def test_a_refusal_is_counted_like_any_other(computed, admin):
    with pytest.raises(InvalidRequestError, match="dimensions is at most 2"):
        await computed.pooling.embed(replace(request_of([[5]]), dimensions=3), admin)
    assert computed.count("invalid_request") == 1
