"""Base weights that an adapter of any kind replaces.

These are whole modules (`modules_to_save`), biases (`bias`) and rows of the embedding or the head
(`trainable_token_indices`), as in peft's `utils/other.py` (set_additional_trainable_modules) and
`tuners/tuners_utils.py` (_get_learnable_bias_state_dict). peft's `utils/save_and_load.py` also saves
untrained copies of the embedding and the head; they must equal the base's own, and are dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from turret_adapters.errors import AdapterBaseError, AdapterFormatError
from turret_adapters.formats.fields import Fields, show
from turret_adapters.formats.files import CONFIG_NAME
from turret_adapters.formats.kind import Rows, Tensors
from turret_adapters.formats.targets import ending_with, modules_to_save
from turret_adapters.formats.tensors import MODULE_PREFIX, VOCABULARY, WIDTH, Expected
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape, Part

# A number and its roundings to bfloat16 and float16 are within these tolerances.
COPY_RTOL = 5 * 2.0**-10
COPY_ATOL = 2.0**-24
ROWS_COMPARED = 8192

_TOKENS_FIELD = "trainable_token_indices"

Place = tuple[str, Part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """The tensors of a file, by key, that replace base weights (`places`) or copy them (`copies`).

    `token_ids` are in the order of the rows in the file; a head in `tied_tokens` uses those of an embedding.
    """

    base: BaseSpec
    places: Mapping[str, Place]
    copies: Mapping[str, Place]
    token_ids: Mapping[str, tuple[int, ...]]
    tied_tokens: Mapping[str, str]
    expected: Mapping[str, Expected]

    def rows(self, tensors: Tensors, weights: BaseWeights) -> Rows:
        """Checks the copies, and returns the rows of the replacements.

        Raises:
            AdapterBaseError: a copy differs from the base's weight.
        """
        for key, (module, part) in self.copies.items():
            if key in tensors:
                of_base = weights.weight(module) if part is Part.WEIGHT else weights.bias(module)
                if of_base is None or not _same(tensors[key], of_base):
                    raise AdapterBaseError(
                        f"tensor {show(key)}: expected a copy of the weights of the base model "
                        f"{self.base.name_or_path!r}, since {CONFIG_NAME} does not train them, found others "
                        "(name the module in 'modules_to_save' if it was trained)"
                    )
        rows = Rows(self.base)
        for key, (module, part) in self.places.items():
            tensor = tensors[key]
            if part is Part.TOKENS:
                ids = self.token_ids[module]
                order = sorted(range(len(ids)), key=ids.__getitem__)
                rows.parts[module][part] = tensor[order].contiguous()
                rows.token_ids[module] = tuple(sorted(ids))
            elif tensor.dim() == 1:
                rows.add_vector(module, part, tensor)
            else:
                rows.parts[module][part] = tensor
        for head, embedding in self.tied_tokens.items():
            rows.parts[head][Part.TOKENS] = rows.parts[embedding][Part.TOKENS]
            rows.token_ids[head] = rows.token_ids[embedding]
        return rows


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
    places = {
        **_places_of_saved(saved),
        **_places_of_biases(base, adapted, [module for module in with_bias if module not in saved]),
        **{
            f"{MODULE_PREFIX}{module}.token_adapter.trainable_tokens_delta": (module, Part.TOKENS)
            for module in token_ids.keys() - tied_tokens.keys()
        },
    }
    copies = {
        key: place
        for key, place in _own_places(base, adapted).items()
        if key not in places and place[0] not in token_ids
    }
    expected = {
        key: _expected(base.modules[module], part, len(token_ids.get(module, ())), optional=key in copies)
        for key, (module, part) in {**places, **copies}.items()
    }
    return Replaced(
        base=base,
        places=places,
        copies=copies,
        token_ids=token_ids,
        tied_tokens=tied_tokens,
        expected=expected,
    )


def _places_of_saved(saved: Mapping[str, ModuleShape]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for module, shape in saved.items():
        places[f"{MODULE_PREFIX}{module}.weight"] = (module, Part.WEIGHT)
        if shape.has_bias:
            places[f"{MODULE_PREFIX}{module}.bias"] = (module, Part.BIAS)
    return places


def _places_of_biases(base: BaseSpec, adapted: Collection[str], modules: Iterable[str]) -> dict[str, Place]:
    return {
        _own_key(module, adapted, "bias"): (module, Part.BIAS)
        for module in modules
        if base.modules[module].has_bias
    }


def _own_places(base: BaseSpec, adapted: Collection[str]) -> dict[str, Place]:
    """The parameters of the embedding and the head themselves."""
    modules = base.of_kind(ModuleKind.EMBEDDING, ModuleKind.HEAD)
    weights = {_own_key(module, adapted, "weight"): (module, Part.WEIGHT) for module in modules}
    return {**weights, **_places_of_biases(base, adapted, modules)}


def _own_key(module: str, adapted: Collection[str], name: str) -> str:
    """The key of a base parameter, which peft moves into `base_layer` in a module that it wraps."""
    return f"{MODULE_PREFIX}{module}.{'base_layer.' if module in adapted else ''}{name}"


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


def _expected(shape: ModuleShape, part: Part, num_tokens: int, *, optional: bool) -> Expected:
    match part, shape.kind:
        case Part.TOKENS, ModuleKind.HEAD:
            return Expected((num_tokens, shape.in_features), (None, WIDTH))
        case Part.TOKENS, _:
            return Expected((num_tokens, shape.out_features), (None, WIDTH))
        case Part.WEIGHT, ModuleKind.EMBEDDING:
            return Expected((shape.in_features, shape.out_features), (VOCABULARY, WIDTH), optional)
        case Part.WEIGHT, ModuleKind.HEAD:
            return Expected((shape.out_features, shape.in_features), (VOCABULARY, WIDTH), optional)
        case _, ModuleKind.HEAD:
            return Expected((shape.out_features,), (VOCABULARY,), optional)
        case _:
            return Expected((shape.out_features,), (WIDTH,), optional)


def _same(copy: torch.Tensor, of_base: torch.Tensor) -> bool:
    return all(
        torch.allclose(some.float(), others, rtol=COPY_RTOL, atol=COPY_ATOL)
        for some, others in zip(
            torch.split(copy, ROWS_COMPARED), torch.split(of_base, ROWS_COMPARED), strict=True
        )
    )
