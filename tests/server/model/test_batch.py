"""From a step to the tensors of a forward."""

from __future__ import annotations

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
    assert batch.last_S.tolist() == [3]
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


def test_neighbours_with_the_same_adapters_are_one_segment_of_what_is_active():
    def using(name: str, sequence_id: int, active_from: int = 0) -> SequenceStep:
        return SequenceStep(
            sequence_id=sequence_id,
            token_ids=(1, 2),
            start=4,
            block_table=(1, 2),
            adapters=((name, 1.0),),
            active_from=active_from,
        )

    batch = batch_of(
        using("b", 1), using("a", 2), using("b", 3), using("c", 4, 5), resident=dict.fromkeys("abc", NO_ROWS)
    )
    assert batch.deltas
    assert [(segment.start, segment.end) for segment in batch.deltas.segments] == [(0, 2), (2, 6), (7, 8)]
