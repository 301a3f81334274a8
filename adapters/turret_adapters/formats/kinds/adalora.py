"""ADALORA: low-rank triples whose ranks are pruned in training (arXiv 2303.10512), converted to pairs.

As peft's `tuners/adalora`: ΔW = B(A ⊙ E) · alpha / (ranknum + 1e-5), where ranknum stays the initial rank
when loading prunes a module. Shape suffixes: R rank, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turret_adapters.formats.fields import REFUSED, Fields, Policy, Use, refusal, show
from turret_adapters.formats.kind import Content, Kind, Tensors, check_finite
from turret_adapters.formats.kinds import lora
from turret_adapters.formats.replaced import Replaced, plan_replaced
from turret_adapters.formats.targets import Targets
from turret_adapters.formats.tensors import MODULE_PREFIX, VOCABULARY, WIDTH, Expected
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, Method, ModuleKind, ModuleShape

FIELDS: Mapping[str, Policy] = {
    **lora.FIELDS,
    "alora_invocation_tokens": REFUSED,
    "alpha_pattern": Use.INERT,
    "beta1": Use.INERT,
    "beta2": Use.INERT,
    "deltaT": Use.INERT,
    "init_r": Use.READ,
    "lora_bias": REFUSED,
    "orth_reg_weight": Use.INERT,
    "r": Use.INERT,
    "target_parameters": REFUSED,
    "target_r": Use.INERT,
    "tfinal": Use.INERT,
    "tinit": Use.INERT,
    "total_step": Use.INERT,
    "use_dora": REFUSED,
    "use_rslora": Use.INERT,
}
_EPSILON = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaLoraPlan:
    """The plan of an ADALORA file."""

    modules: Mapping[str, ModuleShape]
    ranks: Mapping[str, int]
    initial_rank: int
    alpha: float
    replaced: Replaced

    @property
    def expected(self) -> Mapping[str, Expected]:
        expected = dict(self.replaced.expected)
        for name, shape in self.modules.items():
            rank = self.ranks[name]
            out_is = VOCABULARY if shape.kind is ModuleKind.HEAD else WIDTH
            expected[_key(name, "A")] = Expected((rank, shape.in_features), (None, WIDTH))
            expected[_key(name, "B")] = Expected((shape.out_features, rank), (out_is, None))
            expected[_key(name, "E")] = Expected((rank, 1), (None, None))
        return expected

    def build(self, tensors: Tensors, weights: BaseWeights) -> Content:
        rows = self.replaced.rows(tensors, weights)
        for name in self.modules:
            rank = self.ranks[name]
            if not rank:
                continue
            a_RI, b_OR, e_R1 = (tensors[_key(name, part)] for part in "ABE")
            # Without an alpha, peft scales by the rank that pruning left.
            scaling = (self.alpha if self.alpha > 0 else rank) / (self.initial_rank + _EPSILON)
            rows.add_lora(name, check_finite(name, a_RI.float() * e_R1.float()), b_OR, scaling)
        return Content(deltas=rows.deltas(), max_rank=max(self.ranks.values()))


def _plan(fields: Fields, base: BaseSpec) -> AdaLoraPlan:
    lora.check_initialisation(fields)
    modules = Targets.read(fields, base).find(base, ModuleKind.LINEAR, ModuleKind.HEAD)
    initial_rank = fields.integer("init_r", most=lora.MAX_RANK, default=12)
    ranks = dict.fromkeys(modules, initial_rank)
    for key, kept in fields.patterns("rank_pattern"):
        name = key.removesuffix(".lora_E")
        if name == key or name not in modules:
            raise refusal("rank_pattern", key, "of the lora_E of targeted modules")
        if (
            not isinstance(kept, list)
            or len(kept) != initial_rank
            or not all(isinstance(one, bool) for one in kept)
        ):
            raise refusal(f"rank_pattern[{show(key)}]", kept, f"a list of {initial_rank} booleans")
        ranks[name] = sum(kept)
    return AdaLoraPlan(
        modules=modules,
        ranks=ranks,
        initial_rank=initial_rank,
        alpha=fields.number("lora_alpha", default=8),
        replaced=plan_replaced(fields, base, modules, bias_only="lora_only"),
    )


def _key(module: str, part: str) -> str:
    return f"{MODULE_PREFIX}{module}.lora_{part}"


KIND = Kind(method=Method.ADALORA, fields=FIELDS, plan=_plan)
