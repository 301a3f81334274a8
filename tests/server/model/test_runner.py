"""Adapters on their way into the arena and out of it, and steps as the engine sees them."""

from __future__ import annotations

import copy
import gc
import logging
import queue
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import HostAdapter
from turret_adapters.spec import AdapterSpec, ModuleKind, Part, slab_layout
from turret_server.engine.request import SamplingParams
from turret_server.engine.step import VIRTUAL_TOKEN, DeviceLostError, PageCopy, SequenceStep, Step
from turret_server.errors import NonFiniteLogitsError, UnsupportedModelError
from turret_server.kernels import ReferenceOps
from turret_server.model import runner as runner_module
from turret_server.model.arena import Arena
from turret_server.model.load import LoadedModel, ModelWeights, load_model
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler

CPU = torch.device("cpu")
KINDS = ("lora", "dora", "prefix", "prompt")
NUM_PAGES = 200
GREEDY = SamplingParams(max_tokens=1)


class Host:
    """Adapters on the host, by revision."""

    def __init__(self) -> None:
        self.adapters: dict[str, HostAdapter] = {}

    def tensors(self, revision: str) -> HostAdapter:
        return self.adapters[revision]


class RecordingSampler(Sampler):
    def sample(self, logits_SV, sequences):
        self.logits = logits_SV.clone()
        return super().sample(logits_SV, sequences)


@pytest.fixture(scope="module")
def loaded(base_of, quantised_cache) -> LoadedModel:
    return load_model(
        str(base_of("llama")), device=CPU, dtype=torch.float32, cache=quantised_cache, ops=ReferenceOps()
    )


@pytest.fixture(scope="module")
def adapters(loaded, adapter_of) -> dict[str, HostAdapter]:
    weights = ModelWeights(loaded.model, loaded.ops)
    return {kind: read_adapter(adapter_of("llama", kind), loaded.base, weights) for kind in KINDS}


@pytest.fixture
def sampler() -> RecordingSampler:
    return RecordingSampler()


@pytest.fixture
def host(adapters) -> Host:
    made = Host()
    made.adapters = {adapter.spec.revision: adapter for adapter in adapters.values()}
    return made


@pytest.fixture
def runner(loaded, host, sampler):
    page_bytes = Arena(loaded.base, 0, dtype=torch.float32, device=CPU).page_bytes
    arena = Arena(loaded.base, NUM_PAGES * page_bytes, dtype=torch.float32, device=CPU)
    made = ModelRunner(loaded, arena, host, sampler)
    yield made
    made.close()


def copied(runner: ModelRunner, spec: AdapterSpec, first_page: int = 50) -> str | None:
    """Copy an adapter to pages from the first on, its prefix to those from 150 on; the error, if any."""
    num_pages = slab_layout(spec.rows, runner._arena.page_elements).num_pages
    assert first_page + num_pages <= 150
    told: queue.Queue[str | None] = queue.Queue()
    runner.copy_to_device(
        spec, tuple(range(first_page, first_page + num_pages)), tuple(range(150, 160)), told.put
    )
    error = told.get(timeout=60)
    assert told.empty()
    return error


def sequence(*token_ids: int, **options) -> SequenceStep:
    """Tokens from position 0 on, on the first pages."""
    return SequenceStep(
        **{
            "sequence_id": 1,
            "token_ids": token_ids,
            "start": 0,
            "block_table": (0, 1, 2, 3),
            "sampling": GREEDY,
            **options,
        }
    )


def logits_of(runner: ModelRunner, sampler: RecordingSampler, *sequences: SequenceStep) -> torch.Tensor:
    runner.run(Step(sequences=sequences))
    return sampler.logits


def embeddings_of(runner: ModelRunner, own: SequenceStep) -> torch.Tensor:
    """What the model's first layer gets."""
    seen = []
    first = runner._loaded.model.model.layers[0]
    hook = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].clone()))
    runner.run(Step(sequences=(own,)))
    hook.remove()
    return seen[0]


def test_an_adapter_that_was_unloaded_before_its_copy_began_is_no_error(runner, adapters, host, caplog):
    """No request waits for it: an adapter that one needs stays loaded."""
    spec = adapters["lora"].spec
    host.adapters.clear()
    with caplog.at_level(logging.WARNING):
        assert copied(runner, spec) == "the adapter was unloaded before its copy began"
    assert caplog.records == []


def test_a_copy_that_fails_is_reported_and_logged(runner, adapters, host, monkeypatch, caplog):
    def fails(_: str) -> HostAdapter:
        raise OSError("no such disk")

    spec = adapters["lora"].spec
    with monkeypatch.context() as patch:
        patch.setattr(host, "tensors", fails)
        assert copied(runner, spec) == "OSError: no such disk"
    [record] = caplog.records
    assert record.getMessage() == f"copying adapter {spec.revision} to the arena failed"
    assert copied(runner, spec) is None


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_copied_adapter_changes_its_requests_until_it_is_forgotten(runner, sampler, adapters, kind):
    spec = adapters[kind].spec
    own = sequence(5, 6, 7, adapters=((spec.revision, 1.0),))
    base = logits_of(runner, sampler, own)
    assert copied(runner, spec) is None
    changed = logits_of(runner, sampler, own)
    assert (changed - base).abs().max() > 0.01
    runner.forget(spec.revision)
    assert torch.equal(logits_of(runner, sampler, own), base)


def test_a_copied_prompt_is_what_virtual_tokens_read(runner, sampler, adapters):
    adapter = adapters["prompt"]
    num_virtual = adapter.spec.num_virtual_tokens
    assert copied(runner, adapter.spec) is None
    own = sequence(*[VIRTUAL_TOKEN] * num_virtual, 7, prompt=adapter.spec.revision)
    found = logits_of(runner, sampler, own)
    embedded = embeddings_of(runner, own)
    assert torch.equal(embedded[:num_virtual], adapter.prompt_embeddings.float())
    assert torch.equal(embedded[num_virtual:], embeddings_of(runner, sequence(7)))
    other = sequence(*[7] * num_virtual, 7)
    assert (logits_of(runner, sampler, other) - found).abs().max() > 0.01


def test_nothing_of_a_forgotten_adapter_stays_on_the_device(runner, adapters, host):
    lora, prompt = (adapters[kind].spec for kind in ("lora", "prompt"))
    embeddings = adapters["prompt"].prompt_embeddings.double()  # which the runner converts, and so copies
    host.adapters[prompt.revision] = replace(adapters["prompt"], prompt_embeddings=embeddings)
    for spec in (lora, prompt):
        assert copied(runner, spec) is None
    rows = next(iter(runner._deltas[lora.revision].lora.values())).parts[Part.LORA_A].offsets_N
    held = weakref.ref(rows), weakref.ref(runner._prompts[prompt.revision])
    del rows
    for spec in (lora, prompt):
        runner.forget(spec.revision)
        runner.forget(spec.revision)
    gc.collect()
    assert [each() for each in held] == [None, None]


def test_a_prefix_is_written_to_its_own_pages(runner, adapters):
    adapter = adapters["prefix"]
    before = runner._arena.flat.clone().view(NUM_PAGES, -1)
    assert copied(runner, adapter.spec) is None
    changed = (runner._arena.flat.view(NUM_PAGES, -1) != before).any(dim=1).nonzero().flatten().tolist()
    num_pages = -(-adapter.spec.num_virtual_tokens // runner._arena.block_size)
    assert changed == list(range(150, 150 + num_pages))


def test_pages_are_copied_before_the_step_computes(runner, sampler):
    """A sequence that shares a page gets a copy in the step in which it first writes to it."""
    prompt = tuple(range(30, 50))
    logits_of(runner, sampler, sequence(*prompt))
    following = {"start": len(prompt), "sequence_id": 2}
    expected = logits_of(runner, sampler, sequence(9, **following))
    step = Step(
        sequences=(sequence(9, **following, block_table=(7, 8)),),
        copies=(PageCopy(0, 7), PageCopy(1, 8)),
    )
    runner.run(step)
    assert torch.equal(sampler.logits, expected)


def test_a_step_in_which_nothing_is_sampled_has_no_tokens(runner):
    result = runner.run(Step(sequences=(sequence(5, 6, sampling=None),)))
    assert result.token_ids == {}
    assert result.errors == {}


def test_a_prompt_is_scored_beside_what_is_sampled(runner, sampler):
    scored = sequence(5, 6, 7, sampling=None, targets=(6, 7, 8), num_top=2)
    ends = sequence(5, 6, 7, sequence_id=2, block_table=(4,), targets=(6, 7), sampling=GREEDY)
    plain = sequence(5, 6, 7, sequence_id=3, block_table=(5,), sampling=GREEDY)
    result = runner.run(Step(sequences=(scored, ends, plain)))
    assert result.token_ids.keys() == {2, 3}
    assert result.token_ids[2] == result.token_ids[3]
    assert len(sampler.logits) == 2
    assert [each.token_id for each in result.prompt_logprobs[1]] == [6, 7, 8]
    assert [each.logprob for each in result.prompt_logprobs[2]] == [
        each.logprob for each in result.prompt_logprobs[1][:2]
    ]
    assert [len(each.top) for each in (*result.prompt_logprobs[1], *result.prompt_logprobs[2])] == [
        2, 2, 2, 0, 0,
    ]  # fmt: skip


def test_a_prompt_whose_logits_are_not_finite_fails_alone(runner, monkeypatch):
    forward = runner._forward

    def broken(*arguments):
        logits_RV = forward(*arguments).clone()
        logits_RV[1] = torch.nan
        return logits_RV

    monkeypatch.setattr(runner, "_forward", broken)
    scored = sequence(5, 6, 7, targets=(6, 7), sampling=GREEDY)
    result = runner.run(Step(sequences=(scored, sequence(5, sequence_id=2, block_table=(4,)))))
    assert result.errors.keys() == {1}
    assert isinstance(result.errors[1], NonFiniteLogitsError)
    assert 2 in result.token_ids


def test_the_thread_that_runs_steps_computes_on_all_cores(runner, monkeypatch):
    claimed = []
    monkeypatch.setattr(runner_module, "claim_cores", lambda: claimed.append(threading.current_thread()))
    thread = threading.Thread(target=runner.run, args=(Step(sequences=(sequence(5),)),))
    thread.start()
    thread.join()
    assert claimed == [thread]


def allocate_too_much():
    torch.empty(1 << 55)


def fail_as(error: Exception):
    def fails():
        raise error

    return fails


@pytest.mark.parametrize(
    ("failure", "expected", "said"),
    [
        (allocate_too_much, MemoryError, "DefaultCPUAllocator"),
        (fail_as(torch.OutOfMemoryError("CUDA out of memory")), MemoryError, "CUDA out of memory"),
        (fail_as(torch.AcceleratorError("device-side assert")), DeviceLostError, "device-side assert"),
        (fail_as(RuntimeError("shape mismatch")), RuntimeError, "shape mismatch"),
        (fail_as(ValueError("anything")), ValueError, "anything"),
    ],
    ids=["the host's memory", "the device's memory", "the device", "torch", "others"],
)
def test_the_engine_learns_what_kind_of_failure_a_step_had(runner, monkeypatch, failure, expected, said):
    monkeypatch.setattr(runner, "_forward", lambda *_: failure())
    with pytest.raises(Exception, match=said) as failed:
        runner.run(Step(sequences=(sequence(5),)))
    assert type(failed.value) is expected


def test_a_failed_step_leaves_the_runner_ready_for_the_next(runner, sampler, monkeypatch):
    expected = logits_of(runner, sampler, sequence(5))
    with monkeypatch.context() as patch:
        patch.setattr(runner._loaded.ops, "nf4_linear", lambda *_: fail_as(ValueError("broken"))())
        with pytest.raises(ValueError, match="broken"):
            runner.run(Step(sequences=(sequence(5),)))
    assert torch.equal(logits_of(runner, sampler, sequence(5)), expected)


def test_close_ends_the_threads_and_starts_no_further_copy(runner, adapters, host, monkeypatch):
    started, release = threading.Semaphore(0), threading.Event()
    spec, find = adapters["lora"].spec, host.tensors

    def tensors(revision: str) -> HostAdapter:
        started.release()
        assert release.wait(60)
        return find(revision)

    monkeypatch.setattr(host, "tensors", tensors)
    told: queue.Queue[str | None] = queue.Queue()
    for _ in range(4):
        runner.copy_to_device(replace(spec, rows=()), (), (), told.put)
    for _ in range(2):
        assert started.acquire(timeout=60)
    closing = threading.Thread(target=runner.close)
    closing.start()
    pool = runner._loaders
    while closing.is_alive() and not pool._shutdown:
        pass
    with pool._shutdown_lock:  # held while what waits is cancelled
        release.set()
    closing.join()
    assert told.qsize() == 2
    assert not any(thread.is_alive() for thread in pool._threads)


def test_a_model_passes_the_check(runner):
    runner.check()


def test_the_lora_kernels_are_compiled_for_linears_of_every_shape_before_an_adapter_comes(
    runner, loaded, monkeypatch
):
    added = set()
    ops = type(loaded.ops)
    monkeypatch.setattr(ops, "lora_add", lambda _, y, x, *__: added.add((x.shape[1], y.shape[1])))
    monkeypatch.setattr(runner_module, "_has_gpu_kernels", lambda _: True)
    monkeypatch.setattr("turret_server.model.decode_graph.cuda_record", lambda _: None)
    monkeypatch.setattr(runner, "use_graphs", lambda *_: None)
    runner.warm_up(4)
    shapes = loaded.base.of_kind(ModuleKind.LINEAR, ModuleKind.EXPERT).values()
    assert added == {(shape.in_features, shape.out_features) for shape in shapes}


def test_a_model_in_which_a_layer_has_other_attention_is_refused(runner, loaded, host, sampler):
    model = copy.deepcopy(loaded.model)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    odd = ModelRunner(replace(loaded, model=model), runner._arena, host, sampler)
    said = "llama models are not supported: of 3 layers, 2 call the attention function, 2 times"
    with pytest.raises(UnsupportedModelError, match=said) as refused:
        odd.check()
    assert refused.value.metadata == {"model": "llama"}
    odd.close()


def test_the_form_of_an_answer_is_computed_beside_the_forward_pass(runner, loaded):
    """Each waits for the other to have begun."""
    forward, filling, seconds = threading.Event(), threading.Event(), 60

    def allowed():
        filling.set()
        assert forward.wait(seconds)
        return b"\x08" + bytes(loaded.vocab_size // 8)

    def begin(*_):
        forward.set()
        assert filling.wait(seconds)

    hook = loaded.model.register_forward_pre_hook(begin)
    found = runner.run(Step(sequences=(sequence(5, 6, 7, allowed=allowed),)))
    hook.remove()
    assert found.token_ids == {1: 3}
