"""From a step to the tensors of a forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from turret_server.engine.request import SamplingParams
from turret_server.engine.step import VIRTUAL_TOKEN, SequenceStep, Step
from turret_server.model.batch import make_batch
from turret_server.model.deltas import GatheredRows, ResidentDeltas

SAMPLING = SamplingParams(max_tokens=1)
NO_ROWS = ResidentDeltas(lora={}, others={})


def batch_of(*sequences: SequenceStep, resident=None):
    device = torch.device("cpu")
    return make_batch(Step(sequences=sequences), resident or {}, GatheredRows(), block_size=4, device=device)


def test_tokens_lie_end_to_end_each_with_its_position_page_and_slot():
    batch = batch_of(
        SequenceStep(sequence_id=1, token_ids=(11, 12, 13), start=2, block_table=(7, 5, 9)),
        SequenceStep(sequence_id=2, token_ids=(21,), start=8, block_table=(3, 1, 4), sampling=SAMPLING),
    )
    assert batch.token_ids_T.tolist() == [11, 12, 13, 21]
    assert batch.positions_T.tolist() == [2, 3, 4, 8]
    attention = batch.attention
    assert attention.query_bounds.tolist() == [0, 3, 4]
    assert attention.context_lengths_Q.tolist() == [5, 9]
    assert attention.block_tables_QM.tolist() == [[7, 5, 0], [3, 1, 4]]
    assert attention.pages_T.tolist() == [7, 7, 5, 4]
    assert attention.slots_T.tolist() == [2, 3, 0, 0]
    assert [sequence.sequence_id for sequence in batch.sampled] == [2]
    assert batch.logits_R.tolist() == [3]
    assert batch.deltas is None


def test_virtual_tokens_are_read_as_some_token_and_say_whose_they_are():
    batch = batch_of(
        SequenceStep(sequence_id=1, token_ids=(11,), start=0, block_table=(1,)),
        SequenceStep(
            sequence_id=2, token_ids=(VIRTUAL_TOKEN, 5), start=3, block_table=(2, 3), prompt="revision"
        ),
    )
    assert batch.token_ids_T.tolist() == [11, 0, 5]
    assert batch.virtual == ((1, "revision", 3),)


def using(sequence_id: int, *adapters: tuple[str, float], active_from: int = 0, **options) -> SequenceStep:
    """Two tokens, at positions 4 and 5."""
    return SequenceStep(
        **{
            "sequence_id": sequence_id,
            "token_ids": (1, 2),
            "start": 4,
            "block_table": (1, 2),
            "adapters": adapters,
            "active_from": active_from,
            **options,
        }
    )


def bounds(deltas) -> list[tuple[int, int]]:
    return [(segment.start, segment.end) for segment in deltas.segments] if deltas else []


def segments_of(*sequences: SequenceStep) -> list[tuple[int, int]]:
    return bounds(batch_of(*sequences, resident=dict.fromkeys("abc", NO_ROWS)).deltas)


def test_neighbours_with_the_same_adapters_are_one_segment_of_what_is_active():
    a, b, c = ("a", 1.0), ("b", 1.0), ("c", 1.0)
    assert segments_of(using(1, b), using(2, a), using(3, b), using(4, c, active_from=5)) == [
        (0, 2),
        (2, 6),
        (7, 8),
    ]


def test_neighbours_of_an_activated_lora_stay_apart_where_a_gap_lies_between():
    a = ("a", 1.0)
    assert segments_of(using(1, a), using(2, a, active_from=5), using(3, a)) == [(0, 2), (3, 6)]


def test_the_same_adapter_with_another_weight_is_another_segment():
    assert segments_of(using(1, ("a", 1.0)), using(2, ("a", 0.5))) == [(0, 2), (2, 4)]
    both = ("a", 1.0), ("b", 1.0)
    assert segments_of(using(1, *both), using(2, *both[:1]), using(3, *both)) == [(0, 2), (2, 6)]


@pytest.mark.parametrize(
    ("active_from", "expected"), [(0, [(0, 2)]), (4, [(0, 2)]), (5, [(1, 2)]), (6, []), (9, [])]
)
def test_an_adapter_applies_from_the_position_where_it_is_active(active_from, expected):
    assert segments_of(using(1, ("a", 1.0), active_from=active_from)) == expected


@pytest.mark.parametrize(("active_from", "expected"), [(0, [(1, 2)]), (5, [(1, 2)]), (6, []), (7, [])])
def test_the_head_applies_adapters_to_the_sampled_tokens_where_they_are_active(active_from, expected):
    """The last token is at position 5; segments count the sequences that sample."""
    batch = batch_of(
        using(1, sampling=SAMPLING),
        using(2, ("a", 1.0)),
        using(3, ("a", 1.0), active_from=active_from, sampling=SAMPLING),
        resident={"a": NO_ROWS},
    )
    assert [sequence.sequence_id for sequence in batch.sampled] == [1, 3]
    assert batch.logits_R.tolist() == [1, 5]
    assert bounds(batch.head_deltas) == expected


def test_the_logits_of_tokens_with_targets_are_computed_with_those_of_sampled_tokens():
    part, whole = using(1, sampling=None), using(3, sampling=SAMPLING)
    batch = batch_of(
        replace(part, targets=(8, 9), num_top=2),
        using(2, sampling=SAMPLING),
        replace(whole, targets=(7,)),
    )
    assert batch.logits_R.tolist() == [0, 1, 3, 4, 5]
    assert [(each.sequence_id, rows) for each, rows in batch.scored] == [(1, slice(0, 2)), (3, slice(3, 4))]
    assert [each.sequence_id for each in batch.sampled] == [2, 3]
    assert batch.sampled_S.tolist() == [2, 4]
    assert batch_of(using(1, sampling=SAMPLING), using(2)).sampled_S is None


@pytest.mark.parametrize(("active_from", "expected"), [(0, [(1, 3)]), (5, [(2, 3)]), (6, [])])
def test_the_head_applies_adapters_to_scored_tokens_where_they_are_active(active_from, expected):
    scored = using(2, ("a", 1.0), active_from=active_from, sampling=SAMPLING)
    batch = batch_of(using(1, sampling=SAMPLING), replace(scored, targets=(7,)), resident={"a": NO_ROWS})
    assert bounds(batch.head_deltas) == expected


def test_adapters_without_rows_make_no_segment_and_do_not_part_their_neighbours():
    prefix = ("prefix", 1.0)
    batch = batch_of(using(1, prefix), using(2, ("a", 1.0), prefix), using(3), resident={"a": NO_ROWS})
    [segment] = batch.deltas.segments
    assert segment.adapters == ((NO_ROWS, 1.0),)
    assert batch_of(using(1, prefix), resident={}).deltas is None
