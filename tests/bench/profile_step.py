"""Where the time of a decode step goes on a CPU, and what a matrix library would take for the NF4 product.

`make profile` writes PROFILE.md. The kernels are timed inside an engine that serves batches like those of
`make bench`, without gRPC.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from bitsandbytes.functional import quantize_4bit

from bench.layout import BENCH, RANK_16, TINY_LLAMA
from bench.models import make_models
from bench.plan import Work
from support.running import submit, wait
from turret_adapters.registry import Named
from turret_server.app.assembly import assemble
from turret_server.app.build import Parts
from turret_server.config import ServerConfig
from turret_server.kernels import CpuOps, NF4Weight, PackedNF4Weight, ReferenceOps
from turret_server.kernels.cpu import attention as cpu_attention
from turret_server.kernels.cpu import dense as cpu_dense
from turret_server.kernels.cpu import lora as cpu_lora
from turret_server.kernels.cpu import nf4 as cpu_nf4
from turret_server.kernels.cpu import pointwise as cpu_pointwise
from turret_server.kernels.cpu.cores import claim_cores
from turret_server.model.adapted import AdaptedLinear

RESULTS = Path(__file__).with_name("PROFILE.md")
KERNELS: dict[str, tuple[Any, str]] = {
    "NF4 products": (cpu_nf4, "_linear"),
    "LoRAs": (cpu_lora, "_lora_add"),
    "attention": (cpu_attention, "_attend"),
    "head": (cpu_dense, "_linear"),
    "norms": (cpu_pointwise, "_rms_norm"),
    "SwiGLU": (cpu_pointwise, "_silu_multiply"),
    "rotary embedding": (cpu_pointwise, "_rotate"),
}
BATCHES = (1, 8, 32)
TOKENS = (1, 4, 8, 16, 20, 32, 64, 128, 256, 512)
ROUNDS = 9
ABOUT = """\
# Where the time of a decode step goes

`make profile` on {machine}, {cores} cores, torch {torch}: the shape of TinyLlama-1.1B in bfloat16, prompts
of 128 tokens, 64 generated, LoRAs of rank 16 on all linears; medians over the steps in which all decode,
inside the server's engine without gRPC.
"""
PRODUCT = """\
# The NF4 product beside a matrix library

One product of {inputs} by {outputs} features, ours against dequantising the weight and multiplying with
torch's library; medians of {rounds}.
"""


class Stopwatch:
    """Sums the seconds of calls by what they are for, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._step: dict[str, float] = defaultdict(float)

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            self._step[name] += time.perf_counter() - started
            return result

        return call

    def step(self, run: Callable[[Any], Any], size: int) -> Callable[[Any], Any]:
        """Keep the times of steps in which so many sequences decode, and nothing else happens."""
        last = time.perf_counter()

        def call(step: Any) -> Any:
            nonlocal last
            self._step = defaultdict(float)
            started = time.perf_counter()
            result = run(step)
            ended = time.perf_counter()
            if len(step.sequences) == step.num_tokens == size:
                self.steps.append({**self._step, "step": ended - started, "between": started - last})
            last = ended
            return result

        return call

    def milliseconds(self) -> dict[str, float]:
        names = {name for step in self.steps for name in step}
        return {name: statistics.median(step.get(name, 0) for step in self.steps) * 1e3 for name in names}


@contextmanager
def patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def measure(parts: Parts, size: int, adapters: tuple[str | None, ...]) -> dict[str, float]:
    """Milliseconds of a step of so many sequences, by what they are for."""
    watch, runner = Stopwatch(), parts.engine._runner._runner
    timed = [(*place, name) for name, place in KERNELS.items()]
    timed += [(runner, "_batch", "batch assembly"), (runner._sampler, "sample", "sampling")]
    batch = Work(adapters=adapters).batch(seed=size)
    for prompt, adapter in zip(batch.prompts(), batch.adapters, strict=True):  # so that all are in the arena
        wait(submit(parts, prompt[:16], *([Named(adapter)] if adapter else []), max_tokens=2))
    with ExitStack() as patches:
        for owner, name, label in timed:
            patches.enter_context(patched(owner, name, watch.timed(getattr(owner, name), label)))
        patches.enter_context(patched(runner, "_run", watch.step(runner._run, size)))
        running = [
            submit(parts, prompt, *([Named(adapter)] if adapter else []), max_tokens=batch.max_tokens)
            for prompt, adapter in zip(batch.prompts(), batch.adapters, strict=True)
        ]
        wait(*running)
    return watch.milliseconds()


def read_bytes(parts: Parts) -> dict[str, int]:
    """What a step reads of the weights, whatever its size."""
    modules = parts.loaded.model.modules()
    packed = [each.weight for each in modules if isinstance(each, AdaptedLinear)]
    head = parts.loaded.model.get_output_embeddings().weight
    assert all(isinstance(weight, PackedNF4Weight) for weight in packed)
    return {
        "NF4 products": sum(weight.data.nbytes + weight.absmax.nbytes for weight in packed),
        "head": head.nbytes,
    }


def step_table(parts: Parts) -> list[str]:
    columns = [(size, loras) for size in BATCHES for loras in (False, True)]
    found = [
        measure(parts, size, tuple(RANK_16[:size]) if loras else (None,) * size) for size, loras in columns
    ]
    named = [*KERNELS, "batch assembly", "sampling"]
    for each in found:
        each["Python and torch between them"] = each["step"] - sum(each.get(name, 0) for name in named)
    heads = [f"{size}, {'a LoRA each' if loras else 'base'}" for size, loras in columns]
    lines = [f"| ms of a step of | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    rows = {name: name for name in (*named, "Python and torch between them")}
    rows |= {"step": "**a step**", "between": "engine, between two steps"}
    for name, title in rows.items():
        lines.append(f"| {title} | {' | '.join(f'{each.get(name, 0):.2f}' for each in found)} |")
    alone = found[0]
    speeds = [
        f"{name} {size / alone[name] / 1e6:.0f} GB/s ({size / 1e6:.0f} MB)"
        for name, size in read_bytes(parts).items()
    ]
    return [*lines, "", f"At batch 1 the weights are read at: {', '.join(speeds)}."]


def memory_speed() -> float:
    """GB a second at which both cores read what no cache holds."""
    numbers = torch.ones(1 << 28)
    return numbers.nbytes / min(seconds(numbers.sum) for _ in range(3)) / 1e9


def seconds(call: Callable[[], object]) -> float:
    call()
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def crossover_table() -> list[str]:
    lines = [
        "| tokens | bfloat16: ours, ms | library, ms | float32: ours, ms | library, ms |",
        "|---|---|---|---|---|",
    ]
    inputs, outputs = TINY_LLAMA.linears["mlp.gate_proj"]
    weights = {}
    for dtype in (torch.bfloat16, torch.float32):
        data, state = quantize_4bit(
            torch.randn(outputs, inputs, dtype=dtype), quant_type="nf4", compress_statistics=True
        )
        weight, ops = NF4Weight(data, state, inputs, outputs), CpuOps(dtype)
        weights[dtype] = weight, ops.pack_nf4(weight), ops
    for count in TOKENS:
        cells = []
        for dtype, (weight, packed, ops) in weights.items():
            x = torch.randn(count, inputs, dtype=dtype)
            cells.append(seconds(lambda x=x, packed=packed, ops=ops: ops.nf4_linear(x, packed)))
            cells.append(seconds(lambda x=x, weight=weight: ReferenceOps().nf4_linear(x, weight)))
        lines.append(f"| {count} | {' | '.join(f'{cell * 1e3:.2f}' for cell in cells)} |")
    return lines


@click.command()
def main() -> None:
    """Write PROFILE.md beside this file; a few minutes on two idle cores."""
    make_models(TINY_LLAMA)
    config = ServerConfig(
        model=str(TINY_LLAMA.model),
        adapters=TINY_LLAMA.adapters,
        cache=BENCH / "cache",
        store=BENCH / "store",
        memory="3GiB",
        # Prompts enter whole, as quickly as they can: all are to decode together for a while.
        max_step_seconds=60,
    )
    with assemble(config) as parts:
        steps = step_table(parts)
    claim_cores()
    inputs, outputs = TINY_LLAMA.linears["mlp.gate_proj"]
    about = ABOUT.format(machine=platform.machine(), cores=torch.get_num_threads(), torch=torch.__version__)
    speed = f"Both cores together read memory at {memory_speed():.0f} GB/s (the sum of a tensor of 1 GiB)."
    product = PRODUCT.format(inputs=inputs, outputs=outputs, rounds=ROUNDS)
    text = "\n".join([about, *steps, speed, "", product, *crossover_table()]) + "\n"
    RESULTS.write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
