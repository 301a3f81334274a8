"""Adapters' changes of the base's modules: where their rows lie, and which tokens of a step use them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TypeAlias, TypeVar

import numpy as np
import torch

from turret_adapters.host import HostAdapter
from turret_adapters.spec import Part, RowGroup, slab_layout
from turret_server.kernels import LoraRows
from turret_server.model.arena import Arena


@dataclass(frozen=True, slots=True)
class ResidentRows:
    """Arena offsets of the rows of one part, int64 [N], each row `width` elements long."""

    offsets_N: torch.Tensor
    width: int

    def vector(self, arena: Arena) -> torch.Tensor:
        """The only row; or all rows of the head, which are one element wide, as one vector."""
        if len(self.offsets_N) > 1:
            return self.gather(arena).view(-1)
        return arena.row(int(self.offsets_N[0]), self.width)

    def gather(self, arena: Arena, which: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of all rows, or of those at the indices `which`, [N, width]."""
        offsets_N = self.offsets_N if which is None else self.offsets_N[which]
        return arena.flat[offsets_N[:, None] + torch.arange(self.width, device=offsets_N.device)]


@dataclass(frozen=True, slots=True)
class ResidentDelta:
    """One adapter's changes of one module. `token_ids` are those of `Part.TOKENS`, ascending; `vocab_size` is
    that of the adapter's own vocabulary, 0 if it has none.
    """

    scaling: float
    parts: Mapping[Part, ResidentRows]
    token_ids: torch.Tensor
    vocab_size: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class ResidentDeltas:
    """One adapter's changes, by module.

    `lora` are LoRA rows of linears, which one op applies for all adapters of a step; `others` is the rest.
    `head` are the parameters of its head, by name: rows and shape.
    """

    lora: Mapping[str, ResidentDelta]
    others: Mapping[str, ResidentDelta]
    head: Mapping[str, tuple[ResidentRows, torch.Size]] = field(default_factory=dict)


_LORA = frozenset({Part.LORA_A, Part.LORA_B})


def write_slab(
    arena: Arena, adapter: HostAdapter, pages: tuple[int, ...], linears: Container[str]
) -> ResidentDeltas:
    """Copies an adapter's rows into its pages; returns where they lie.

    The scaling is not multiplied into the rows, which would round them.
    """
    size = arena.page_elements
    device = arena.flat.device
    layout = slab_layout(adapter.spec.rows, size)
    offsets, counts = [np.empty(0, np.int64)], []
    for group, runs in zip(adapter.spec.rows, layout.runs, strict=True):
        rows_NX, done = _rows_of(adapter, group), 0
        for run in runs:
            start = pages[run.offset // size] * size + run.offset % size
            arena.write_rows(start, rows_NX[done : done + run.count])
            offsets.append(start + group.width * np.arange(run.count, dtype=np.int64))
            done += run.count
        counts.append(done)
    # One copy: an adapter has hundreds of groups.
    every_offset = torch.from_numpy(np.concatenate(offsets)).to(device)
    parts: dict[str, dict[Part, ResidentRows]] = {}
    head: dict[str, tuple[ResidentRows, torch.Size]] = {}
    for group, offsets_N in zip(adapter.spec.rows, torch.split(every_offset, counts), strict=True):
        rows = ResidentRows(offsets_N, group.width)
        if group.part is Part.HEAD:
            head[group.module] = rows, adapter.head[group.module].shape
        else:
            parts.setdefault(group.module, {})[group.part] = rows
    deltas = {
        name: ResidentDelta(
            adapter.deltas[name].scaling,
            of_module,
            torch.tensor(adapter.deltas[name].token_ids, dtype=torch.long, device=device),
            adapter.spec.vocab_size or 0,
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
        head=head,
    )


def _rows_of(adapter: HostAdapter, group: RowGroup) -> torch.Tensor:
    if group.part is Part.HEAD:
        return adapter.head[group.module].reshape(group.count, group.width)
    return adapter.deltas[group.module].rows[group.part]


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of the batch with the same adapters, each with a weight."""

    start: int
    end: int
    adapters: tuple[tuple[ResidentDeltas, float], ...]

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)


@dataclass(frozen=True, slots=True)
class _Gathered:
    """The LoRA rows of one linear for the adapters of a step. `segments` are indices of those with rows."""

    segments: tuple[int, ...]
    row_bounds: tuple[int, ...]
    a_offsets_R: torch.Tensor
    b_offsets_R: torch.Tensor
    weights_R: torch.Tensor


# By a linear, or by those of a group.
_Rows: TypeAlias = dict[str | tuple[str, ...], LoraRows | None]


class _Combination:
    """The gathered rows of a sequence of segments' adapters.

    `changed` are the modules that they change by more than LoRA rows. While a batch decodes, its segments
    have the same bounds step after step, so the `LoraRows` of the last few bounds are cached.
    """

    _CACHED = 4

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.gathered: dict[str, _Gathered | None] = {}
        self.changed = frozenset(
            module for segment in segments for adapter, _ in segment.adapters for module in adapter.others
        )
        self._rows: OrderedDict[tuple[tuple[int, int], ...], _Rows] = OrderedDict()

    def rows(self, segments: Sequence[Segment]) -> _Rows:
        """By module or modules, for segments with these bounds; the caller adds to it."""
        return _cached(self._rows, tuple((each.start, each.end) for each in segments), dict, self._CACHED)


class GatheredRows:
    """Caches the gathered rows of the last combinations of adapters, which change less often than tokens."""

    _CACHED = 8

    def __init__(self) -> None:
        self._by_adapters: OrderedDict[tuple[object, ...], _Combination] = OrderedDict()

    def of(self, segments: Sequence[Segment]) -> _Combination:
        """The combination of these segments' adapters, in order; the caller adds to it."""
        key = tuple(segment.adapters for segment in segments)
        return _cached(self._by_adapters, key, lambda: _Combination(segments), self._CACHED)


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def _cached(cache: OrderedDict[_Key, _Value], key: _Key, make: Callable[[], _Value], size: int) -> _Value:
    """The value of a key, made if missing; evicts the least recently used beyond `size`."""
    if key not in cache:
        cache[key] = make()
    cache.move_to_end(key)
    if len(cache) > size:
        cache.popitem(last=False)
    return cache[key]


class DeltaBatch:
    """The adapters of a step's rows. The rows of a linear are gathered when it first asks for them."""

    def __init__(self, segments: Sequence[Segment], gathered: GatheredRows) -> None:
        self.segments = segments
        self._combination = gathered.of(segments)
        self._rows = self._combination.rows(segments)

    def lora(self, module: str) -> LoraRows | None:
        """The LoRA rows of one linear, or None if no adapter of the step has any."""
        if module not in self._rows:
            self._rows[module] = self._rows_of(module)
        return self._rows[module]

    def grouped_lora(self, modules: tuple[str, ...], columns: tuple[tuple[int, int], ...]) -> LoraRows | None:
        """The LoRA rows of linears whose outputs are these columns of one, or None if there are none."""
        if modules not in self._rows:
            found = [(self.lora(module), own) for module, own in zip(modules, columns, strict=True)]
            self._rows[modules] = _joined([(rows, own) for rows, own in found if rows is not None])
        return self._rows[modules]

    def changes(self, module: str) -> bool:
        """Whether an adapter of the step changes the module by more than LoRA rows of a linear."""
        return module in self._combination.changed

    def _rows_of(self, module: str) -> LoraRows | None:
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

    def with_parts(self, module: str, *parts: Part) -> Iterator[tuple[Segment, ResidentDelta, float]]:
        """Segment, changes and weight of each adapter that changes one of these parts of a module."""
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


def _joined(parts: Sequence[tuple[LoraRows, tuple[int, int]]]) -> LoraRows | None:
    """The rows of all parts, each of which changes its own columns."""
    if not parts:
        return None
    rows = [each for each, _ in parts]
    counts = [high - low for each in rows for low, high in pairwise(each.row_bounds)]
    return LoraRows(
        token_starts=sum((each.token_starts for each in rows), ()),
        token_ends=sum((each.token_ends for each in rows), ()),
        row_bounds=tuple(accumulate(counts, initial=0)),
        a_offsets_R=torch.cat([each.a_offsets_R for each in rows]),
        b_offsets_R=torch.cat([each.b_offsets_R for each in rows]),
        weights_R=torch.cat([each.weights_R for each in rows]),
        columns=tuple(own for each, own in parts for _ in each.token_starts),
    )
