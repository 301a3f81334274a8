"""Runs the groups of the plan, the systems in turns, and keeps what came of it after every group."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import closing
from typing import Any
from zlib import crc32

import click

from bench.layout import PREFIX, RANK_16, SMALL_LLAMA, TINY_LLAMA, Shape
from bench.llama_cpp import LlamaCpp
from bench.plan import GROUPS, LLAMA_CPP, PEFT, TURRET, VLLM, Work
from bench.turret import Turret
from bench.work import Batch, NotRunError, System, decode_rate, prefill_rate
from bench.worker import peft, vllm

_SECONDS = "turret_step_seconds_sum"


def _turret(shape: Shape) -> Turret:
    # Prompts of a batch are computed together and then decoded together, as the peers do it: by default they
    # would enter in small pieces while the first of them decode, and there would be no time when all decode.
    whole_prompts = ("--max-step-seconds", "60")
    return Turret(shape, "--adapters", str(shape.adapters), "--memory", "3GiB", *whole_prompts)


_MAKE = {TURRET: _turret, PEFT: peft, LLAMA_CPP: LlamaCpp, VLLM: vllm}


def _ensure_models(shape: Shape) -> None:
    if not (shape.adapters / PREFIX).exists():
        from bench.models import make_models  # noqa: PLC0415 (imports torch and peft)

        click.echo(f"  making the model and the adapters of {shape.title}")
        make_models(shape)


class Systems:
    """Systems by name and shape: each is started when it is first needed, and stays until the end."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], System | NotRunError] = {}

    def get(self, name: str, shape: Shape) -> System:
        """Raises NotRunError, again and again, where it did not start."""
        key = name, shape.name
        if key not in self._running:
            _ensure_models(shape)
            click.echo(f"  starting {name}, {shape.title}")
            try:
                self._running[key] = _MAKE[name](shape)
            except NotRunError as error:
                click.echo(f"  {name}: {error}")
                self._running[key] = error
        found = self._running[key]
        if isinstance(found, NotRunError):
            raise found
        return found

    def close(self) -> None:
        for system in self._running.values():
            if not isinstance(system, NotRunError):
                system.close()


def measure_group(name: str, systems: Systems, rounds: int, *, small: bool) -> dict[str, Any]:
    """Figures by work, system and kind, one for every round; in the place of a system that did not run, why.

    `small` runs it on the small shape, whichever is its own.
    """
    group = GROUPS[name]
    shape = SMALL_LLAMA if small else group.shape
    pairs = [(work_name, work, system) for work_name, work in group.works.items() for system in work.systems]
    figures: dict[str, dict[str, Any]] = {work_name: {} for work_name in group.works}
    for work_name, work, system in pairs:
        try:
            systems.get(system, shape).run(work.warm_up(seed=0))
            figures[work_name][system] = defaultdict(list)
        except NotRunError as error:
            figures[work_name][system] = str(error)
    for index in range(rounds):
        for work_name, work, system in pairs:
            found = figures[work_name][system]
            if isinstance(found, str):
                continue
            try:
                # The systems get the same prompts, and no prompt comes twice: it would be found in a cache.
                seed = crc32(f"{name} {work_name} {index}".encode())
                for kind, value in _run(systems.get(system, shape), work, seed).items():
                    found[kind].append(value)
            except NotRunError as error:
                figures[work_name][system] = str(error)
                continue
            told = ", ".join(f"{kind} {values[-1]:.3g}" for kind, values in found.items())
            click.echo(f"  round {index + 1}  {work_name:7} {system:10} {told}")
    return figures


def _run(system: System, work: Work, seed: int) -> dict[str, float]:
    batch = work.batch(seed)
    before = system.metrics() if isinstance(system, Turret) else {}
    began = time.perf_counter()
    times = system.run(batch)
    seconds = time.perf_counter() - began
    if any(len(request) != batch.max_tokens for request in times):
        raise NotRunError(f"failed: gave {sorted({len(request) for request in times})} tokens")
    figures = {"seconds": seconds, "prefill": prefill_rate(batch, times)}
    if batch.max_tokens > 1:
        figures["decode"] = decode_rate(times)
    if isinstance(system, Turret):
        figures["outside_steps"] = 1 - (system.metrics()[_SECONDS] - before[_SECONDS]) / seconds
    return figures


def measure_start(rounds: int, *, small: bool) -> dict[str, Any]:
    """Second starts, and what the last server holds after a batch of eight adapters.

    Raises:
        NotRunError: the server failed. There is no benchmark without it.
    """
    shape = SMALL_LLAMA if small else TINY_LLAMA
    _ensure_models(shape)
    with closing(Turret(shape, name="start")):  # quantises where nothing is kept yet
        pass
    seconds = []
    for index in range(rounds):
        with closing(Turret(shape, name="start")) as server:
            seconds.append(server.start_seconds)
            click.echo(f"  round {index + 1}  {seconds[-1]:.1f} s to the first token")
            if index == rounds - 1:
                server.load(RANK_16[:8])
                server.run(Batch(adapters=RANK_16[:8], prompt_tokens=128, max_tokens=64, seed=0))
                resident, arena = server.resident_bytes(), server.arena_bytes()
    click.echo(f"  resident {resident / 1e6:.0f} MB, of them {arena / 1e6:.0f} MB arena")
    return {
        "shape": shape.name,
        "start_seconds": seconds,
        "resident_bytes": resident,
        "arena_bytes": arena,
    }
