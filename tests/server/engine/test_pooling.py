"""Pooling requests: numbers of a prompt's tokens, in any chunks on a decoder, in one step on an encoder.

`Run.check` compares the numbers with what they have to be, after every step.
"""

from __future__ import annotations

from array import array

import pytest

from support.fake_device import PAGE_ELEMENTS, FakeDevice, Simulation, make_run, make_spec
from turret_adapters.spec import HeadTask, PrefixKind
from turret_server.engine.admission import TenantLimits
from turret_server.engine.loop import Engine
from turret_server.engine.pooling import Pooling, PoolingParams, Rows, combine
from turret_server.engine.request import FinishReason
from turret_server.engine.scheduler import Limits
from turret_server.errors import UnsupportedTaskError

PARAMS = [PoolingParams(pooling=pooling) for pooling in Pooling]
PARAMS += [PoolingParams(task=task) for task in HeadTask]
IDS = [*(each.value for each in Pooling), *(each.value for each in HeadTask)]
every_kind = pytest.mark.parametrize("params", PARAMS, ids=IDS)


def encoder(**options):
    return Simulation(**{"num_pages": 64, "bidirectional": True, **options})


@every_kind
@pytest.mark.parametrize("max_batch_tokens", [1, 3, 64])
@pytest.mark.parametrize("num_virtual", [0, 3, 4])
@pytest.mark.parametrize("kind", PrefixKind)
def test_a_decoder_computes_them_in_any_chunks(params, max_batch_tokens, num_virtual, kind):
    simulation = Simulation(num_pages=64, max_batch_tokens=max_batch_tokens, max_batch_requests=1)
    adapter = make_spec("adapter", slab_pages=1, num_virtual=num_virtual, kind=kind, head=HeadTask.SEQ_CLS)
    for num_prompt in range(1, 10):
        run = simulation.submit(range(num_prompt), adapter, params=params)
        simulation.finish()
        assert run.end is FinishReason.POOLED


@every_kind
@pytest.mark.parametrize("num_virtual", [0, 3, 4, 7])
@pytest.mark.parametrize("kind", PrefixKind)
def test_an_encoder_computes_them_in_one_step(params, num_virtual, kind):
    """Virtual tokens that are embeddings are computed with each text, as they depend on it."""
    simulation = encoder()
    adapter = make_spec(
        "adapter",
        slab_pages=1,
        num_virtual=num_virtual,
        kind=kind,
        per_request=kind is PrefixKind.EMBEDDING,
        head=HeadTask.SEQ_CLS,
    )
    simulation.residency.prefetch(adapter)
    simulation.drain_inbox()
    for num_prompt in range(1, 10):
        run = simulation.submit(range(num_prompt), adapter, params=params)
        simulation.step()
        assert run.end is FinishReason.POOLED
        assert not simulation.scheduler.running
    num_adapter = simulation.residency.num_pages(adapter)
    assert simulation.pool.num_free == simulation.pool.num_pages - num_adapter, "nothing stays of a text"


def test_generations_and_pooling_requests_share_steps_and_the_prefix_cache():
    simulation = Simulation()
    generation = simulation.submit(range(9), max_tokens=3)
    pooled = simulation.submit(range(20, 29), params=PoolingParams())
    step = simulation.step()
    assert len(step.sequences) == 2
    simulation.finish()
    assert generation.end is FinishReason.LENGTH
    assert pooled.outputs[0].cached_tokens == 0
    again = simulation.submit(range(20, 29), params=PoolingParams(task=HeadTask.SEQ_CLS))
    simulation.finish()
    assert again.outputs[0].cached_tokens == 8, "the last token's state is enough"
    every = simulation.submit(range(20, 29), params=PoolingParams(pooling=Pooling.MEAN))
    simulation.finish()
    assert every.outputs[0].cached_tokens == 0, "every token's state is needed"


def test_an_encoder_takes_nothing_from_the_prefix_cache_and_leaves_nothing_there():
    simulation = encoder()
    for _ in range(2):
        run = simulation.submit(range(9), params=PoolingParams())
        simulation.finish()
        assert run.outputs[0].cached_tokens == 0
    assert simulation.cache.num_idle == 0


def test_an_encoder_computes_a_whole_prompt_or_none_of_it():
    simulation = encoder(max_batch_tokens=16)
    for length in (10, 9, 5, 16, 1):
        simulation.submit(range(length), params=PoolingParams(pooling=Pooling.MEAN))
    found = []
    while step := simulation.step():
        found.append([len(part.token_ids) for part in step.sequences])
    assert found == [[10, 5, 1], [9], [16]], "what fits overtakes within a step, and none starves"


def test_a_long_prompt_is_computed_alone_if_steps_should_be_shorter():
    simulation = encoder(max_batch_tokens=64)
    simulation.scheduler.pacing.record(0, 100, 100.0)  # a token takes a second, as long as a step should
    runs = [simulation.submit(range(length), params=PoolingParams()) for length in (40, 3, 2)]
    steps = [simulation.step() for _ in range(2)]
    assert [[len(part.token_ids) for part in step.sequences] for step in steps] == [[40], [3, 2]]
    assert all(run.end is FinishReason.POOLED for run in runs)


def test_a_preempted_prompt_is_computed_again():
    simulation = Simulation(max_batch_tokens=4)
    run = simulation.submit(range(11), params=PoolingParams(pooling=Pooling.MEAN))
    for _ in range(2):
        simulation.step()
    [sequence] = simulation.scheduler.running
    simulation.scheduler._preempt(sequence)
    simulation.finish()
    assert run.end is FinishReason.POOLED


def test_a_request_ends_once_however_it_ends():
    simulation = Simulation(max_batch_tokens=4)
    cancelled, late, failed = (
        simulation.submit(range(start, start + 9), params=PoolingParams(), deadline=deadline)
        for start, deadline in ((0, None), (20, 5.0), (40, None))
    )
    simulation.step()
    simulation.cancel(cancelled)
    simulation.now = 5.0
    simulation.step(lambda step: {part.sequence_id: "no" for part in step.sequences})
    simulation.finish()
    ends = [run.end for run in (cancelled, late, failed)]
    assert ends == [FinishReason.CANCELLED, FinishReason.FAILED, FinishReason.FAILED]


def test_types_of_tokens_follow_those_of_virtual_tokens():
    simulation = encoder()
    adapter = make_spec("prompt", num_virtual=2, kind=PrefixKind.EMBEDDING, per_request=True)
    simulation.residency.prefetch(adapter)
    simulation.drain_inbox()
    simulation.submit(range(3), adapter, params=PoolingParams(), token_type_ids=(0, 1, 1))
    [part] = simulation.step().sequences
    assert part.token_type_ids == (0, 0, 0, 1, 1)
    assert part.prompt == "prompt"


def test_vectors_are_added_and_rows_of_tokens_follow_each_other():
    parts = [Rows(2, array("d", values)) for values in ([1, 2], [10, 20], [100, 200])]
    assert list(combine(PoolingParams(pooling=Pooling.MEAN), parts).values) == [111, 222]
    rows = combine(PoolingParams(task=HeadTask.TOKEN_CLS), parts)
    assert (rows.width, list(rows.values)) == (2, [1, 2, 10, 20, 100, 200])


@pytest.mark.parametrize("pooling", Pooling)
def test_the_weights_of_a_vector_sum_to_one(pooling):
    for num_tokens in (1, 2, 7):
        weights = [pooling.weight(index, num_tokens) for index in range(-3, num_tokens)]
        assert sum(weights) == pytest.approx(1)
        assert weights[:3] == [0, 0, 0]


def test_the_engine_of_an_encoder_computes_nothing_else():
    device = FakeDevice(64, 4, immediate=True)
    device.bidirectional = True
    engine = Engine(
        runner=device,
        memory=device,
        num_pages=64,
        page_elements=PAGE_ELEMENTS,
        block_size=4,
        limits=Limits(max_batch_tokens=64, max_batch_requests=8, max_step_seconds=1.0),
        tenants=lambda _: TenantLimits(),
        on_stats=lambda _: None,
        bidirectional=True,
    )
    with pytest.raises(UnsupportedTaskError, match="is an encoder, and generates no text"):
        engine.submit(make_run(range(5)).job)
    with pytest.raises(UnsupportedTaskError):
        engine.pin_prompt(make_run(range(5), pinned=True).job)
    run = make_run(range(5), params=PoolingParams(), bidirectional=True)
    engine.submit(run.job)
    engine.step()
    run.check()
    assert run.end is FinishReason.POOLED
