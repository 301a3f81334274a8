"""How near each GPU op comes to what the GPU can do, measured in the same run.

    cd tests && python -m gpu.bench_ops

Every op is compared with the reference before it is timed. With TRITON_INTERPRET=1 set, that is all: it runs
in Triton's interpreter, on small inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
from bitsandbytes.functional import quantize_4bit

from support.kernel_inputs import DEVICE, lora, paged, params
from turret_server.engine.request import SamplingParams
from turret_server.engine.step import SequenceStep
from turret_server.kernels import NF4Weight, ReferenceOps
from turret_server.kernels.gpu.ops import GpuOps
from turret_server.model.sampler import Sampler

DTYPE = torch.bfloat16
OPS, REFERENCE = GpuOps(), ReferenceOps()
REAL = DEVICE.type == "cuda"
HIDDEN, WIDE = (4096, 14336) if REAL else (256, 384)
NUM_KV_HEADS, GROUP, HEAD_DIM = (8, 4, 128) if REAL else (2, 2, 64)
NUM_HEADS = NUM_KV_HEADS * GROUP


@dataclass
class Case:
    """One call, what it must give, and how much must be read and written, and multiplied, for it."""

    name: str
    run: Callable[[], torch.Tensor]
    expected: torch.Tensor
    num_bytes: int
    num_flops: int


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE)


def nf4() -> Iterator[Case]:
    data, state = quantize_4bit(random(WIDE, HIDDEN), quant_type="nf4", compress_statistics=True)
    whole = NF4Weight(data, state, HIDDEN, WIDE)
    packed = OPS.pack_nf4(whole)
    for num_tokens in (1, 8, 32, 64, 256, 4096) if REAL else (1, 64, 65):
        x = random(num_tokens, HIDDEN)
        yield Case(
            f"nf4_linear, {num_tokens} tokens",
            lambda x=x: OPS.nf4_linear(x, packed),
            REFERENCE.nf4_linear(x, whole),
            packed.data.nbytes + packed.absmax.nbytes + (HIDDEN + WIDE) * num_tokens * DTYPE.itemsize,
            2 * num_tokens * HIDDEN * WIDE,
        )


def lora_add() -> Iterator[Case]:
    decode = [(index, index + 1, 16) for index in range(32)]
    ragged = [(index, index + 1, (8, 16, 64)[index % 3]) for index in range(32)]
    length = 512 if REAL else 20
    prefill = [(index * length, (index + 1) * length, 16) for index in range(8)]
    for name, segments in (
        ("32 × rank 16", decode),
        ("32 × rank 8/16/64", ragged),
        ("prefill of 8", prefill),
    ):
        num_tokens, num_rows = segments[-1][1], sum(rank for *_, rank in segments)
        arena, rows = lora(DTYPE, HIDDEN, WIDE, segments, start=0)
        x, y = random(num_tokens, HIDDEN), random(num_tokens, WIDE)
        expected = y.clone()
        REFERENCE.lora_add(expected, x, arena, rows)

        def run(y=y, x=x, arena=arena, rows=rows) -> torch.Tensor:
            OPS.lora_add(y, x, arena, rows)
            return y

        yield Case(
            f"lora_add, {name}",
            run,
            expected,
            ((num_rows + num_tokens) * (HIDDEN + WIDE) + num_tokens * WIDE) * DTYPE.itemsize,
            2 * sum((end - start) * rank for start, end, rank in segments) * (HIDDEN + WIDE),
        )


def attention() -> Iterator[Case]:
    context = 1024 if REAL else 70
    for name, lengths in (
        ("decode of 1", [(1, context)]),
        ("decode of 32", [(1, context)] * 32),
        ("prefill of 8", [(context // 2, context // 2)] * 8),
    ):
        kv, batch = paged(DTYPE, lengths, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM)
        query, how = random(int(batch.query_bounds[-1]), NUM_HEADS, HEAD_DIM), params(NUM_HEADS, HEAD_DIM)
        seen = sum(new * (2 * context - new + 1) // 2 for new, context in lengths)
        held = sum(context for _, context in lengths)
        yield Case(
            f"paged_attention, {name}",
            lambda query=query, kv=kv, batch=batch, how=how: OPS.paged_attention(query, kv, batch, how),
            REFERENCE.paged_attention(query, kv, batch, how),
            (2 * held * NUM_KV_HEADS * HEAD_DIM + 2 * query.numel()) * DTYPE.itemsize,
            4 * seen * NUM_HEADS * HEAD_DIM,
        )


def sampling() -> Iterator[Case]:
    vocabulary = 128_256 if REAL else 1000
    logits = random(32, vocabulary).float() * 3
    for name, options in (
        ("greedy", {}),
        ("temperature", {"temperature": 0.8}),
        ("top-p", {"temperature": 0.8, "top_p": 0.9}),
    ):
        steps = [
            SequenceStep(
                sequence_id=index,
                token_ids=(0,),
                start=0,
                block_table=(0,),
                sampling=SamplingParams(max_tokens=1, seed=index, **options),
            )
            for index in range(32)
        ]

        def run(logits=logits, steps=steps) -> torch.Tensor:
            tokens = Sampler().sample(logits, steps).token_ids
            return torch.tensor([tokens[index] for index in range(32)], dtype=torch.float32)

        yield Case(f"sampling of 32, {name}", run, run(logits.cpu()), logits.nbytes, 0)


def milliseconds(run: Callable[[], object]) -> float:
    """The median, with the cache of the GPU emptied before each call."""
    return float(triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median"))


def ceilings() -> tuple[float, float]:
    """GB/s of a copy, and TFLOP/s of the matrix library in bfloat16."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    square = random(8192, 8192)
    copied = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6
    multiplied = 2 * 8192**3 / milliseconds(lambda: square @ square) / 1e9
    return copied, multiplied


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    if REAL:
        bandwidth, compute = ceilings()
        say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
        say(f"copy {bandwidth:.0f} GB/s, cuBLAS bfloat16 {compute:.0f} TFLOP/s\n")
        say(f"{'':34}{'µs':>9}{'GB/s':>8}{'TFLOP/s':>9}{'of the limit':>14}")
    for case in (*nf4(), *lora_add(), *attention(), *sampling()):
        scale = case.expected.abs().max().item()
        torch.testing.assert_close(case.run(), case.expected, atol=2**-6 * scale, rtol=0)
        if not REAL:
            say(f"{case.name}: as the reference")
            continue
        took = milliseconds(case.run)
        rates = case.num_bytes / took / 1e6, case.num_flops / took / 1e9
        limit = max(rates[0] / bandwidth, rates[1] / compute)
        say(f"{case.name:34}{took * 1e3:9.1f}{rates[0]:8.0f}{rates[1]:9.1f}{limit:13.0%}")


if __name__ == "__main__":
    main()
