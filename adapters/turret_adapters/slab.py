"""Where the rows of a LoRA lie in its slab of pages.

A slab is a list of arena pages. Row r of A takes `in_features` elements, row r of B (a column of peft's
lora_B) `out_features`; a row never crosses a page, so that it can be addressed by one element offset
(S-LoRA, arXiv 2311.03285, section 5, without its padding to one row a page).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turret_adapters.spec import LoraModule


@dataclass(frozen=True, slots=True)
class ModuleRows:
    """Element offsets of a module's rows from the start of the slab, one for each rank."""

    a_offsets: tuple[int, ...]
    b_offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SlabLayout:
    num_pages: int
    modules: tuple[ModuleRows, ...]


def slab_layout(lora: Sequence[LoraModule], page_elements: int) -> SlabLayout:
    """Place the rows of every module one after another; a row that does not fit starts the next page."""
    position = 0

    def place(length: int) -> int:
        nonlocal position
        assert length <= page_elements, "the arena's pages are made to hold the widest row"
        if position % page_elements + length > page_elements:
            position += -position % page_elements
        start = position
        position += length
        return start

    modules = tuple(
        ModuleRows(
            a_offsets=tuple(place(module.in_features) for _ in range(module.rank)),
            b_offsets=tuple(place(module.out_features) for _ in range(module.rank)),
        )
        for module in lora
    )
    return SlabLayout(num_pages=-(-position // page_elements), modules=modules)
