"""Base weights that an adapter of any kind replaces.

These are whole modules (`modules_to_save`), biases (`bias`) and rows of the embedding or the head
(`trainable_token_indices`), as in peft's `utils/other.py` (AuxiliaryTrainingWrapper and its subclasses) and
`tuners/tuners_utils.py` (_get_learnable_bias_state_dict).

A file can also have the base's embedding and head, trained or not (`save_embedding_layers` in peft's
`utils/save_and_load.py`). peft loads them over the base's own; here those that differ replace them for this
adapter, and those that are equal are dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from turret_adapters.errors import AdapterFormatError
from turret_adapters.formats.fields import Fields, show
from turret_adapters.formats.files import CONFIG_NAME
from turret_adapters.formats.kind import Rows, Tensors
from turret_adapters.formats.targets import ending_with, modules_to_save
from turret_adapters.formats.tensors import MODULE_PREFIX, PROMPT_PREFIX, VOCABULARY, WIDTH, Expected
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape, Part

ROWS_COMPARED = 8192

_TOKENS_FIELD = "trainable_token_indices"

Place = tuple[str, Part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """The tensors of a file, by key, that take the place of base weights.

    `places` are trained by the config. The others need not be in the file: `copies` are the base's own
    weights, over which `places` go; `repeated` are written twice. `token_ids` are in the order of the rows in
    the file; a head in `tied_tokens` uses those of an embedding.
    """

    base: BaseSpec
    copies: Mapping[str, Place]
    places: Mapping[str, Place] = field(default_factory=dict)
    repeated: Mapping[str, Place] = field(default_factory=dict)
    token_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def expected(self) -> Mapping[str, Expected]:
        return {
            key: self._expected(module, part, optional=key not in self.places)
            for key, (module, part) in {**self.repeated, **self.copies, **self.places}.items()
        }

    def _expected(self, module: str, part: Part, *, optional: bool) -> Expected:
        shape = self.base.modules[module]
        match part, shape.kind:
            case Part.TOKENS, _:
                hidden = shape.in_features if shape.kind is ModuleKind.HEAD else shape.out_features
                return Expected((len(self.token_ids[module]), hidden), (None, WIDTH), optional)
            case Part.WEIGHT, ModuleKind.EMBEDDING:
                return Expected((shape.in_features, shape.out_features), (VOCABULARY, WIDTH), optional)
            case Part.WEIGHT, ModuleKind.HEAD:
                return Expected((shape.out_features, shape.in_features), (VOCABULARY, WIDTH), optional)
            case _, ModuleKind.HEAD:
                return Expected((shape.out_features,), (VOCABULARY,), optional)
            case _:
                return Expected((shape.out_features,), (WIDTH,), optional)

    def rows(self, tensors: Tensors, weights: BaseWeights) -> Rows:
        """The rows of the replacements."""
        rows = Rows(self.base, weights)
        for (module, part), tensor in self._changed_copies(tensors, weights).items():
            rows.replace(module, part, tensor)
        for key, (module, part) in self.places.items():
            if part is Part.TOKENS:
                self._replace_tokens(rows, module, tensors[key])
            else:
                rows.replace(module, part, tensors[key])
        for head, embedding in self.tied_tokens.items():
            self._replace_tokens(rows, head, tensors[_tokens_key(embedding)])
        return rows

    def _changed_copies(self, tensors: Tensors, weights: BaseWeights) -> dict[Place, torch.Tensor]:
        """The copies that differ from the base's weights. In a tied base, the last one is that of both."""
        changed: dict[Place, torch.Tensor] = {}
        for key, (module, part) in self.copies.items():
            if key not in tensors:
                continue
            of_base = weights.weight(module) if part is Part.WEIGHT else weights.bias(module)
            if of_base is not None and not _same(tensors[key], of_base):
                sharing = self.base.tied_modules if part is Part.WEIGHT else ()
                changed |= {(each, part): tensors[key] for each in (module, *sharing)}
        return changed

    def _replace_tokens(self, rows: Rows, module: str, rows_NE: torch.Tensor) -> None:
        ids = self.token_ids[module]
        order = sorted(range(len(ids)), key=ids.__getitem__)
        rows.replace_tokens(module, tuple(sorted(ids)), rows_NE[order].contiguous())


def plan_replaced(fields: Fields, base: BaseSpec, adapted: Collection[str], bias_only: str = "") -> Replaced:
    """Plans the base weights that the config replaces, besides the changes of the `adapted` modules.

    Args:
        fields: the config.
        base: the base model.
        adapted: the paths of the modules that peft wraps for the kind.
        bias_only: the value of `bias` that means the adapted modules' biases, if the kind has the field.

    Raises:
        AdapterFormatError: replacing one of them is not supported.
    """
    saved = _saved_modules(fields, base)
    token_ids, tied_tokens = _token_ids(fields, base)
    for module in token_ids:
        if module in saved or module in adapted:
            raise fields.refusal(_TOKENS_FIELD, f"without {show(module)}, which is adapted already")
    bias = fields.get("bias") if bias_only else None
    with_bias = base.modules if bias == "all" else adapted if bias == bias_only else ()
    wrapped = _Wrapped(adapted=adapted, tokens=token_ids, saved=saved)
    places = {
        **{key: place for module in saved for key, place in _parameters(base, module, "")},
        **{
            key: place
            for module in with_bias
            if module not in saved
            for key, place in _parameters(base, module, wrapped.path(module))
            if place[1] is Part.BIAS
        },
        **{_tokens_key(module): (module, Part.TOKENS) for module in token_ids.keys() - tied_tokens.keys()},
    }
    copies = {
        key: place
        for module in base.of_kind(ModuleKind.EMBEDDING, ModuleKind.HEAD)
        for key, place in _parameters(base, module, wrapped.path(module))
        if key not in places
    }
    # With bias="all" and with `save_embedding_layers`, peft writes every parameter inside a wrapper.
    repeated = {
        **{key: place for module in saved for key, place in _parameters(base, module, "modules_to_save.")},
        **{key: place for module in saved for key, place in _parameters(base, module, "original_module.")},
        **{_tokens_key(head): (head, Part.TOKENS) for head in tied_tokens},
    }
    return Replaced(
        base=base,
        places=places,
        copies=copies,
        repeated=repeated,
        token_ids=token_ids,
        tied_tokens=tied_tokens,
    )


def plan_copies(base: BaseSpec) -> Replaced:
    """Plans the copies of base weights of a method that changes no module, whose keys are shorter in peft."""
    copies = {
        key: place
        for module in base.of_kind(ModuleKind.EMBEDDING, ModuleKind.HEAD)
        for key, place in _parameters(base, module, "", root=PROMPT_PREFIX)
    }
    return Replaced(base=base, copies=copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wrapped:
    """The modules that peft wraps, by what it wraps them with."""

    adapted: Collection[str]
    tokens: Collection[str]
    saved: Collection[str]

    def path(self, module: str) -> str:
        """Where a module's own parameters are, below its path."""
        return (
            ("base_layer." if module in self.adapted else "")
            + ("token_adapter.base_layer." if module in self.tokens else "")
            + ("original_module." if module in self.saved else "")
        )


def _parameters(
    base: BaseSpec, module: str, inside: str, root: str = MODULE_PREFIX
) -> Iterator[tuple[str, Place]]:
    """The keys and places of a module's weight and bias."""
    yield f"{root}{module}.{inside}weight", (module, Part.WEIGHT)
    if base.modules[module].has_bias:
        yield f"{root}{module}.{inside}bias", (module, Part.BIAS)


def _tokens_key(module: str) -> str:
    return f"{MODULE_PREFIX}{module}.token_adapter.trainable_tokens_delta"


def _saved_modules(fields: Fields, base: BaseSpec) -> dict[str, ModuleShape]:
    saved = {
        module: base.modules[module] for module in ending_with(modules_to_save(fields, base), base.modules)
    }
    for module, shape in saved.items():
        if shape.kind in (ModuleKind.LINEAR, ModuleKind.EXPERT, ModuleKind.ROUTER):
            raise AdapterFormatError(
                f"{CONFIG_NAME}: expected 'modules_to_save' to name norms, embeddings or the head, "
                f"found {show(module)}, of kind {shape.kind.value}"
            )
    return saved


def _token_ids(fields: Fields, base: BaseSpec) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The token ids by module, and the embedding of each head that shares its token ids."""
    by_module = _lists_of_tokens(fields, base)
    tied = _tied_tokens(base, by_module)
    by_module.update({head: by_module[embedding] for head, embedding in tied.items()})
    for module, ids in by_module.items():
        shape = base.modules[module]
        if shape.kind not in (ModuleKind.EMBEDDING, ModuleKind.HEAD):
            raise fields.refusal(_TOKENS_FIELD, f"of the embedding or the head, not of {show(module)}")
        if shape.has_bias:
            # peft leaves the bias out.
            raise fields.refusal(_TOKENS_FIELD, f"without {show(module)}, which has a bias")
        vocabulary = shape.in_features if shape.kind is ModuleKind.EMBEDDING else shape.out_features
        if not ids or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
            raise fields.refusal(_TOKENS_FIELD, f"of token ids from 0 to {vocabulary - 1}")
        if len(set(ids)) != len(ids):
            raise fields.refusal(_TOKENS_FIELD, "of different token ids")
    return by_module, tied


def _tied_tokens(base: BaseSpec, by_module: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """In a tied base the head uses the embedding's rows, unless it has its own list."""
    embedding = next((module for module in base.of_kind(ModuleKind.EMBEDDING) if module in by_module), None)
    if not base.tied or embedding is None:
        return {}
    ids = by_module[embedding]
    return {head: embedding for head in base.of_kind(ModuleKind.HEAD) if by_module.get(head, ids) == ids}


def _lists_of_tokens(fields: Fields, base: BaseSpec) -> dict[str, tuple[int, ...]]:
    """The unchecked lists of token ids, by module."""
    value = fields.get(_TOKENS_FIELD)
    if not value:
        return {}
    if isinstance(value, list):
        return dict.fromkeys(base.of_kind(ModuleKind.EMBEDDING), tuple(value))
    if not isinstance(value, dict) or not all(isinstance(ids, list) for ids in value.values()):
        raise fields.refusal(_TOKENS_FIELD, "a list of token ids, or an object of such lists")
    by_module: dict[str, tuple[int, ...]] = {}
    for ending, ids in value.items():
        modules = ending_with([ending], base.modules)
        if not modules or not by_module.keys().isdisjoint(modules):
            raise fields.refusal(_TOKENS_FIELD, "of different embeddings of the base model")
        by_module.update(dict.fromkeys(modules, tuple(ids)))
    return by_module


def _same(copy: torch.Tensor, of_base: torch.Tensor) -> bool:
    """Whether one has the numbers of the other, perhaps rounded."""
    return any(
        all(
            _rounded_alike(some.float(), others, dtype)
            for some, others in zip(
                torch.split(copy, ROWS_COMPARED), torch.split(of_base, ROWS_COMPARED), strict=True
            )
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def _rounded_alike(some: torch.Tensor, others: torch.Tensor, dtype: torch.dtype) -> bool:
    rounded, of_others = some.to(dtype), others.to(dtype)
    return torch.equal(rounded, of_others) and (
        torch.equal(rounded.float(), some) or torch.equal(of_others.float(), others)
    )
