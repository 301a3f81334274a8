from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TokenClassificationPipeline

from support.tokenizers import make_tokenizer
from turret_adapters.spec import Problem
from turret_server.serving.pooling import _scores, _spans
from turret_server.serving.request import TaggedToken

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
