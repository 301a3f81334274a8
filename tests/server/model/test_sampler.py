from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import MinPLogitsWarper

from support.device_traces import Waits
from turret_server.engine.request import LogitAdjustment, SamplingParams
from turret_server.engine.step import SequenceStep
from turret_server.errors import StructuredOutputError
from turret_server.model import sampler as sampler_module
from turret_server.model.sampler import Sampler, _uniform


def step(sequence_id: int = 0, num_generated: int = 0, **sampling) -> SequenceStep:
    return SequenceStep(
        sequence_id=sequence_id,
        token_ids=(1,),
        start=0,
        block_table=(0,),
        sampling=SamplingParams(max_tokens=1, **sampling),
        num_generated=num_generated,
    )


def draw(logits: torch.Tensor, count: int = 400, **sampling) -> torch.Tensor:
    """How often each token comes, over many positions."""
    steps = [step(index, index, **sampling) for index in range(count)]
    tokens = Sampler().sample(logits.expand(count, -1), steps).token_ids
    return torch.bincount(torch.tensor(list(tokens.values())), minlength=len(logits)) / count


def test_temperature_0_takes_the_best():
    logits = torch.randn(5, 30)
    result = Sampler().sample(logits, [step(index) for index in range(5)])
    assert [result.token_ids[index] for index in range(5)] == logits.argmax(-1).tolist()


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    torch.testing.assert_close(
        draw(probabilities.log(), 4000, temperature=1.0), probabilities, atol=0.03, rtol=0
    )


def test_temperature_flattens():
    logits = torch.tensor([2.0, 0.0])
    torch.testing.assert_close(
        draw(logits, 4000, temperature=2.0), torch.softmax(logits / 2, -1), atol=0.03, rtol=0
    )


def test_top_k_keeps_the_k_best():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9, 2.0])
    assert draw(logits, temperature=5.0, top_k=2).nonzero().flatten().tolist() == [1, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert draw(logits, temperature=1.0, top_p=0.5).nonzero().flatten().tolist() == [0]
    assert draw(logits, temperature=1.0, top_p=0.51).nonzero().flatten().tolist() == [0, 1]
    assert draw(logits, temperature=1.0, top_p=0.81).nonzero().flatten().tolist() == [0, 1, 2]


def test_top_p_counts_within_top_k():
    """As in transformers: 0.5 of what top-k leaves is the first token, though it is 0.4 of all."""
    logits = torch.tensor([0.4, 0.35, 0.25]).log()
    assert draw(logits, temperature=1.0, top_k=2, top_p=0.5).nonzero().flatten().tolist() == [0]


def test_a_token_depends_on_its_seed_and_position_and_not_on_the_batch():
    logits = torch.randn(1, 100)

    def one(seed: int, position: int, company: int = 0) -> int:
        steps = [step(index, position, temperature=1.0, seed=1000 + index) for index in range(1, company + 1)]
        target = step(0, position, temperature=1.0, seed=seed)
        rows = torch.cat([torch.randn(company, 100), logits])
        return Sampler().sample(rows, [*steps, target]).token_ids[0]

    assert one(7, 3) == one(7, 3) == one(7, 3, company=5)
    assert len({one(7, position) for position in range(20)}) > 5
    assert len({one(seed, 3) for seed in range(20)}) > 5


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}, {"top_k": 40}, {"top_k": 40, "top_p": 0.9}])
def test_a_token_is_that_in_whose_part_of_the_kept_weights_its_number_lies(sampling):
    """Computed again without tensors, in exact arithmetic but for the exponential."""
    logits = torch.randn(6, 90) * 3
    steps = [step(index, index, temperature=0.7, seed=3, **sampling) for index in range(6)]
    found = Sampler().sample(logits, steps).token_ids
    for index, row in enumerate(logits.tolist()):
        weights = [(math.exp((logit - max(row)) / 0.7), token) for token, logit in enumerate(row)]
        if sampling:
            weights = sorted(weights, key=lambda it: -it[0])[: sampling.get("top_k", 90)]
        most = sampling.get("top_p", 1.0) * math.fsum(weight for weight, _ in weights)
        before = [math.fsum(weight for weight, _ in weights[:place]) for place in range(len(weights))]
        kept = [it for it, below in zip(weights, before, strict=True) if below < most]
        left = _uniform(3, index) * math.fsum(weight for weight, _ in kept)
        expected = next(token for place, (weight, token) in enumerate(kept) if left < before[place] + weight)
        assert found[index] == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(temperature, share):
    logits = torch.randn(25) * 2
    scores = MinPLogitsWarper(share)(torch.zeros(1, 1, dtype=torch.long), logits[None] / temperature)
    kept = scores[0].isfinite().nonzero().flatten().tolist()
    frequencies = draw(logits, 4000, temperature=temperature, min_p=share)
    assert set(frequencies.nonzero().flatten().tolist()) <= set(kept)
    torch.testing.assert_close(frequencies, scores[0].softmax(-1), atol=0.03, rtol=0)


def test_top_p_counts_within_min_p():
    """As in vLLM: without min-p, the first two tokens are less than 0.8 of all."""
    logits = torch.tensor([0.45, 0.3, 0.1, 0.08, 0.07]).log()
    within = draw(logits, temperature=1.0, min_p=0.5, top_p=0.8)
    assert within.nonzero().flatten().tolist() == [0, 1]
    alone = draw(logits, temperature=1.0, top_p=0.8)
    assert alone.nonzero().flatten().tolist() == [0, 1, 2]


def test_the_temperature_is_applied_before_min_p():
    logits = torch.tensor([0.7, 0.3]).log()
    assert draw(logits, temperature=1.0, min_p=0.5).nonzero().flatten().tolist() == [0]
    assert draw(logits, temperature=2.0, min_p=0.5).nonzero().flatten().tolist() == [0, 1]


def test_an_adjustment_decides_what_is_likeliest_and_what_is_drawn():
    logits = torch.tensor([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0], [1.0, 5.0, 2.0]])
    adjustment = LogitAdjustment(logit_bias={1: -100.0})
    steps = [step(0, adjustment=adjustment), step(1), step(2, temperature=0.01, adjustment=adjustment)]
    assert Sampler().sample(logits, steps).token_ids == {0: 2, 1: 1, 2: 2}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_log_probabilities_are_those_of_the_logits_before_any_adjustment(sampling):
    logits = torch.randn(4, 50)
    adjustment = LogitAdjustment(logit_bias={3: 20.0})
    steps = [
        step(0, **sampling),
        step(1, logprobs=0, adjustment=adjustment, **sampling),
        step(2, logprobs=3, **sampling),
        step(3, **sampling),
    ]
    result = Sampler().sample(logits.clone(), steps)
    assert result.logprobs.keys() == {1, 2}
    expected = logits.log_softmax(-1)
    assert result.token_ids[1] == 3
    assert result.logprobs[1].logprob == pytest.approx(expected[1, 3].item())
    assert result.logprobs[1].top == ()
    assert result.logprobs[2].token_id == result.token_ids[2]
    assert [token_id for token_id, _ in result.logprobs[2].top] == logits[2].topk(3).indices.tolist()


def test_log_probabilities_of_a_vocabulary_do_not_depend_on_the_wider_ones_of_others():
    logits = torch.randn(3, 333)
    logits[1, 301:] = -torch.inf
    steps = [step(index, logprobs=5) for index in range(3)]
    steps[1] = replace(steps[1], vocab_size=301)
    together = Sampler().sample(logits, steps)
    alone = Sampler().sample(logits[1:2, :301], [step(1, logprobs=5)])
    assert together.logprobs[1] == alone.logprobs[1]
    assert together.logprobs.keys() == {0, 1, 2}


LARGEST = math.nextafter(1.0, 0.0)
# Of a token with the smallest weight that is not 0, beside one whose logit is 0.
LEAST = 0.005 - math.log(sampler_module._MAX_WEIGHT)


@pytest.mark.parametrize(
    ("number", "logits", "top_k", "expected"),
    [
        pytest.param(LARGEST, [0.0, LEAST], 0, 1, id="the least likely of all"),
        pytest.param(LARGEST, [0.0, LEAST, LEAST - 9.0], 2, 1, id="the least likely of those kept"),
        pytest.param(0.0, [LEAST, 0.0], 0, 0, id="the first of all"),
        pytest.param(LARGEST, [0.0] * 20_001, 20_000, 19_999, id="the last of many that are kept"),
        pytest.param(LARGEST, [0.0] * 20_001, 0, 20_000, id="the last of many"),
    ],
)
def test_the_first_and_the_last_number_draw_tokens_that_are_kept(
    number, logits, top_k, expected, monkeypatch
):
    monkeypatch.setattr(sampler_module, "_uniform", lambda *_: number)
    one = step(temperature=1.0, top_k=top_k)
    assert Sampler().sample(torch.tensor([logits]), [one]).token_ids == {0: expected}


def test_any_mixture_of_parameters_gives_each_row_what_it_gets_alone():
    logits = torch.randn(40, 300)
    choices = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 7},
        {"temperature": 2.0, "top_p": 0.6},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.9},
        {"adjustment": LogitAdjustment(logit_bias={3: 3.0}), "logprobs": 2},
        {"temperature": 1.5, "min_p": 0.1, "logprobs": 0},
        {"temperature": 1.5, "min_p": 0.1, "top_k": 9, "adjustment": LogitAdjustment(logit_bias={3: 3.0})},
    ]
    steps = [step(index, index % 7, seed=index, **choices[index % len(choices)]) for index in range(40)]
    together = Sampler().sample(logits, steps)
    for index, one in enumerate(steps):
        alone = Sampler().sample(logits[index : index + 1], [one])
        assert alone.token_ids == {index: together.token_ids[index]}
        assert alone.logprobs.get(index) == together.logprobs.get(index)


def test_of_equal_logits_every_one_is_drawn():
    assert (draw(torch.zeros(5), 4000, temperature=1.0) > 0.15).all()
    assert (draw(torch.zeros(5), 4000, temperature=1.0, top_p=0.99) > 0.15).all()


def test_a_vocabulary_that_is_large_and_flat_does_not_overflow():
    token = Sampler().sample(torch.zeros(1, 2**18), [step(temperature=1.0, top_p=0.999)]).token_ids[0]
    assert 0 < token < 2**18


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_any_temperature_is_served(temperature):
    logits = torch.tensor([[3.0, -float("inf"), 2.5, -1e30]])
    token = Sampler().sample(logits, [step(temperature=temperature)]).token_ids[0]
    assert token == 0 if temperature < 1 else token in {0, 2, 3}


def test_the_host_waits_once_for_all_tokens_of_a_step():
    """What reads a number of the device, or has a shape that depends on one, waits for it."""
    with Waits() as waits:
        steps = [step(0), step(1, temperature=1.0), step(2, temperature=1.0, top_p=0.5)]
        Sampler().sample(torch.randn(3, 30), steps)
    assert waits.found == ["tolist"]
    with Waits() as waits:
        steps = [
            step(0, logprobs=2),
            step(1, temperature=1.0, min_p=0.5, adjustment=LogitAdjustment(min_tokens=2)),
        ]
        Sampler().sample(torch.randn(2, 30), steps)
    assert waits.found == ["tolist", "tolist"], "log probabilities are the second"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_finite_logits_fails_alone(bad):
    logits = torch.randn(3, 10)
    logits[1] = bad
    for sampling in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}):
        result = Sampler().sample(logits, [step(index, **sampling) for index in range(3)])
        assert set(result.token_ids) == {0, 2}
        assert set(result.errors) == {1}
        scored = Sampler().sample(logits, [step(index, logprobs=1, **sampling) for index in range(3)])
        assert scored.logprobs.keys() == {0, 2}


# The form of an answer


def form(*token_ids: int, size: int = 64):
    """The bits of the tokens that an answer's form allows."""
    bits = bytearray(size // 8)
    for token_id in token_ids:
        bits[token_id // 8] |= 1 << token_id % 8
    return lambda: bytes(bits)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}])
def test_only_tokens_that_the_form_allows_are_sampled(sampling):
    logits = torch.tensor([[3.0, 2.0, 1.0, 2.5, 0.0]]).repeat(40, 1)
    steps = [replace(step(index, index, **sampling), allowed=form(1, 2, 3)) for index in range(39)]
    tokens = Sampler().sample(logits, [*steps, step(39, 39)]).token_ids
    assert tokens.pop(39) == 0, "a neighbour without a form"
    assert set(tokens.values()) == ({3} if not sampling else {1, 3} if "top_k" in sampling else {1, 2, 3})


def test_a_form_allows_nothing_beyond_its_bits():
    logits = torch.zeros(1, 40)
    logits[0, 35] = 9.0
    logits[0, 7] = 1.0
    found = Sampler().sample(logits, [replace(step(), allowed=form(*range(32), size=32))])
    assert found.token_ids == {0: 7}


def test_forms_of_vocabularies_of_different_sizes_share_a_step():
    logits = torch.arange(96.0).repeat(2, 1)
    steps = [replace(step(0), allowed=form(3, 5)), replace(step(1), allowed=form(3, 90, size=96))]
    assert Sampler().sample(logits, steps).token_ids == {0: 5, 1: 90}


def test_an_answer_that_cannot_keep_its_form_fails_alone():
    def broken():
        raise StructuredOutputError("too complex")

    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = Sampler().sample(logits, [replace(step(0, logprobs=1), allowed=broken), step(1)])
    assert found.token_ids == {1: 0}
    assert str(found.errors[0]) == "too complex"
    assert not found.logprobs


def test_log_probabilities_do_not_know_of_the_form():
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    [alone] = Sampler().sample(logits.clone(), [step(logprobs=3)]).logprobs.values()
    [found] = Sampler().sample(logits, [replace(step(logprobs=3), allowed=form(0, 2))]).logprobs.values()
    assert found.token_id == 2
    assert found.top == alone.top
