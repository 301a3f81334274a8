"""Why a page holds 16 tokens: what larger and smaller pages waste, and what they cost the attention.

`make page-size` writes PAGE_SIZE.md. The shapes are those of real models; the waste follows from the layout,
the time is measured on the attention of one decoding step.
"""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
import torch

from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape, lora_rows, slab_layout
from turret_server.kernels import AttentionBatch, AttentionParams, select_ops

RESULTS = Path(__file__).with_name("PAGE_SIZE.md")
BLOCK_SIZES = (8, 16, 32, 64, 128)
CONTEXTS = (150, 300, 450, 600, 750, 900, 1050, 1200)
RANKS = (8, 16, 64)
ROUNDS = 30
ABOUT = f"""\
# How many tokens a page holds

`make page-size` on {{machine}}. A page holds the keys and values of so many tokens in all layers, or rows
of LoRAs; empty is the part of the pages taken in which nothing lies. Attention is one layer of a decoding
step of {len(CONTEXTS)} sequences of {CONTEXTS[0]} to {CONTEXTS[-1]} tokens, median of {ROUNDS}.
"""
HEADER = (
    "| base | tokens a page | page | empty, LoRA rank 8 | rank 16 | rank 64 | empty, sequences | attention |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def base(self) -> BaseSpec:
        kv = self.kv_heads * self.head_dim
        widths = {
            "q": (self.hidden, self.hidden),
            "k": (self.hidden, kv),
            "v": (self.hidden, kv),
            "o": (self.hidden, self.hidden),
            "gate": (self.hidden, self.intermediate),
            "up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }
        modules = {
            f"{layer}.{name}": ModuleShape(kind=ModuleKind.LINEAR, in_features=i, out_features=o)
            for layer in range(self.layers)
            for name, (i, o) in widths.items()
        }
        return BaseSpec(
            name_or_path=self.name,
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            modules=modules,
        )


SHAPES = (
    Shape("TinyLlama 1.1B", 2048, 5632, 22, 32, 4),
    Shape("Llama 3 8B", 4096, 14336, 32, 32, 8),
    Shape("Llama 2 7B", 4096, 11008, 32, 32, 32),
)


def slab_waste(base: BaseSpec, block_size: int, rank: int) -> float:
    """The part of a LoRA's pages that no row lies in."""
    rows = lora_rows(base, rank)
    page = block_size * base.kv_width
    used = sum(group.count * group.width for group in rows)
    return 1 - used / (slab_layout(rows, page).num_pages * page)


def kv_waste(block_size: int) -> float:
    """The part of the pages of sequences of `CONTEXTS` tokens that no token lies in."""
    pages = sum(-(-context // block_size) for context in CONTEXTS)
    return 1 - sum(CONTEXTS) / (pages * block_size)


def attention_ms(shape: Shape, block_size: int) -> float:
    """One layer of a step in which one token of each of 8 sequences is computed, pages in random order."""
    tables = [-(-context // block_size) for context in CONTEXTS]
    places = torch.randperm(sum(tables)).split(tables)
    table_QM = torch.zeros(len(CONTEXTS), max(tables), dtype=torch.long)
    for row, pages in zip(table_QM, places, strict=True):
        row[: len(pages)] = pages
    layers = 2
    kv = torch.randn(sum(tables), layers, 2, block_size, shape.kv_heads, shape.head_dim).bfloat16()
    lengths_Q = torch.tensor(CONTEXTS)
    last = lengths_Q - 1
    batch = AttentionBatch(
        torch.arange(len(CONTEXTS) + 1),
        lengths_Q,
        table_QM,
        table_QM.gather(1, (last // block_size)[:, None])[:, 0],
        last % block_size,
    )
    query = torch.randn(len(CONTEXTS), shape.heads, shape.head_dim).bfloat16()
    params = AttentionParams(shape.head_dim**-0.5, None, None, None)
    ops = select_ops(torch.device("cpu"), torch.bfloat16)
    took = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        ops.paged_attention(query, kv[:, 0], batch, params)
        took.append(time.perf_counter() - started)
    return 1000 * statistics.median(took)


def main() -> None:
    machine = f"{platform.machine()}, {psutil.cpu_count(logical=False)} cores, torch {torch.__version__}"
    lines = [ABOUT.format(machine=machine), *HEADER]
    for shape in SHAPES:
        base = shape.base()
        for block_size in BLOCK_SIZES:
            cells = [
                shape.name,
                block_size,
                f"{block_size * base.kv_width * 2 / 2**10:.0f} KiB",
                *(f"{100 * slab_waste(base, block_size, rank):.1f} %" for rank in RANKS),
                f"{100 * kv_waste(block_size):.1f} %",
                f"{attention_ms(shape, block_size):.2f} ms",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    RESULTS.write_text("\n".join(lines) + "\n")
    click.echo(RESULTS.read_text())


if __name__ == "__main__":
    main()
