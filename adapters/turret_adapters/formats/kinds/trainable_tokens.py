"""TRAINABLE_TOKENS: rows of the embedding or the head trained alone, as peft's `tuners/trainable_tokens`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turret_adapters.formats.fields import COMMON, Fields, Policy, Use, show
from turret_adapters.formats.kind import Content, Kind, Tensors
from turret_adapters.formats.replaced import Replaced, plan_replaced
from turret_adapters.formats.targets import Targets
from turret_adapters.formats.tensors import Expected
from turret_adapters.formats.tokens import check_token_ids, tokens_of_modules
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, Method, ModuleKind

FIELDS: Mapping[str, Policy] = {
    **COMMON,
    "init_weights": Use.INERT,
    "target_modules": Use.READ,
    "token_indices": Use.READ,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensPlan:
    """The plan of a TRAINABLE_TOKENS file."""

    replaced: Replaced

    @property
    def expected(self) -> Mapping[str, Expected]:
        return self.replaced.expected

    def build(self, tensors: Tensors, weights: BaseWeights) -> Content:
        return Content(deltas=self.replaced.rows(tensors, weights).deltas())


def _plan(fields: Fields, base: BaseSpec) -> TokensPlan:
    modules = base.of_kind(ModuleKind.EMBEDDING)
    if fields.get("target_modules") is not None:
        modules = Targets.read(fields, base).find(base, ModuleKind.EMBEDDING, ModuleKind.HEAD)
    token_ids = fields.get("token_indices")
    if not isinstance(token_ids, list):
        raise fields.refusal("token_indices", "a list of token ids")
    listed = dict.fromkeys(modules, tuple(token_ids))
    check_token_ids("token_indices", fields, base, listed)
    tokens = tokens_of_modules(base, listed, wrapper="")
    for head in tokens.tied.keys() & listed.keys():  # peft fails
        raise fields.refusal("target_modules", f"without {show(head)}, which is tied to the embedding")
    return TokensPlan(replaced=plan_replaced(fields, base, (), tokens=tokens))


KIND = Kind(method=Method.TRAINABLE_TOKENS, fields=FIELDS, plan=_plan)
