from __future__ import annotations

import math

import pytest
import torch

from turret_server.model.logprobs import score, unpack

LOGITS = torch.tensor([[0.5, 3.0, -1.0, 2.0, -torch.inf], [1.0, 1.0, 0.0, -2.0, 4.0]])


def test_they_are_the_softmax_of_the_logits():
    rows = score(LOGITS, torch.tensor([3, 2]), with_top=True).tolist()
    expected = LOGITS.double().log_softmax(-1)
    first, second = unpack(rows[0], 3, 2), unpack(rows[1], 2, 1)
    assert (first.token_id, first.rank) == (3, 2)
    assert first.logprob == pytest.approx(expected[0, 3].item(), abs=1e-6)
    assert [token_id for token_id, _ in first.top] == [1, 3]
    assert [each for _, each in first.top] == pytest.approx(expected[0, [1, 3]].tolist(), abs=1e-6)
    assert (second.token_id, second.rank, second.top[0][0]) == (2, 4, 4)


def test_the_likeliest_has_the_first_rank_also_where_others_are_as_likely():
    rows = score(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([1]), with_top=False).tolist()
    assert unpack(rows[0], 1, 0).rank == 1


def test_no_more_likeliest_tokens_come_than_the_vocabulary_has():
    """Those beyond an adapter's own vocabulary are minus infinity."""
    [row, _] = score(LOGITS, torch.tensor([3, 2]), with_top=True).tolist()
    assert [token_id for token_id, _ in unpack(row, 3, 20).top] == [1, 3, 0, 2]


def test_without_likeliest_tokens_none_are_computed():
    assert score(LOGITS, torch.tensor([3, 2]), with_top=False).shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_alone_and_in_company_to_the_bit(dtype):
    torch.manual_seed(0)
    logits, token_ids = (torch.randn(33, 5000) * 3).to(dtype), torch.arange(33)
    together = score(logits, token_ids, with_top=True)
    for row in range(33):
        alone = score(logits[row : row + 1], token_ids[row : row + 1], with_top=True)
        assert torch.equal(alone[0, :2], together[row, :2])
        if dtype is torch.float32:  # otherwise many are equal, and any of them comes
            assert torch.equal(alone[0], together[row])
    plain = score(logits, token_ids, with_top=False)
    assert torch.equal(plain, together[:, :2])


def test_large_token_ids_and_ranks_are_exact():
    logits = torch.zeros(1, 2**18 + 3)
    logits[0, 2**18 + 1] = 5.0
    rows = score(logits, torch.tensor([2**18 + 1]), with_top=True).tolist()
    found = unpack(rows[0], 2**18 + 1, 1)
    assert (found.rank, found.top[0][0]) == (1, 2**18 + 1)
    assert math.isfinite(found.logprob)
