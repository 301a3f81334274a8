from __future__ import annotations

from dataclasses import replace

import pytest

from turret_server.errors import PromptTooLongError
from turret_server.serving.model_info import ModelInfo

MODEL = ModelInfo(max_context=1000, block_size=16)


def test_without_max_tokens_the_answer_has_a_default_length_that_fits_into_the_context():
    assert MODEL.max_tokens(None, 100) == 256
    assert MODEL.max_tokens(None, 900) == 100
    assert MODEL.max_tokens(None, 999) == 1
    with pytest.raises(PromptTooLongError):
        MODEL.max_tokens(None, 1000)


def test_max_tokens_beyond_the_context_are_refused():
    assert MODEL.max_tokens(100, 900) == 100
    with pytest.raises(PromptTooLongError) as refused:
        MODEL.max_tokens(101, 900)
    assert refused.value.metadata == {"max_context": "1000", "prompt_tokens": "900", "max_tokens": "101"}


def test_the_refusal_says_why_the_context_ends_there():
    model = replace(MODEL, context_note=", beyond which it would change")
    said = (
        "^the model's context has 1000 tokens, beyond which it would change; prompt and virtual tokens take"
    )
    with pytest.raises(PromptTooLongError, match=said):
        model.check_room(900, 101)


def test_the_default_length_is_not_below_the_fewest_tokens_that_are_wanted():
    assert MODEL.max_tokens(None, 100, 300) == 300
    assert MODEL.max_tokens(None, 100, 20) == 256
    with pytest.raises(PromptTooLongError):
        MODEL.max_tokens(None, 800, 201)
