"""Decode steps recorded as CUDA graphs, and sampling on the GPU."""

from __future__ import annotations

import logging
import random
import warnings

import pytest
import torch

from support.decoding import world
from turret_server.engine.request import SamplingParams
from turret_server.engine.step import SequenceStep
from turret_server.model.decode_graph import cuda_record
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler

CUDA = torch.device("cuda")
KINDS = ("lora", "lora-attention", "lora-all-linear", "rslora")
MAX_SEQUENCES = 12
# Matrix products of another number of rows may be summed in another order.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.fixture(scope="module", params=TOLERANCES, ids=str)
def recorded(request, base_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    sizes = {"max_sequences": MAX_SEQUENCES, "num_pages": 600}
    how = {"device": CUDA, "dtype": request.param, "record": cuda_record(CUDA)}
    with world(base_of("llama"), folder, KINDS, **how, **sizes) as made:
        yield made


def mixture(count):
    choices = [(), *(((kind, 1.0),) for kind in KINDS), (("lora", 0.7), ("rslora", -0.3))]
    return [random.choice(choices) for _ in range(count)]


@pytest.mark.parametrize("count", range(1, MAX_SEQUENCES + 1))
def test_a_replayed_step_computes_what_any_other_computes(recorded, count):
    assert len(recorded.graphs._graphs) == 2 * len(recorded.graphs._sizes)
    for some in (mixture(count), [()] * count, mixture(count)):
        step = recorded.step(some)
        before = recorded.arena.flat.clone()
        expected = recorded.logits(step, graphs=False)
        written = recorded.arena.flat.clone()
        recorded.arena.flat.copy_(before)
        found = recorded.logits(step, graphs=True)
        limit = TOLERANCES[recorded.arena.flat.dtype]
        for sequence_id, row in found.items():
            scale = expected[sequence_id].abs().max().item()
            torch.testing.assert_close(row, expected[sequence_id], atol=limit * scale, rtol=0)
        torch.testing.assert_close(recorded.arena.flat, written, atol=limit * 10, rtol=0)
        changed = (recorded.arena.flat != before).view(recorded.arena.num_pages, -1).any(dim=1)
        assert changed.sum() == count


def test_a_replay_gives_the_same_bits_again(recorded):
    step = recorded.step(mixture(MAX_SEQUENCES))
    first = recorded.logits(step, graphs=True)
    recorded.logits(recorded.step(mixture(3)), graphs=True)
    for sequence_id, row in recorded.logits(step, graphs=True).items():
        assert torch.equal(row, first[sequence_id])


def test_rows_are_found_where_an_adapter_was_placed_last(recorded):
    step = recorded.step([(("lora", 1.0),)] * 3)
    expected = recorded.logits(step, graphs=True)
    recorded.runner.forget(recorded.adapters["lora"].spec.revision)
    recorded.copy_to_device("lora")
    for sequence_id, row in recorded.logits(step, graphs=True).items():
        assert torch.equal(row, expected[sequence_id])


def test_a_start_says_how_long_kernels_and_graphs_took(recorded, caplog):
    runner = ModelRunner(recorded.loaded, recorded.arena, None, Sampler())
    with caplog.at_level(logging.INFO):
        runner.warm_up(MAX_SEQUENCES)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("turret_server")]
    assert len(told) == 2, told
    assert "kernels" in told[0]
    assert "10 CUDA graphs" in told[1]
    runner.close()


def test_a_gpu_draws_what_a_cpu_draws():
    logits = torch.randn(96, 50_000) * 3
    choices = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 50},
    ]
    steps = [
        SequenceStep(
            sequence_id=index,
            token_ids=(0,),
            start=0,
            block_table=(0,),
            sampling=SamplingParams(max_tokens=1, seed=index, **choices[index % len(choices)]),
            num_generated=index,
        )
        for index in range(96)
    ]
    on_cpu = Sampler().sample(logits, steps).token_ids
    on_gpu = Sampler().sample(logits.cuda(), steps).token_ids
    assert on_gpu == on_cpu
    for index in (0, 1, 2, 3, 50):
        alone = Sampler().sample(logits[index : index + 1].cuda(), steps[index : index + 1])
        assert alone.token_ids == {index: on_gpu[index]}


def test_sampling_waits_once_for_the_gpu():
    """torch counts every wait of its own as an error; the one copy of tokens is the exception."""
    logits = torch.randn(3, 1000, device=CUDA)
    params = [SamplingParams(max_tokens=1, temperature=each, top_p=0.9) for each in (0.0, 1.0, 2.0)]
    steps = [
        SequenceStep(sequence_id=index, token_ids=(0,), start=0, block_table=(0,), sampling=each)
        for index, each in enumerate(params)
    ]
    Sampler().sample(logits, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once for a process, torch warns of the mode itself
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as found:
            Sampler().sample(logits, steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 1
