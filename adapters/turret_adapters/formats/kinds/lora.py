"""LORA: low-rank pairs (arXiv 2106.09685) with DoRA's gains (arXiv 2402.09353), as peft's `tuners/lora`.

Shape suffixes: R rank, I in_features, O out_features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from turret_adapters.errors import AdapterFormatError
from turret_adapters.formats.fields import COMMON, REFUSED, Fields, Policy, Use, integer, number, show
from turret_adapters.formats.files import CONFIG_NAME
from turret_adapters.formats.kind import Content, Kind, Tensors, check_finite
from turret_adapters.formats.parameters import StackedPair, find_parameters, stacked_pairs
from turret_adapters.formats.replaced import Replaced, plan_replaced
from turret_adapters.formats.targets import BY_LAYER, Targets, resolve
from turret_adapters.formats.tensors import MODULE_PREFIX, VOCABULARY, WIDTH, Expected
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, Method, ModuleKind, ModuleShape, Part

MAX_RANK = 512
MAX_INVOCATION_TOKENS = 4096
DORA_ROWS = 8192

# Those of `init_lora_weights` that leave the base's weights as they are.
_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica"})

# ms-swift adds `lora_dtype`, `lorap_…` and `swift_type`, which concern the training.
FIELDS: Mapping[str, Policy] = {
    **COMMON,
    **BY_LAYER,
    "alora_invocation_tokens": Use.READ,
    "alpha_pattern": Use.READ,
    "arrow_config": REFUSED,
    "bias": ("none", "all", "lora_only"),
    "corda_config": Use.INERT,
    "ensure_weight_tying": Use.READ,
    "eva_config": Use.INERT,
    "exclude_modules": Use.READ,
    "fan_in_fan_out": Use.INERT,
    "init_lora_weights": Use.READ,
    "kasa_config": REFUSED,
    "layer_replication": REFUSED,
    "loftq_config": Use.INERT,
    "lora_alpha": Use.READ,
    "lora_bias": Use.READ,
    "lora_dropout": Use.INERT,
    "lora_dtype": Use.INERT,
    "lora_ga_config": Use.INERT,
    "lorap_emb_lr": Use.INERT,
    "lorap_lr_ratio": Use.INERT,
    "megatron_config": REFUSED,
    "megatron_core": Use.INERT,
    "monteclora_config": REFUSED,
    "qalora_group_size": Use.INERT,
    "r": Use.READ,
    "rank_pattern": Use.READ,
    "runtime_config": Use.INERT,
    "swift_type": ("LORA",),
    "target_parameters": Use.READ,
    "trainable_token_indices": Use.READ,
    "use_bdlora": REFUSED,
    "use_dora": Use.READ,
    "use_qalora": REFUSED,
    "use_rslora": Use.READ,
    "velora_config": REFUSED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    name: str
    shape: ModuleShape
    rank: int
    scaling: float

    def key(self, name: str) -> str:
        return f"{MODULE_PREFIX}{self.name}.{name}"

    @property
    def pair(self) -> tuple[str, str]:
        """The keys of A and B."""
        if self.shape.kind is ModuleKind.EMBEDDING:
            return self.key("lora_embedding_A"), self.key("lora_embedding_B")
        return self.key("lora_A.weight"), self.key("lora_B.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPlan:
    """The plan of a LORA file."""

    modules: tuple[_Module, ...]
    stacked: tuple[StackedPair, ...]
    use_dora: bool
    lora_bias: bool
    invocation_tokens: tuple[int, ...]
    replaced: Replaced

    @property
    def expected(self) -> Mapping[str, Expected]:
        expected = dict(self.replaced.expected)
        for module in self.modules:
            a_key, b_key = module.pair
            in_is, out_is = _dimensions(module.shape.kind)
            expected[a_key] = Expected((module.rank, module.shape.in_features), (None, in_is))
            expected[b_key] = Expected((module.shape.out_features, module.rank), (out_is, None))
            if self.use_dora:
                expected[module.key("lora_magnitude_vector")] = Expected(
                    (module.shape.out_features,), (out_is,)
                )
            if self.lora_bias:
                expected[module.key("lora_B.bias")] = Expected((module.shape.out_features,), (out_is,))
        for pair in self.stacked:
            expected.update(pair.expected)
        return expected

    def build(self, tensors: Tensors, weights: BaseWeights) -> Content:
        rows = self.replaced.rows(tensors, weights)
        if self.invocation_tokens and rows.parts:
            # Rows apply from the invocation on, but peft applies its replacements to every token.
            raise AdapterFormatError(
                f"{CONFIG_NAME}: expected 'alora_invocation_tokens' to be empty beside weights of "
                f"{show(next(iter(rows.parts)))} that differ from the base's, found "
                f"{len(self.invocation_tokens)} tokens (save it with save_embedding_layers=False if they "
                "were not trained)"
            )
        for module in self.modules:
            a_RI, b_OR = (tensors[key] for key in module.pair)
            rows.add_lora(module.name, a_RI, b_OR, module.scaling)
            if self.use_dora:
                magnitude_O = tensors[module.key("lora_magnitude_vector")]
                norms = _norms_by_token if module.shape.kind is ModuleKind.EMBEDDING else _norms
                gain_O = magnitude_O.float() / norms(
                    rows.weight(module.name), a_RI.float(), b_OR.float() * module.scaling
                )
                rows.add_vector(module.name, Part.GAIN, check_finite(module.name, gain_O))
            if self.lora_bias:
                bias_O = module.scaling * tensors[module.key("lora_B.bias")].float()
                own_O = rows.bias(module.name)
                sum_O = bias_O if own_O is None else own_O + bias_O
                rows.add_vector(module.name, Part.BIAS, check_finite(module.name, sum_O))
        for pair in self.stacked:
            pair.add_to(rows, tensors)
        return Content(
            deltas=rows.deltas(),
            max_rank=max([each.rank for each in self.modules] + [each.rank for each in self.stacked]),
            invocation_tokens=self.invocation_tokens,
        )


def check_initialisation(fields: Fields) -> None:
    """Refuses an initialisation that changes the base's weights.

    Raises:
        AdapterFormatError: it is one, or unknown.
    """
    name = "init_lora_weights"
    value = fields.get(name)
    if isinstance(value, str) and value.lower() in _INITIALISATIONS:
        return
    if value is not None and not isinstance(value, bool):
        raise fields.refusal(
            name,
            f"true, false, {', '.join(map(repr, sorted(_INITIALISATIONS)))} (peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) converts an adapter that changed "
            "its base's weights)",
        )


def _plan(fields: Fields, base: BaseSpec) -> LoraPlan:
    check_initialisation(fields)
    parameters = find_parameters(fields, base)
    targets: Mapping[str, ModuleShape] = {}
    if fields.get("target_modules") or not parameters:
        targets = Targets.read(fields, base).find(
            base, ModuleKind.LINEAR, ModuleKind.HEAD, ModuleKind.EMBEDDING
        )
    plan = LoraPlan(
        modules=_modules(fields, targets),
        stacked=stacked_pairs(parameters, base, _ranks(fields, list(parameters))),
        use_dora=fields.flag("use_dora"),
        lora_bias=fields.flag("lora_bias"),
        invocation_tokens=_invocation_tokens(fields),
        replaced=plan_replaced(fields, base, targets, bias_only="lora_only"),
    )
    if parameters:
        for name in ("use_dora", "lora_bias", "alora_invocation_tokens"):
            if fields.get(name):
                raise fields.refusal(name, "empty beside target_parameters")
    _check_combination(fields, plan)
    return plan


KIND = Kind(method=Method.LORA, fields=FIELDS, plan=_plan)


def _modules(fields: Fields, targets: Mapping[str, ModuleShape]) -> tuple[_Module, ...]:
    ranks = _ranks(fields, list(targets))
    return tuple(
        _Module(name=name, shape=shape, rank=rank, scaling=scaling)
        for (name, shape), (rank, scaling) in zip(targets.items(), ranks, strict=True)
    )


def _ranks(fields: Fields, names: Sequence[str]) -> list[tuple[int, float]]:
    """The rank and the scaling of each module or parameter."""
    rank = fields.integer("r", most=MAX_RANK, default=8)
    alpha = fields.number("lora_alpha", default=8)
    use_rslora = fields.flag("use_rslora")
    rank_pattern = {
        key: integer(f"rank_pattern[{show(key)}]", value, MAX_RANK)
        for key, value in fields.patterns("rank_pattern")
    }
    alpha_pattern = {
        key: number(f"alpha_pattern[{show(key)}]", value) for key, value in fields.patterns("alpha_pattern")
    }
    ranks = resolve("rank_pattern", rank_pattern, rank, names)
    alphas = resolve("alpha_pattern", alpha_pattern, alpha, names)
    return [
        (rank, alpha / math.sqrt(rank) if use_rslora else alpha / rank)
        for rank, alpha in zip(ranks, alphas, strict=True)
    ]


def _invocation_tokens(fields: Fields) -> tuple[int, ...]:
    name = "alora_invocation_tokens"
    value = fields.get(name) or []
    if (
        not isinstance(value, list)
        or len(value) > MAX_INVOCATION_TOKENS
        or not all(type(token) is int and 0 <= token < 1 << 31 for token in value)
    ):
        raise fields.refusal(name, f"a list of at most {MAX_INVOCATION_TOKENS} token ids")
    return tuple(value)


def _check_combination(fields: Fields, plan: LoraPlan) -> None:
    """Refuses combinations that peft refuses, or that rows do not express."""
    if plan.use_dora and plan.lora_bias:
        raise fields.refusal("lora_bias", "false beside use_dora")
    embedding = next((m.name for m in plan.modules if m.shape.kind is ModuleKind.EMBEDDING), None)
    if embedding is not None:
        for name in ("lora_bias", "alora_invocation_tokens"):
            if fields.get(name):
                raise fields.refusal(
                    name, f"empty, since peft does not support it on the embedding {show(embedding)}"
                )
    tied = plan.replaced.tokens.tied.keys() & {module.name for module in plan.modules}
    if plan.use_dora and tied:
        raise fields.refusal("use_dora", f"false beside trained tokens of the tied {show(min(tied))}")
    if not plan.invocation_tokens:
        return
    # Rows apply from the invocation on, but peft applies its replacements to every token.
    if plan.use_dora:
        raise fields.refusal("use_dora", "false beside alora_invocation_tokens")
    if plan.replaced.places:
        name = next(
            name for name in ("modules_to_save", "trainable_token_indices", "bias") if fields.get(name)
        )
        raise fields.refusal(name, "empty or 'none' beside alora_invocation_tokens")


def _dimensions(kind: ModuleKind) -> tuple[str, str]:
    """The dimensions of the base that in_features and out_features equal."""
    match kind:
        case ModuleKind.EMBEDDING:
            return VOCABULARY, WIDTH
        case ModuleKind.HEAD:
            return WIDTH, VOCABULARY
        case _:
            return WIDTH, WIDTH


def _norms_by_token(weight_VE: torch.Tensor, a_RV: torch.Tensor, b_ER: torch.Tensor) -> torch.Tensor:
    """‖W + (BA)ᵀ‖ of each feature of an embedding, over its tokens, computed for some tokens at a time."""
    squares = [
        torch.addmm(some_VE, some_RV.T, b_ER.T).square().sum(dim=0)
        for some_VE, some_RV in zip(
            torch.split(weight_VE, DORA_ROWS), torch.split(a_RV, DORA_ROWS, dim=1), strict=True
        )
    ]
    return torch.stack(squares).sum(dim=0).sqrt()


def _norms(weight_OI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    """‖W + BA‖ of each output, computed for some rows at a time, since a head's weight is large."""
    return torch.cat(
        [
            torch.linalg.vector_norm(torch.addmm(some_OI, some_OR, a_RI), dim=1)
            for some_OI, some_OR in zip(
                torch.split(weight_OI, DORA_ROWS), torch.split(b_OR, DORA_ROWS), strict=True
            )
        ]
    )
