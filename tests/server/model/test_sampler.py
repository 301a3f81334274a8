from __future__ import annotations

import pytest
import torch

from turret_server.engine.request import SamplingParams
from turret_server.engine.step import SequenceStep
from turret_server.model.sampler import Sampler


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_finite_logits_fails_alone(bad):
    logits = torch.randn(3, 10)
    logits[1] = bad
    result = Sampler().sample(logits, [step(index) for index in range(3)])
    assert set(result.token_ids) == {0, 2}
    assert set(result.errors) == {1}
