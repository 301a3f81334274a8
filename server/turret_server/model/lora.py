"""LoRA rows in the arena: where each resident adapter's lie, and which of them a step applies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from turret_adapters.peft import HostAdapter
from turret_adapters.slab import slab_layout
from turret_server.kernels import LoraRows
from turret_server.model.arena import Arena


@dataclass(frozen=True, slots=True)
class ResidentRows:
    """Of one linear of one adapter: arena offsets of its rows, int64 [rank], and what each counts."""

    a_offsets_R: torch.Tensor
    b_offsets_R: torch.Tensor
    weights_R: torch.Tensor


def write_slab(arena: Arena, adapter: HostAdapter, pages: tuple[int, ...]) -> dict[str, ResidentRows]:
    """Copy an adapter's rows into its pages and say where they are. The scaling stays out of the rows
    and is kept in float32, so that it costs no precision.
    """
    size = arena.page_elements
    layout = slab_layout(adapter.spec.lora, size)
    device = arena.flat.device

    def in_arena(offsets: tuple[int, ...]) -> list[int]:
        return [pages[offset // size] * size + offset % size for offset in offsets]

    rows = {}
    for module, where in zip(adapter.spec.lora, layout.modules, strict=True):
        weights = adapter.lora[module.name]
        a_offsets, b_offsets = in_arena(where.a_offsets), in_arena(where.b_offsets)
        for index in range(module.rank):
            arena.write_row(a_offsets[index], weights.a_RI[index])
            arena.write_row(b_offsets[index], weights.b_RO[index])
        rows[module.name] = ResidentRows(
            torch.tensor(a_offsets, device=device),
            torch.tensor(b_offsets, device=device),
            torch.full((module.rank,), module.scaling, device=device),
        )
    return rows


@dataclass(slots=True)
class LoraBatch:
    """The adapters of a step's tokens. What a linear applies is put together when it first asks."""

    segments: Sequence[tuple[int, int, Mapping[str, ResidentRows]]]
    _rows: dict[str, LoraRows | None] = field(default_factory=dict)

    def rows(self, module: str) -> LoraRows | None:
        """The rows for one linear, or None where no adapter of this step has any."""
        if module not in self._rows:
            self._rows[module] = self._gather(module)
        return self._rows[module]

    def _gather(self, module: str) -> LoraRows | None:
        parts = [(start, end, rows[module]) for start, end, rows in self.segments if module in rows]
        if not parts:
            return None
        bounds = [0]
        for _, _, rows in parts:
            bounds.append(bounds[-1] + len(rows.weights_R))
        return LoraRows(
            token_starts=tuple(start for start, _, _ in parts),
            token_ends=tuple(end for _, end, _ in parts),
            row_bounds=tuple(bounds),
            a_offsets_R=torch.cat([rows.a_offsets_R for _, _, rows in parts]),
            b_offsets_R=torch.cat([rows.b_offsets_R for _, _, rows in parts]),
            weights_R=torch.cat([rows.weights_R for _, _, rows in parts]),
        )
