"""Where the rows of an adapter lie in its slab of pages.

A slab is a list of arena pages. A row never crosses a page, so that one element offset finds it; otherwise
rows lie one after another, whatever their width (the unified paging of S-LoRA, arXiv 2311.03285, without its
padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turret_adapters.spec import BaseSpec, ModuleKind, Part, RowGroup


@dataclass(frozen=True, slots=True)
class Run:
    """`count` rows without a gap between them, from an element of the slab on."""

    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class SlabLayout:
    """`runs[g]` are those of row group g, in the order of its rows."""

    num_pages: int
    runs: tuple[tuple[Run, ...], ...]


def slab_layout(groups: Sequence[RowGroup], page_elements: int) -> SlabLayout:
    """Place the rows of every group one after another; a row that does not fit starts the next page."""
    position = 0
    runs = []
    for group in groups:
        placed = []
        missing = group.count
        while missing:
            fitting = (page_elements - position % page_elements) // group.width
            if not fitting:
                position += page_elements - position % page_elements
                fitting = page_elements // group.width
                assert fitting, "the arena's pages are made to hold the widest row"
            run = Run(position, min(missing, fitting))
            placed.append(run)
            position += run.count * group.width
            missing -= run.count
        runs.append(tuple(placed))
    return SlabLayout(num_pages=-(-position // page_elements), runs=tuple(runs))


def lora_rows(base: BaseSpec, rank: int) -> tuple[RowGroup, ...]:
    """The rows of a LoRA of one rank on every linear of a base."""
    linears = base.of_kind(ModuleKind.LINEAR, ModuleKind.EXPERT)
    return tuple(
        RowGroup(name, part, rank, width)
        for name, shape in linears.items()
        for part, width in ((Part.LORA_A, shape.in_features), (Part.LORA_B, shape.out_features))
    )
