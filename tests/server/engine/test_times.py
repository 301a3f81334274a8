"""When a request waited, for what, and when it started: what traces and the log are told."""

from __future__ import annotations

from support.fake_device import Simulation, make_spec
from turret_server.engine.request import Times

LORA = make_spec("lora", slab_pages=2)


def at(simulation: Simulation, now: float) -> None:
    simulation.now = now
    simulation.step()


def test_a_request_that_waits_for_nothing_starts_at_once():
    simulation = Simulation()
    simulation.now = 3.0
    run = simulation.submit([1, 2, 3])
    assert run.job.times == Times()
    simulation.step()
    assert run.job.times == Times(ready=3.0, started=3.0)
    at(simulation, 4.0)
    assert run.job.times.started == 3.0


def test_the_wait_for_an_adapter_is_from_its_turn_until_it_is_seen_to_be_there():
    simulation = Simulation(immediate=False)
    run = simulation.submit([1, 2, 3], LORA)
    for now in (0.0, 1.0, 2.0):
        at(simulation, now)
    assert run.job.times == Times(awaited=0.0)
    simulation.device.complete()
    at(simulation, 3.0)
    assert run.job.times == Times(awaited=0.0, ready=3.0, started=3.0)


def test_one_that_waits_for_room_is_ready_before_it_starts():
    simulation = Simulation(max_batch_requests=1)
    first = simulation.submit([1, 2, 3], max_tokens=3)
    second = simulation.submit([4, 5, 6])
    for now in (0.0, 1.0, 2.0, 3.0):
        at(simulation, now)
    assert first.job.times.started == 0.0
    assert second.job.times.ready == 0.0
    assert second.job.times.started == 3.0


def test_one_whose_adapter_is_evicted_before_it_starts_waits_for_it_once_more():
    simulation = Simulation(immediate=False, max_batch_requests=1)
    running = simulation.submit([1, 2, 3], max_tokens=9)
    run = simulation.submit([4, 5, 6], LORA)
    at(simulation, 0.0)
    simulation.device.complete()
    at(simulation, 1.0)
    assert run.job.times == Times(awaited=0.0, ready=1.0)
    simulation.residency.drop("lora")
    at(simulation, 2.0)
    assert run.job.times == Times(awaited=0.0)
    simulation.device.complete()
    at(simulation, 3.0)
    assert run.job.times == Times(awaited=0.0, ready=3.0)
    simulation.cancel(running)
    at(simulation, 4.0)
    assert run.job.times == Times(awaited=0.0, ready=3.0, started=4.0)


def test_one_that_gave_way_keeps_the_time_of_its_first_start():
    simulation = Simulation()
    run = simulation.submit([1, 2, 3])
    at(simulation, 1.0)
    simulation.scheduler._preempt(simulation.scheduler.running[0])
    at(simulation, 2.0)
    assert run.job.times == Times(ready=1.0, started=1.0)
