"""What adapters change in the base's modules: where their rows lie, and which tokens of a step use them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from turret_adapters.host import HostAdapter
from turret_adapters.spec import Part, slab_layout
from turret_server.kernels import LoraRows
from turret_server.model.arena import Arena


@dataclass(frozen=True, slots=True)
class ResidentRows:
    """Arena offsets of the rows of one part, int64 [N], each row `width` elements long."""

    offsets_N: torch.Tensor
    width: int

    def vector(self, arena: Arena) -> torch.Tensor:
        """The only row, or, of the head, whose rows are one element wide, all of them."""
        if len(self.offsets_N) > 1:
            return self.gather(arena).view(-1)
        return arena.row(int(self.offsets_N[0]), self.width)

    def gather(self, arena: Arena, which: torch.Tensor | None = None) -> torch.Tensor:
        """Some rows, or all, as a copy [N, width]."""
        offsets_N = self.offsets_N if which is None else self.offsets_N[which]
        return arena.flat[offsets_N[:, None] + torch.arange(self.width, device=offsets_N.device)]


@dataclass(frozen=True, slots=True)
class ResidentDelta:
    """What one adapter changes in one module. `token_ids` are those of `Part.TOKENS`, ascending."""

    scaling: float
    parts: Mapping[Part, ResidentRows]
    token_ids: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ResidentDeltas:
    """What one adapter changes, by module. `lora` are the LoRA rows of linears, which one op applies for
    all adapters of a step together; `others` is everything else.
    """

    lora: Mapping[str, ResidentDelta]
    others: Mapping[str, ResidentDelta]


_LORA = frozenset({Part.LORA_A, Part.LORA_B})


def write_slab(
    arena: Arena, adapter: HostAdapter, pages: tuple[int, ...], linears: Container[str]
) -> ResidentDeltas:
    """Copy an adapter's rows into its pages and say where they are. The scaling stays out of the rows
    and is kept in float32, so that it costs no precision.
    """
    size = arena.page_elements
    device = arena.flat.device
    layout = slab_layout(adapter.spec.rows, size)
    parts: dict[str, dict[Part, ResidentRows]] = {}
    for group, runs in zip(adapter.spec.rows, layout.runs, strict=True):
        rows_NX = adapter.deltas[group.module].rows[group.part]
        offsets, done = [], 0
        for run in runs:
            start = pages[run.offset // size] * size + run.offset % size
            arena.write_rows(start, rows_NX[done : done + run.count])
            offsets.append(torch.arange(run.count, device=device) * group.width + start)
            done += run.count
        parts.setdefault(group.module, {})[group.part] = ResidentRows(torch.cat(offsets), group.width)
    deltas = {
        name: ResidentDelta(
            adapter.deltas[name].scaling,
            of_module,
            torch.tensor(adapter.deltas[name].token_ids, dtype=torch.long, device=device),
        )
        for name, of_module in parts.items()
    }
    return ResidentDeltas(
        lora={
            name: delta for name, delta in deltas.items() if name in linears and _LORA & delta.parts.keys()
        },
        others={
            name: delta for name, delta in deltas.items() if name not in linears or delta.parts.keys() - _LORA
        },
    )


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows of the batch that the same adapters apply to, each with a weight."""

    start: int
    end: int
    adapters: tuple[tuple[ResidentDeltas, float], ...]

    @property
    def where(self) -> slice:
        return slice(self.start, self.end)


@dataclass(frozen=True, slots=True)
class _Gathered:
    """The LoRA rows of one linear for the adapters of a step; `segments` are those that have any."""

    segments: tuple[int, ...]
    row_bounds: tuple[int, ...]
    a_offsets_R: torch.Tensor
    b_offsets_R: torch.Tensor
    weights_R: torch.Tensor


class _Combination:
    """What the adapters of a step come to, in this order: `changed` are the modules that they change by more
    than LoRA rows. `rows` is what linears apply where the segments lie at these places in the batch: in
    decoding, they lie there step after step.
    """

    _KEPT = 4

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.gathered: dict[str, _Gathered | None] = {}
        self.changed = frozenset(
            module for segment in segments for adapter, _ in segment.adapters for module in adapter.others
        )
        self._rows: OrderedDict[tuple[tuple[int, int], ...], dict[str, LoraRows | None]] = OrderedDict()

    def rows(self, segments: Sequence[Segment]) -> dict[str, LoraRows | None]:
        """By module, to be added to."""
        return _kept(self._rows, tuple((each.start, each.end) for each in segments), dict, self._KEPT)


class GatheredRows:
    """What linears apply for the adapters of the last few steps: they change more seldom than the tokens."""

    _KEPT = 8

    def __init__(self) -> None:
        self._by_adapters: OrderedDict[tuple[object, ...], _Combination] = OrderedDict()

    def of(self, segments: Sequence[Segment]) -> _Combination:
        """What is known already of these adapters in this order; to be added to."""
        key = tuple(segment.adapters for segment in segments)
        return _kept(self._by_adapters, key, lambda: _Combination(segments), self._KEPT)


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def _kept(recent: OrderedDict[_Key, _Value], key: _Key, make: Callable[[], _Value], most: int) -> _Value:
    """The value of a key, made when it is new; those that were not asked for the longest go."""
    if key not in recent:
        recent[key] = make()
    recent.move_to_end(key)
    if len(recent) > most:
        recent.popitem(last=False)
    return recent[key]


class DeltaBatch:
    """The adapters of a step's rows. What a linear applies is put together when it first asks."""

    def __init__(self, segments: Sequence[Segment], gathered: GatheredRows) -> None:
        self.segments = segments
        self._combination = gathered.of(segments)
        self._rows = self._combination.rows(segments)

    def lora(self, module: str) -> LoraRows | None:
        """The LoRA rows for one linear, or None where no adapter of this step has any."""
        if module not in self._rows:
            self._rows[module] = self._place(module)
        return self._rows[module]

    def changes(self, module: str) -> bool:
        """Whether an adapter changes it by more than a linear's LoRA rows."""
        return module in self._combination.changed

    def _place(self, module: str) -> LoraRows | None:
        gathered = self._combination.gathered
        if module not in gathered:
            gathered[module] = self._gather(module)
        rows = gathered[module]
        if rows is None:
            return None
        return LoraRows(
            token_starts=tuple(self.segments[index].start for index in rows.segments),
            token_ends=tuple(self.segments[index].end for index in rows.segments),
            row_bounds=rows.row_bounds,
            a_offsets_R=rows.a_offsets_R,
            b_offsets_R=rows.b_offsets_R,
            weights_R=rows.weights_R,
        )

    def having(self, module: str, *parts: Part) -> Iterator[tuple[Segment, ResidentDelta, float]]:
        """The segments for which an adapter changes one of these parts of a module, how, and its weight."""
        for segment in self.segments:
            for adapter, weight in segment.adapters:
                delta = adapter.others.get(module)
                if delta is not None and not delta.parts.keys().isdisjoint(parts):
                    yield segment, delta, weight

    def _gather(self, module: str) -> _Gathered | None:
        indices, bounds = [], [0]
        a_offsets, b_offsets, weights = [], [], []
        for index, segment in enumerate(self.segments):
            found = [
                (adapter.lora[module], weight)
                for adapter, weight in segment.adapters
                if module in adapter.lora
            ]
            if not found:
                continue
            indices.append(index)
            for delta, weight in found:
                rows = delta.parts[Part.LORA_A].offsets_N
                a_offsets.append(rows)
                b_offsets.append(delta.parts[Part.LORA_B].offsets_N)
                weights.append(torch.full((len(rows),), weight * delta.scaling, device=rows.device))
            bounds.append(sum(map(len, weights)))
        if not indices:
            return None
        return _Gathered(
            segments=tuple(indices),
            row_bounds=tuple(bounds),
            a_offsets_R=torch.cat(a_offsets),
            b_offsets_R=torch.cat(b_offsets),
            weights_R=torch.cat(weights),
        )
