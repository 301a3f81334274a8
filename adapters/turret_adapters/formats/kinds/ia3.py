"""IA3: a learned gain for each output or, in feed-forward modules, each input (arXiv 2205.05638).

As peft's `tuners/ia3/layer.py`. Shape suffixes: O out_features, X any width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from turret_adapters.formats.fields import COMMON, Fields, Policy, Use
from turret_adapters.formats.kind import Content, Kind, Tensors, check_finite
from turret_adapters.formats.replaced import Replaced, plan_replaced
from turret_adapters.formats.targets import TARGETED, Targets, ending_with, match_modules, read_modules
from turret_adapters.formats.tensors import MODULE_PREFIX, VOCABULARY, WIDTH, Expected
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, Method, ModuleKind, ModuleShape, Part

FIELDS: Mapping[str, Policy] = {
    **COMMON,
    **TARGETED,
    "exclude_modules": Use.READ,
    "fan_in_fan_out": Use.INERT,
    "feedforward_modules": Use.READ,
    "init_ia3_weights": Use.INERT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ia3Plan:
    """The plan of an IA3 file."""

    modules: Mapping[str, ModuleShape]
    feedforward: Collection[str]
    replaced: Replaced

    @property
    def expected(self) -> Mapping[str, Expected]:
        expected = dict(self.replaced.expected)
        for name, shape in self.modules.items():
            if name in self.feedforward:
                expected[_key(name)] = Expected((1, shape.in_features), (None, WIDTH))
            else:
                out_is = VOCABULARY if shape.kind is ModuleKind.HEAD else WIDTH
                expected[_key(name)] = Expected((shape.out_features, 1), (out_is, None))
        return expected

    def build(self, tensors: Tensors, weights: BaseWeights) -> Content:
        rows = self.replaced.rows(tensors, weights)
        for name, shape in self.modules.items():
            gain_X = tensors[_key(name)].view(-1)
            if name in self.feedforward:
                rows.add_vector(name, Part.INPUT_GAIN, gain_X)
                continue
            rows.add_vector(name, Part.GAIN, gain_X)
            if shape.has_bias:
                bias_O = rows.bias(name)
                assert bias_O is not None, "the base says that this module has a bias"
                rows.add_vector(name, Part.BIAS, check_finite(name, gain_X.float() * bias_O))
        return Content(deltas=rows.deltas())


def _plan(fields: Fields, base: BaseSpec) -> Ia3Plan:
    modules = Targets.read(fields, base).find(base, ModuleKind.LINEAR, ModuleKind.HEAD)
    if fields.get("feedforward_modules") is None:
        raise fields.refusal("feedforward_modules", "a list of names or a pattern")
    names = read_modules(fields, "feedforward_modules")
    if isinstance(names, str):
        feedforward = match_modules("feedforward_modules", names, list(modules))
    else:
        feedforward = set(ending_with(names, modules))
    return Ia3Plan(
        modules=modules,
        feedforward=feedforward,
        replaced=plan_replaced(fields, base, modules),
    )


def _key(module: str) -> str:
    return f"{MODULE_PREFIX}{module}.ia3_l"


KIND = Kind(method=Method.IA3, fields=FIELDS, plan=_plan)
