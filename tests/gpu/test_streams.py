"""Copies of adapters to pages that the GPU may still write: they come after.

In Triton's interpreter, where nothing is late, these show that the tests themselves run.
"""

from __future__ import annotations

import random
from dataclasses import replace
from queue import SimpleQueue

import pytest
import torch

from support.decoding import world
from support.kernel_inputs import DEVICE
from turret_adapters.spec import slab_layout
from turret_server.engine.step import SequenceStep, Step
from turret_server.model.decode_graph import cuda_record

KINDS = ("lora", "lora-attention")
# Longer than any copy of a small adapter.
LATE_CYCLES = 200_000_000


@pytest.fixture(scope="module")
def made(base_of, tmp_path_factory):
    dtype = torch.float32
    record = cuda_record(DEVICE) if DEVICE.type == "cuda" else (lambda forward: forward)
    sizes = {"max_sequences": 2, "num_pages": 600}
    folder = tmp_path_factory.mktemp("streams")
    with world(base_of("llama"), folder, KINDS, device=DEVICE, dtype=dtype, record=record, **sizes) as made:
        yield made


def write_late(made, pages: range) -> None:
    """Launch a write to pages, as steps do, that begins long after this returns."""
    if DEVICE.type == "cuda":
        torch.cuda._sleep(LATE_CYCLES)
    made.arena.flat.view(made.arena.num_pages, -1)[pages.start : pages.stop] = 7


def prefill(made, pages: range) -> Step:
    """A part of a prompt on these pages; it samples nothing."""
    sequence = SequenceStep(
        sequence_id=0,
        token_ids=tuple(random.choices(range(300), k=len(pages) * made.arena.block_size)),
        start=0,
        block_table=tuple(pages),
    )
    return Step(sequences=(sequence,))


def place(made, kind: str) -> range:
    """Copy an adapter to the first pages that no other has, as the engine does; the pages."""
    adapter = made.adapters[kind]
    num_pages = slab_layout(adapter.spec.rows, made.arena.page_elements).num_pages
    pages = range(made.used, made.used + num_pages)
    made.runner._adapters.tensors = lambda revision: {adapter.spec.revision: adapter}[revision]
    told: SimpleQueue[str | None] = SimpleQueue()
    made.runner.copy_to_device(adapter.spec, tuple(pages), (), told.put)
    assert told.get() is None
    return pages


def check(made, step: Step, expected: dict[int, torch.Tensor]) -> None:
    for sequence_id, row in made.logits(step, graphs=True).items():
        assert torch.equal(row, expected[sequence_id])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [write_late, lambda made, pages: made.runner.run(prefill(made, pages))])
def test_an_adapter_takes_pages_that_were_written_late(made, kind, write):
    pages = place(made, kind)
    step = made.step([((kind, 1.0),), ()])
    expected = made.logits(step, graphs=True)
    for _ in range(3):
        write(made, pages)
        place(made, kind)
        check(made, step, expected)


def test_an_adapter_is_placed_between_replays(made):
    placed, used = KINDS
    place(made, placed)
    step = made.step([((placed, 1.0),), ((used, 1.0),)])
    expected = made.logits(step, graphs=True)
    for _ in range(3):
        made.runner.run(step)
        place(made, placed)
        check(made, step, expected)


def test_a_copy_that_fails_has_ended_when_it_is_told(made, monkeypatch):
    """Its pages go to others at once."""
    adapter, told = made.adapters[KINDS[0]], SimpleQueue()
    pages = place(made, KINDS[0])
    step = made.step([((KINDS[0], 1.0),), ()])
    expected = made.logits(step, graphs=True)

    def fail(*_):
        raise RuntimeError("no prefix")

    with monkeypatch.context() as patched:
        patched.setattr(made.arena, "write_prefix", fail)
        failing = replace(adapter, prefix_kv=torch.zeros(1))
        made.runner._adapters.tensors = lambda _: failing
        made.runner.copy_to_device(failing.spec, tuple(pages), (0,), told.put)
        assert told.get() == "RuntimeError: no prefix"
    made.runner.run(prefill(made, pages))
    place(made, KINDS[0])
    check(made, step, expected)
