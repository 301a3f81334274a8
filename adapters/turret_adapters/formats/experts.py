"""Experts whose linears have names of their own, as in transformers 4; transformers 5 stacks them.

peft renames and stacks them when it loads a LORA (`utils/transformers_weight_conversion.py`). Here every kind
finds the linears by the names that it was trained with, and the pairs of an expert's two first linears are
joined to one pair of `gate_up_proj` afterwards.

Shape suffixes: R rank, O out_features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from turret_adapters.errors import AdapterFormatError
from turret_adapters.formats.fields import show
from turret_adapters.host import ModuleDelta
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape, Part

# The names of the two first linears of an expert, and of the last one.
_NAMES = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
_IN_KEY = re.compile(rf"\.(\w+)\.experts\.\d+\.({'|'.join(name for names in _NAMES for name in names)})\.")
_PAIR = {Part.LORA_A, Part.LORA_B}


@dataclass(frozen=True, slots=True)
class Place:
    """A module of the base, or the half of its outputs that a linear of its own computes: 0 or 1."""

    path: str
    half: int | None = None


def linears_apart(keys: Iterable[str], base: BaseSpec) -> dict[str, tuple[Place, ModuleShape]] | None:
    """The base's modules by their names in transformers 4; None if no key names an expert so."""
    found = next(filter(None, map(_IN_KEY.search, keys)), None) if base.of_kind(ModuleKind.EXPERT) else None
    if found is None:
        return None
    block, linear = found.groups()
    first, second, last = next(names for names in _NAMES if linear in names)
    apart: dict[str, tuple[Place, ModuleShape]] = {}
    for path, shape in base.modules.items():
        if shape.kind is ModuleKind.ROUTER:
            parent, _, router = path.rpartition(".")
            name = f"{parent.rpartition('.')[0]}.{block}.{router}"
            apart[name] = (Place(path), replace(shape, kind=ModuleKind.LINEAR))
        elif shape.kind is not ModuleKind.EXPERT:
            apart[path] = (Place(path), shape)
        else:
            experts, projection, index = path.rsplit(".", 2)
            expert = f"{experts.rsplit('.', 2)[0]}.{block}.experts.{index}"
            linear_shape = replace(shape, kind=ModuleKind.LINEAR)
            if projection == "down_proj":
                apart[f"{expert}.{last}"] = (Place(path), linear_shape)
                continue
            linear_shape = replace(linear_shape, out_features=shape.out_features // 2)
            apart[f"{expert}.{first}"] = (Place(path, half=0), linear_shape)
            apart[f"{expert}.{second}"] = (Place(path, half=1), linear_shape)
    return apart


def check_pairs(module: str, delta: ModuleDelta) -> None:
    """Checks a change of an expert or a router.

    Raises:
        AdapterFormatError: it is more than a low-rank pair.
    """
    others = delta.rows.keys() - _PAIR
    if others:
        raise AdapterFormatError(
            f"module {show(module)}: expected only a low-rank pair, since other changes of experts and "
            f"routers are not supported, found a {min(part.value for part in others)}"
        )


def join_halves(halves: Sequence[tuple[int, ModuleDelta]]) -> ModuleDelta:
    """The pair of a module from those of its halves: its rank is their sum."""
    scaling = max((delta.scaling for _, delta in halves), key=abs)  # 0 only if all are
    pairs = [(half, delta.rows[Part.LORA_A], delta.rows[Part.LORA_B]) for half, delta in halves]
    columns = []
    for (half, _, b_RO), (_, delta) in zip(pairs, halves, strict=True):
        own_RO = b_RO if delta.scaling == scaling else b_RO * (delta.scaling / scaling)
        zeros_RO = torch.zeros_like(own_RO)
        columns.append(torch.cat([zeros_RO, own_RO] if half else [own_RO, zeros_RO], dim=1))
    rows: Mapping[Part, torch.Tensor] = {
        Part.LORA_A: torch.cat([a_RI for _, a_RI, _ in pairs]),
        Part.LORA_B: torch.cat(columns),
    }
    return ModuleDelta(rows=rows, scaling=scaling)
