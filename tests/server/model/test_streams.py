"""Who waits for whom on a GPU. Random loads are in `tests/server/engine/test_simulation.py`."""

from __future__ import annotations

import pytest
import torch

from support.fake_cuda import FakeCuda, StreamedDevice
from support.fake_device import make_spec
from turret_adapters.spec import AdapterSpec
from turret_server.engine.step import SequenceStep, Step
from turret_server.model.streams import CudaStreams, Streams, make_streams

GPU = torch.device("cuda", 1)
PART_OF_A_PROMPT = Step(sequences=(SequenceStep(sequence_id=1, token_ids=(5, 6), start=0, block_table=(3,)),))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    made.install(monkeypatch)
    return made


@pytest.fixture
def device(cuda: FakeCuda) -> StreamedDevice:
    return StreamedDevice(8, 4, cuda, immediate=True)


def copy(device: StreamedDevice, spec: AdapterSpec, *pages: int) -> None:
    device.copy_to_device(spec, pages, (), lambda _: None)


def test_a_step_that_samples_nothing_has_ended_when_it_returns(device, cuda):
    """Otherwise its pages could be freed too early, and the next step would seem to take its time."""
    device.run(PART_OF_A_PROMPT)
    assert cuda.steps.ended == cuda.steps.launched == 1


def test_a_step_that_fails_has_ended_when_it_is_tried_again(device, cuda, monkeypatch):
    """The next one writes its inputs to the page-locked buffer from which this one's are copied."""
    forward = device.runner._forward

    def fails(*arguments):
        forward(*arguments)
        raise ValueError("after the launch")

    monkeypatch.setattr(device.runner, "_forward", fails)
    with pytest.raises(ValueError, match="after the launch"):
        device.runner.run(PART_OF_A_PROMPT)
    assert cuda.steps.ended == cuda.steps.launched == 1


def test_a_copy_waits_for_the_step_that_last_used_its_pages(device):
    device.run(PART_OF_A_PROMPT)
    copy(device, make_spec("next", slab_pages=1), 3)


def test_a_copy_to_pages_that_were_used_while_the_kernels_were_compiled_waits(device, cuda):
    device.runner._all_logits([(0,) * 4])
    copy(device, make_spec("first", slab_pages=1), 0)
    assert cuda.steps.launched == 1


def test_pages_of_a_copy_that_failed_are_free_once_it_has_ended(cuda):
    device = StreamedDevice(8, 4, cuda)
    copy(device, make_spec("broken", slab_pages=2), 3, 4)
    device.complete(error="no")
    device.run(PART_OF_A_PROMPT)


def test_steps_and_copies_run_on_the_device_of_the_model(cuda):
    """Threads begin on the first GPU, and Triton launches kernels on the thread's."""
    streams = make_streams(GPU)
    assert isinstance(streams, CudaStreams)
    with streams.step():
        assert cuda.current_device() == GPU
    after = streams.launched()
    with streams.copy(after):
        assert cuda.current_device() == GPU
        assert cuda.current_stream() is not cuda.steps
    assert cuda.current_device() is None


def test_a_cpu_has_nothing_to_wait_for():
    streams = make_streams(torch.device("cpu"))
    assert type(streams) is Streams
    with streams.step(), streams.copy(streams.launched()):
        pass
