"""Decode steps as they are recorded for a GPU, on a CPU in Triton's interpreter: what would be recorded is
run in the place of being replayed, and must come to what a step without a graph comes to.
"""

from __future__ import annotations

import copy
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.decoding import World, world
from support.device_traces import Launches, Peak, Waits
from support.fake_cuda import FakeCuda
from support.kernel_inputs import DEVICE
from support.models import FAMILIES, MIXTURES
from turret_server.engine.step import VIRTUAL_TOKEN, DeviceLostError, Step
from turret_server.kernels import PackedNF4Weight, ReferenceOps
from turret_server.kernels.gpu.ops import GpuOps
from turret_server.model.adapted import AdaptedLinear
from turret_server.model.arena import Arena
from turret_server.model.decode_graph import DecodeGraphs, scratch_bytes
from turret_server.model.load import LoadedModel, load_model
from turret_server.model.runner import ModelRunner, graph_bytes
from turret_server.model.streams import CudaStreams

# Padded rows compute with whatever their memory held.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KINDS = ("lora", "lora-attention", "lora-all-linear", "rslora", "dora", "prefix", "modules-to-save")
MAX_SEQUENCES = 6
LORA = (("lora", 1.0),)


def again(forward):
    """In the place of a CUDA graph: what was to be recorded, whenever it would be replayed."""
    return forward


def one_layer(base, folder):
    """A model that the interpreter is done with in time."""
    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(base_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    base = one_layer(base_of("llama"), folder / "base")
    sizes = {"max_sequences": MAX_SEQUENCES, "num_pages": 240}
    with world(base, folder, KINDS, device=DEVICE, dtype=torch.float32, record=again, **sizes) as made:
        yield made


@pytest.mark.parametrize(
    "mixture",
    [
        [(), ()],
        [(("lora", 1.0), ("prefix", 1.0))],
        [LORA, LORA, (("lora", 0.3),)],
        [LORA, (), (("lora-all-linear", 1.0),), (("rslora", 1.0),)],
        [(("lora", 0.7), ("lora-all-linear", -0.3)), (), (("lora-attention", 2.0),), LORA, LORA],
    ],
    ids=["base", "one", "the same", "each another", "several of one request"],
)
def test_a_recorded_step_computes_what_any_other_computes(small: World, mixture):
    step = small.step(mixture)
    before = small.arena.flat.clone()
    expected = small.logits(step, graphs=False)
    written = small.arena.flat.clone()
    small.arena.flat.copy_(before)
    found = small.logits(step, graphs=True)
    assert found.keys() == expected.keys()
    for sequence_id, row in found.items():
        torch.testing.assert_close(row, expected[sequence_id], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(small.arena.flat, written, atol=1e-5, rtol=1e-5)
    changed = (small.arena.flat != before).view(small.arena.num_pages, -1).any(dim=1)
    assert changed.sum() == len(mixture), "every row writes to one page, and padded rows to none"


def test_rows_apply_from_where_their_adapter_is_active(small):
    own, later = (
        small.decoding(0, 20, *LORA, active_from=active_from, token_ids=(5,)) for active_from in (20, 21)
    )
    active, inactive, base = (
        small.logits(Step(sequences=(each,)), graphs=True)[0]
        for each in (own, later, replace(own, adapters=()))
    )
    assert torch.equal(inactive, base)
    assert not torch.allclose(active, base, atol=1e-2)


def test_rows_are_found_where_an_adapter_was_placed_last(small):
    step = Step(sequences=(small.decoding(0, 20, *LORA),))
    expected = small.logits(step, graphs=True)[0]
    small.runner.forget(small.adapters["lora"].spec.revision)
    base = small.logits(step, graphs=True)[0]
    assert not torch.allclose(base, expected, atol=1e-2)
    small.copy_to_device("lora")
    assert torch.equal(small.logits(step, graphs=True)[0], expected)


OTHERS = {
    "a piece of a prompt": lambda w: [w.decoding(0, 20), w.decoding(1, 20, token_ids=(1, 2))],
    "an end of a prompt that samples nothing": lambda w: [w.decoding(0, 20, sampling=None)],
    "a virtual token": lambda w: [w.decoding(0, 3, token_ids=(VIRTUAL_TOKEN,))],
    "an adapter that does more than add rows": lambda w: [
        w.decoding(0, 20, *LORA),
        w.decoding(1, 20, ("dora", 1.0)),
    ],
    "an adapter of the head": lambda w: [w.decoding(0, 20, ("modules-to-save", 1.0))],
    "more sequences than were recorded": lambda w: [w.decoding(i, 20) for i in range(MAX_SEQUENCES + 1)],
    "more rows than a tile may have": lambda w: [w.decoding(0, 20, *LORA * 20)],
}


@pytest.mark.parametrize("sequences", OTHERS.values(), ids=OTHERS)
def test_other_steps_are_computed_without_a_graph(small, sequences):
    assert small.graphs.run(Step(sequences=tuple(sequences(small)))) is None


@pytest.mark.parametrize(
    "mixtures", [[[()] * 3, [()] * 4], [[LORA, (), (("rslora", 1.0),)], [LORA] * 4]], ids=["base", "lora"]
)
def test_a_size_of_batch_launches_the_same_whatever_is_in_it(small, monkeypatch, mixtures):
    """The same kernels with the same numbers on the same memory: so one graph serves all of them."""
    traces = []

    def traced(forward):
        def run():
            with Launches() as launches:
                logits = forward()
            traces.append(launches.trace)
            return logits

        return run

    for key, forward in list(small.graphs._graphs.items()):
        monkeypatch.setitem(small.graphs._graphs, key, traced(forward))
    for mixture in mixtures:
        assert small.graphs.run(small.step(mixture)) is not None
    first, second = traces
    assert len(first) > 50
    for one, other in zip(first, second, strict=True):
        assert one == other


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - MIXTURES))
@pytest.mark.parametrize("has_lora", [True, False])
def test_what_is_recorded_waits_for_nothing_and_stays_on_the_device(
    family, has_lora, base_of, quantised_cache
):
    """On a device that has no numbers: to read one is an error."""
    dtype, meta = torch.float32, torch.device("meta")
    loaded = on_meta(
        load_model(str(base_of(family)), device=DEVICE, dtype=dtype, cache=quantised_cache, ops=GpuOps())
    )
    arena = Arena(loaded.base, 2**22, dtype=dtype, device=meta)
    graphs = DecodeGraphs(loaded, arena, max_sequences=8, record=again)
    with Waits() as waits, Launches() as launches:
        graphs._forward(4, has_lora=has_lora)
    assert waits.found == []
    assert launches.devices == {meta}
    kernels = {name for name, *_ in launches.trace}
    assert {"attend_tile", "_multiply", "write_tokens"} <= kernels
    assert ({"_gather", "_shrink", "_expand"} <= kernels) == has_lora


@pytest.mark.parametrize(("has_lora", "most"), [(False, 21), (True, 35)])
def test_so_many_kernels_are_launched_for_a_layer(has_lora, most, base_of, quantised_cache):
    """Without what the model launches once, for positions, embedding and head."""
    loaded = on_meta(
        load_model(
            str(base_of("llama")), device=DEVICE, dtype=torch.float32, cache=quantised_cache, ops=GpuOps()
        )
    )
    arena = Arena(loaded.base, 2**22, dtype=torch.float32, device=torch.device("meta"))
    graphs = DecodeGraphs(loaded, arena, max_sequences=8, record=again)
    with Launches() as launches:
        graphs._forward(4, has_lora=has_lora)
    in_layers = {"_multiply", "_shrink", "_expand", "_rms_norm", "_rotate", "_silu_multiply", "write_tokens"}
    in_layers |= {"attend_tile", "combine_splits", "aten.add.Tensor", "aten.silu.default", "aten.neg.default"}
    found = [name for name, *_ in launches.trace if name in in_layers]
    assert len(found) - 1 <= most * loaded.base.num_layers  # the norm before the head


@pytest.mark.parametrize("max_sequences", [24, 128])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_graphs_take_is_known_before_the_arena_is_taken(family, max_sequences, base_of, quantised_cache):
    """The buffers, the logits of each graph, which it keeps, and the memory of the largest."""
    dtype = torch.float32
    loaded = on_meta(
        load_model(str(base_of(family)), device=DEVICE, dtype=dtype, cache=quantised_cache, ops=GpuOps())
    )
    arena = Arena(loaded.base, 2**30, dtype=dtype, device=torch.device("meta"))
    kept = []
    with Peak() as peak:
        graphs = DecodeGraphs(loaded, arena, max_sequences=max_sequences, record=again)
        for size in reversed(graphs._sizes):
            kept += [graphs._forward(size, has_lora=has_lora) for has_lora in (True, False)]
    assert peak.num_bytes <= scratch_bytes(loaded, max_sequences) <= 1.2 * peak.num_bytes


@pytest.mark.parametrize("kind", ["a CPU", "without Triton", "experts"])
def test_nothing_is_kept_for_graphs_where_there_are_none(small, kind):
    on_gpu = replace(small.loaded, device=torch.device("cuda"))
    assert graph_bytes(on_gpu, 8) == scratch_bytes(on_gpu, 8) > 0
    others = {
        "a CPU": small.loaded,
        "without Triton": replace(on_gpu, ops=ReferenceOps()),
        "experts": replace(on_gpu, model=SimpleNamespace(config=SimpleNamespace(model_type="mixtral"))),
    }
    assert graph_bytes(others[kind], 8) == 0


def on_meta(loaded: LoadedModel) -> LoadedModel:
    """The same model on a device that has shapes and no numbers."""
    model = copy.deepcopy(loaded.model).to("meta")
    for module in model.modules():
        # A linear in 16 bit is on the device with the model.
        weight = module.weight if isinstance(module, AdaptedLinear) else None
        if isinstance(weight, PackedNF4Weight):
            module.weight = replace(
                weight, **{name: getattr(weight, name).to("meta") for name in ("data", "absmax", "code")}
            )
    return replace(loaded, model=model, device=torch.device("meta"))


@pytest.mark.parametrize("error", [RuntimeError, torch.AcceleratorError])
def test_where_nothing_can_be_recorded_steps_are_computed_without(small, caplog, error):
    def fails(_):
        raise error("operation not permitted when stream is capturing")

    runner = ModelRunner(small.loaded, small.arena, SimpleNamespace(), small.sampler)
    with caplog.at_level(logging.WARNING):
        runner.use_graphs(4, fails)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not permitted when stream is capturing" in caplog.text
    assert runner.run(small.step([()])).token_ids.keys() == {0}
    runner.close()


def test_a_device_that_is_lost_while_graphs_are_captured_ends_the_start(small, monkeypatch):
    """Every later step would fail."""

    def fails(*_):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    cuda = FakeCuda()
    cuda.install(monkeypatch)
    monkeypatch.setattr(cuda.steps, "synchronize", fails)
    runner = ModelRunner(small.loaded, small.arena, SimpleNamespace(), small.sampler)
    runner._streams = CudaStreams(torch.device("cuda", 0))
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        runner.use_graphs(4, fails)
    runner.close()
