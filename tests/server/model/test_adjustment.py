"""Adjusted logits are those of transformers' processors, row by row, whatever the other rows want."""

from __future__ import annotations

from array import array

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from support.device_traces import Waits
from turret_server.engine.request import LogitAdjustment, SamplingParams
from turret_server.engine.step import SequenceStep
from turret_server.model.adjustment import adjust

SIZE = 60
PROMPT = [5, 6, 6, 7, 30]
ANSWER = [6, 8, 8, 8, 30]


def step(adjustment, prompt=PROMPT, answer=ANSWER, excluded=(), sequence_id=0):
    has_penalties = adjustment is not None and adjustment.has_penalties
    return SequenceStep(
        sequence_id=sequence_id,
        token_ids=(1,),
        start=0,
        block_table=(0,),
        sampling=SamplingParams(max_tokens=99, adjustment=adjustment),
        num_generated=len(answer),
        history=array("q", [*prompt, *answer]) if has_penalties else None,
        excluded=frozenset(excluded),
    )


def adjusted(logits, *steps):
    found = logits.clone()
    adjust(found, steps)
    return found


@pytest.fixture
def logits():
    torch.manual_seed(3)
    return torch.randn(1, SIZE) * 4


@pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0])
def test_the_repetition_penalty_is_transformers(logits, penalty):
    found = adjusted(logits, step(LogitAdjustment(repetition_penalty=penalty)))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[*PROMPT, *ANSWER]]), logits)
    assert torch.equal(found, expected)


def test_biases_are_transformers(logits):
    bias = {0: -100.0, 7: 2.5, SIZE - 1: 0.25}
    found = adjusted(logits, step(LogitAdjustment(logit_bias=bias)))
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    assert torch.equal(found, processor(torch.tensor([PROMPT]), logits))


def test_tokens_that_end_an_answer_too_early_are_excluded_as_by_transformers(logits):
    excluded = {1, 40}
    found = adjusted(logits, step(LogitAdjustment(min_tokens=6), excluded=excluded))
    processor = MinLengthLogitsProcessor(min_length=99, eos_token_id=sorted(excluded))
    assert torch.equal(found, processor(torch.tensor([PROMPT]), logits))


def test_a_token_that_the_model_does_not_have_is_excluded_from_nothing(logits):
    two = logits.repeat(2, 1)
    steps = [step(LogitAdjustment(min_tokens=6), excluded={SIZE + 3}), step(None)]
    assert torch.equal(adjusted(two, *steps), two)


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.0), (0.0, 1.25), (-2.0, 2.0)])
def test_penalties_of_the_answer_count_its_tokens_and_not_the_prompts(logits, frequency, presence):
    """As OpenAI and vLLM define them; transformers has none."""
    found = adjusted(logits, step(LogitAdjustment(frequency_penalty=frequency, presence_penalty=presence)))
    expected = logits[0].tolist()
    for token in set(ANSWER):
        expected[token] -= frequency * ANSWER.count(token) + presence
    torch.testing.assert_close(found[0], torch.tensor(expected))
    untouched = [token for token in range(SIZE) if token not in ANSWER]
    assert torch.equal(found[0, untouched], logits[0, untouched])


def test_all_together_come_in_the_order_of_vllm(logits):
    """Exclusions, biases, the repetition penalty (to here as in transformers), then the others."""
    bias = {6: 1.5, 8: -3.0, 9: 4.0}
    adjustment = LogitAdjustment(
        min_tokens=9, logit_bias=bias, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.25
    )
    found = adjusted(logits, step(adjustment, excluded={8, 1}))
    processors = LogitsProcessorList(
        [
            MinLengthLogitsProcessor(99, [1, 8]),
            SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
            RepetitionPenaltyLogitsProcessor(1.5),
        ]
    )
    expected = processors(torch.tensor([[*PROMPT, *ANSWER]]), logits)
    for token in set(ANSWER):
        expected[0, token] -= 0.5 * ANSWER.count(token)
        expected[0, token] -= 0.25
    assert torch.equal(found, expected)


def test_a_tiny_penalty_makes_no_infinities():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    found = adjusted(logits, step(LogitAdjustment(repetition_penalty=1e-38), prompt=[1], answer=[]))
    assert found.isfinite().all()
    assert found.argmax() == 1


ADJUSTMENTS = [
    None,
    LogitAdjustment(repetition_penalty=1.3),
    LogitAdjustment(logit_bias={4: 2.0, 9: -1.0}),
    LogitAdjustment(min_tokens=30),
    LogitAdjustment(frequency_penalty=0.7, logit_bias={4: -2.0}),
    LogitAdjustment(presence_penalty=1.0, repetition_penalty=0.9, min_tokens=30),
]


def test_a_row_gets_the_same_alone_and_in_company_to_the_bit():
    logits = torch.randn(30, SIZE)
    steps = [
        step(
            ADJUSTMENTS[index % len(ADJUSTMENTS)],
            prompt=list(range(index)),
            answer=list(range(index // 2)),
            excluded={2, 3} if index % 2 else (),
        )
        for index in range(30)
    ]
    together = adjusted(logits, *steps)
    for row, alone in enumerate(steps):
        assert torch.equal(adjusted(logits[row : row + 1], alone)[0], together[row])


def test_rows_without_adjustment_are_not_touched():
    logits = torch.randn(3, SIZE)
    found = adjusted(logits, step(None), step(ADJUSTMENTS[1]), step(None))
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    assert not torch.equal(found[1], logits[1])


def test_the_host_never_waits():
    logits = torch.randn(len(ADJUSTMENTS), SIZE)
    with Waits() as waits:
        adjust(logits, [step(each, excluded={2}) for each in ADJUSTMENTS])
    assert waits.found == []
