"""VERA: one random low-rank pair for all modules, and two trained vectors for each (arXiv 2310.11454).

As in peft's `tuners/vera/layer.py`: ΔW = diag(b) B diag(d) A, with as many rows and columns of the shared
pair as the module has outputs and inputs; converted to LoRA. Shape suffixes: R rank, I in_features, O
out_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turret_adapters.formats.fields import COMMON, Fields, Policy, Use, refusal
from turret_adapters.formats.files import MAX_TENSORS_BYTES
from turret_adapters.formats.kind import Content, Kind, Tensors, check_finite
from turret_adapters.formats.replaced import Replaced, plan_replaced
from turret_adapters.formats.targets import BY_LAYER, Targets
from turret_adapters.formats.tensors import MODULE_PREFIX, VOCABULARY, WIDTH, Expected
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, Method, ModuleKind, ModuleShape

MAX_RANK = 1024

FIELDS: Mapping[str, Policy] = {
    **COMMON,
    **BY_LAYER,
    "bias": ("none", "all", "vera_only"),
    "d_initial": Use.INERT,
    "fan_in_fan_out": Use.INERT,
    "init_weights": Use.INERT,
    "projection_prng_key": Use.INERT,
    "r": Use.READ,
    "save_projection": Use.READ,
    "vera_dropout": Use.INERT,
}
_A_KEY, _B_KEY = "base_model.vera_A", "base_model.vera_B"
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class VeraPlan:
    """The plan of a VERA file."""

    modules: Mapping[str, ModuleShape]
    rank: int
    replaced: Replaced

    @property
    def expected(self) -> Mapping[str, Expected]:
        widest_in = max(shape.in_features for shape in self.modules.values())
        widest_out = max(shape.out_features for shape in self.modules.values())
        expected = {
            **self.replaced.expected,
            _A_KEY: Expected((self.rank, widest_in), (None, WIDTH)),
            _B_KEY: Expected((widest_out, self.rank), (WIDTH, None)),
        }
        for name, shape in self.modules.items():
            out_is = VOCABULARY if shape.kind is ModuleKind.HEAD else WIDTH
            expected[_key(name, "b")] = Expected((shape.out_features,), (out_is,))
            expected[_key(name, "d")] = Expected((self.rank,), (None,))
        return expected

    def build(self, tensors: Tensors, weights: BaseWeights) -> Content:
        rows = self.replaced.rows(tensors, weights)
        shared_A, shared_B = tensors[_A_KEY], tensors[_B_KEY].float()
        # Modules of one width share the rows of A in this machine's memory.
        by_width = {
            width: shared_A[:, :width].contiguous()
            for width in {shape.in_features for shape in self.modules.values()}
        }
        for name, shape in self.modules.items():
            lambda_O, lambda_R = tensors[_key(name, "b")].float(), tensors[_key(name, "d")].float()
            b_OR = check_finite(name, lambda_O[:, None] * shared_B[: shape.out_features] * lambda_R)
            rows.add_lora(name, by_width[shape.in_features], b_OR, 1.0)
        return Content(deltas=rows.deltas(), max_rank=self.rank)


def _plan(fields: Fields, base: BaseSpec) -> VeraPlan:
    modules = Targets.read(fields, base).find(base, ModuleKind.LINEAR, ModuleKind.HEAD)
    rank = fields.integer("r", most=MAX_RANK, default=256)
    if not fields.flag("save_projection", default=True):
        raise fields.refusal(
            "save_projection", "true, since the file has no shared matrices otherwise, and they are random"
        )
    num_bytes = (
        sum(shape.in_features + shape.out_features for shape in modules.values()) * rank * _FLOAT_BYTES
    )
    if num_bytes > MAX_TENSORS_BYTES:
        raise refusal("r", rank, f"a rank whose rows take at most {MAX_TENSORS_BYTES} bytes")
    return VeraPlan(
        modules=modules,
        rank=rank,
        replaced=plan_replaced(fields, base, modules, bias_only="vera_only"),
    )


def _key(module: str, part: str) -> str:
    return f"{MODULE_PREFIX}{module}.vera_lambda_{part}"


KIND = Kind(method=Method.VERA, fields=FIELDS, plan=_plan)
