"""`target_parameters`: low-rank pairs of stacked experts and of routers, as in peft's `ParamWrapper`.

peft wraps the module that has the parameters once per parameter, one wrapper inside the other, and stacks the
pairs of all experts: A is [experts · rank, in], ordered by expert, and B is [out, rank · experts], ordered by
rank. A router counts as one expert.

Shape suffixes: R rank, X experts, I in_features, O out_features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from turret_adapters.formats.fields import Fields, show
from turret_adapters.formats.kind import Rows, Tensors
from turret_adapters.formats.tensors import MODULE_PREFIX, WIDTH, Expected
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape

FIELD = "target_parameters"


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedPair:
    """The pair of one parameter, which consists of the modules `experts`; its keys begin with `key`."""

    experts: Sequence[str]
    shape: ModuleShape
    key: str
    rank: int
    scaling: float

    @property
    def expected(self) -> Mapping[str, Expected]:
        rows = self.rank * len(self.experts)
        return {
            f"{self.key}.lora_A.weight": Expected((rows, self.shape.in_features), (None, WIDTH)),
            f"{self.key}.lora_B.weight": Expected((self.shape.out_features, rows), (WIDTH, None)),
        }

    def add_to(self, rows: Rows, tensors: Tensors) -> None:
        num_experts = len(self.experts)
        a_XRI = tensors[f"{self.key}.lora_A.weight"].view(num_experts, self.rank, -1)
        b_ORX = tensors[f"{self.key}.lora_B.weight"].view(-1, self.rank, num_experts)
        for index, expert in enumerate(self.experts):
            rows.add_lora(expert, a_XRI[index], b_ORX[:, :, index], self.scaling)


def find_parameters(fields: Fields, base: BaseSpec) -> dict[str, list[str]]:
    """The targeted parameters by path, each with the modules of its experts, in the base's order.

    Raises:
        AdapterFormatError: something other than experts or a router is named.
    """
    names = fields.names(FIELD) or frozenset()
    stacked: dict[str, list[str]] = defaultdict(list)
    for module, shape in base.of_kind(ModuleKind.EXPERT, ModuleKind.ROUTER).items():
        router = shape.kind is ModuleKind.ROUTER
        stacked[f"{module}.weight" if router else module.rpartition(".")[0]].append(module)
    for name in sorted(names):
        if not any(_is(path, name) for path in stacked):
            raise fields.refusal(
                FIELD, f"without {show(name)}, since only stacked experts and routers are supported"
            )
    return {path: experts for path, experts in stacked.items() if any(_is(path, name) for name in names)}


def stacked_pairs(
    parameters: Mapping[str, Sequence[str]], base: BaseSpec, ranks: Iterable[tuple[int, float]]
) -> tuple[StackedPair, ...]:
    """The pairs of the parameters of `find_parameters`, with the rank and the scaling of each."""
    by_holder: dict[str, list[str]] = defaultdict(list)
    for path in parameters:
        by_holder[path.rpartition(".")[0]].append(path)
    # The wrapper of the last parameter is the outermost one.
    keys = {
        path: MODULE_PREFIX + holder + ".base_layer" * depth
        for holder, paths in by_holder.items()
        for depth, path in enumerate(reversed(paths))
    }
    return tuple(
        StackedPair(
            experts=experts, shape=base.modules[experts[0]], key=keys[path], rank=rank, scaling=scaling
        )
        for (path, experts), (rank, scaling) in zip(parameters.items(), ranks, strict=True)
    )


def _is(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
