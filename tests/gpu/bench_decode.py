"""How long a decode step takes as a CUDA graph and without one, beside the time to read what it must read.

    cd tests && python -m gpu.bench_decode

A model of TinyLlama-1.1B's shape with random weights, rank-16 LoRAs on all linears, contexts of 512 tokens.
With TRITON_INTERPRET=1 set, a tiny model on a CPU shows only that both ways compute the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from support.decoding import World, world
from support.kernel_inputs import DEVICE
from support.tokenizers import save_tokenizer
from turret_adapters.host import HostAdapter, ModuleDelta, row_groups
from turret_adapters.spec import AdapterSpec, BaseSpec, Method, ModuleKind, Part, lora_rows, slab_layout
from turret_server.engine.step import Step
from turret_server.kernels import PackedNF4Weight
from turret_server.model.adapted import AdaptedLinear
from turret_server.model.decode_graph import cuda_record

REAL = DEVICE.type == "cuda"
RANK = 16
BATCHES = (1, 8, 32) if REAL else (1, 2)
CONTEXT = 512 if REAL else 20
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048 if REAL else 64,
    intermediate_size=5632 if REAL else 128,
    num_hidden_layers=22 if REAL else 1,
    num_attention_heads=32 if REAL else 4,
    num_key_value_heads=4 if REAL else 2,
    max_position_embeddings=2048,
)


def random_lora(base: BaseSpec, name: str) -> HostAdapter:
    deltas = {
        module: ModuleDelta(
            rows={
                Part.LORA_A: torch.randn(RANK, shape.in_features) * 0.02,
                Part.LORA_B: torch.randn(RANK, shape.out_features) * 0.02,
            }
        )
        for module, shape in base.of_kind(ModuleKind.LINEAR).items()
    }
    spec = AdapterSpec(
        revision=name,
        method=Method.LORA,
        rows=row_groups(deltas),
        prefix=None,
        max_rank=RANK,
        num_parameters=0,
        file_bytes=0,
    )
    return HostAdapter(spec=spec, deltas=deltas)


def milliseconds(run: Callable[[], object]) -> float:
    """As the engine sees it: from the step's plain data to its tokens."""
    for _ in range(5):
        run()
    took = []
    for _ in range(50):
        started = time.perf_counter()
        run()
        took.append(time.perf_counter() - started)
    return median(took) * 1e3


def bandwidth() -> float:
    """Bytes a millisecond of a copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return 2 * source.nbytes / milliseconds(copy)


def num_bytes(made: World, batch: int, num_adapters: int) -> int:
    """Weights, keys and values and rows, each once."""
    model = made.loaded.model
    total = model.get_output_embeddings().weight.nbytes
    for module in model.modules():
        if isinstance(module, AdaptedLinear) and isinstance(module.weight, PackedNF4Weight):
            total += module.weight.data.nbytes + module.weight.absmax.nbytes
    base, size = made.loaded.base, made.arena.flat.element_size()
    total += batch * CONTEXT * base.kv_width * size
    return total + num_adapters * size * sum(rows.count * rows.width for rows in lora_rows(base, RANK))


def compare(made: World, step: Step) -> None:
    expected = made.logits(step, graphs=False)
    for sequence_id, row in made.logits(step, graphs=True).items():
        scale = expected[sequence_id].abs().max().item()
        torch.testing.assert_close(row, expected[sequence_id], atol=0.05 * scale, rtol=0)


def decoding(made: World, batch: int, num_adapters: int) -> Step:
    """A step in which each sequence decodes, with a LoRA of its own or none does."""
    names = [(str(index),) for index in range(num_adapters)] or [()] * batch
    return Step(
        sequences=tuple(
            made.decoding(index, CONTEXT - 1, *((name, 1.0) for name in names[index]))
            for index in range(batch)
        )
    )


def measure(made: World, batch: int, num_adapters: int, speed: float | None) -> str:
    step = decoding(made, batch, num_adapters)
    compare(made, step)
    label = f"batch {batch}, {num_adapters} LoRAs"
    if speed is None:
        return f"{label}: as without a graph"
    with made.without_graphs():
        without = milliseconds(lambda: made.runner.run(step))
    replayed = milliseconds(lambda: made.runner.run(step))
    limit = num_bytes(made, batch, num_adapters) / speed
    return f"{label:22}{without:12.2f}{replayed:10.2f}{limit:10.2f}{replayed / limit:10.2f}"


def save_base(folder: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)


@contextmanager
def world_of_loras() -> Iterator[World]:
    """The model, with as many LoRAs on their pages as the largest batch has sequences."""
    with TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        save_base(base)
        record = cuda_record(DEVICE) if REAL else (lambda forward: forward)
        sizes = {"max_sequences": BATCHES[-1], "num_pages": 4000}
        dtype = torch.bfloat16 if REAL else torch.float32
        with world(base, Path(folder), (), device=DEVICE, dtype=dtype, record=record, **sizes) as made:
            pages = slab_layout(lora_rows(made.loaded.base, RANK), made.arena.page_elements).num_pages
            made.pages_of_each = CONTEXT // made.arena.block_size + 1
            assert (pages + made.pages_of_each) * BATCHES[-1] <= made.arena.num_pages
            for index in range(BATCHES[-1]):
                made.adapters[str(index)] = random_lora(made.loaded.base, str(index))
                made.copy_to_device(str(index))
            yield made


def main() -> None:
    with world_of_loras() as made:
        speed = bandwidth() if REAL else None
        if speed is not None:
            say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {speed / 1e6:.0f} GB/s")
            say(f"{'ms a step':22}{'no graph':>12}{'graph':>10}{'to read':>10}{'ratio':>10}")
        for batch in BATCHES:
            for num_adapters in (0, batch):
                say(measure(made, batch, num_adapters, speed))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
