"""LN_TUNING: norms trained whole (arXiv 2312.11420), as peft's `tuners/ln_tuning`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turret_adapters.formats.fields import COMMON, Fields, Policy, Use
from turret_adapters.formats.kind import Content, Kind, Tensors
from turret_adapters.formats.replaced import Replaced, plan_replaced
from turret_adapters.formats.targets import TARGETED, Targets
from turret_adapters.formats.tensors import MODULE_PREFIX, WIDTH, Expected
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, Method, ModuleKind, ModuleShape, Part

FIELDS: Mapping[str, Policy] = {**COMMON, **TARGETED, "exclude_modules": Use.READ}


@dataclass(frozen=True, slots=True, kw_only=True)
class LnTuningPlan:
    """The plan of an LN_TUNING file."""

    modules: Mapping[str, ModuleShape]
    replaced: Replaced

    @property
    def expected(self) -> Mapping[str, Expected]:
        expected = dict(self.replaced.expected)
        for name, shape in self.modules.items():
            expected[_key(name, Part.WEIGHT)] = Expected((shape.out_features,), (WIDTH,))
            if shape.has_bias:
                expected[_key(name, Part.BIAS)] = Expected((shape.out_features,), (WIDTH,))
        return expected

    def build(self, tensors: Tensors, weights: BaseWeights) -> Content:
        rows = self.replaced.rows(tensors, weights)
        for name, shape in self.modules.items():
            rows.add_vector(name, Part.WEIGHT, tensors[_key(name, Part.WEIGHT)])
            if shape.has_bias:
                rows.add_vector(name, Part.BIAS, tensors[_key(name, Part.BIAS)])
        return Content(deltas=rows.deltas())


def _plan(fields: Fields, base: BaseSpec) -> LnTuningPlan:
    modules = Targets.read(fields, base).find(base, ModuleKind.NORM)
    return LnTuningPlan(modules=modules, replaced=plan_replaced(fields, base, modules))


def _key(module: str, part: Part) -> str:
    return f"{MODULE_PREFIX}{module}.ln_tuning_layers.{part.value}"


KIND = Kind(method=Method.LN_TUNING, fields=FIELDS, plan=_plan)
