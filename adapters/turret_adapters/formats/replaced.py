"""Base weights that an adapter of any kind replaces.

These are whole modules (`modules_to_save`), biases (`bias`) and rows of the embedding or the head
(`trainable_token_indices`), as in peft's `utils/other.py` (AuxiliaryTrainingWrapper and its subclasses) and
`tuners/tuners_utils.py` (_get_learnable_bias_state_dict).

A file can also have the base's embedding and head, trained or not (`save_embedding_layers` in peft's
`utils/save_and_load.py`). peft loads them over the base's own; here those that differ replace them for this
adapter, and those that are equal are dropped. If they have another number of rows, the adapter has a
vocabulary of its own; rows that it only adds are kept as rows of single tokens.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from turret_adapters.errors import AdapterBaseError, AdapterFormatError
from turret_adapters.formats.fields import Fields, show
from turret_adapters.formats.files import CONFIG_NAME
from turret_adapters.formats.kind import Rows, Tensors
from turret_adapters.formats.targets import ending_with, modules_to_save
from turret_adapters.formats.tensors import MODULE_PREFIX, PROMPT_PREFIX, VOCABULARY, WIDTH, Expected
from turret_adapters.formats.tokens import Tokens, tokens_of_field
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape, Part

MAX_ADDED_TOKENS = 1 << 16
ROWS_COMPARED = 8192

# The keys of the whole weight of a module, in any wrapper.
_WHOLE = (
    r"base_model\.(?:model\.)?{}"
    r"(?:\.base_layer|\.token_adapter|\.original_module|\.modules_to_save|\.default)*\.weight"
)

Place = tuple[str, Part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """The tensors of a file, by key, that take the place of base weights.

    `places` are trained by the config. The others need not be in the file: `copies` are the base's own
    weights, over which `places` go; `repeated` are written twice.
    """

    base: BaseSpec
    copies: Mapping[str, Place]
    places: Mapping[str, Place] = field(default_factory=dict)
    repeated: Mapping[str, Place] = field(default_factory=dict)
    tokens: Tokens = field(default_factory=Tokens)

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
                return Expected((len(self.tokens.ids[module]), hidden), (None, WIDTH), optional)
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
        for (module, part), (start, tensor) in self._changed_copies(tensors, weights).items():
            if start:
                rows.replace_tokens(module, tuple(range(start, start + len(tensor))), tensor)
            else:
                rows.replace(module, part, tensor)
        for key, (module, part) in self.places.items():
            if part is not Part.TOKENS:
                rows.replace(module, part, tensors[key])
        self.tokens.add_to(rows, tensors)
        return rows

    def _changed_copies(
        self, tensors: Tensors, weights: BaseWeights
    ) -> dict[Place, tuple[int, torch.Tensor]]:
        """The copies that differ from the base's weights: all rows, or those from a row on that only add to
        it. In a tied base, the last one is that of both.
        """
        changed: dict[Place, tuple[int, torch.Tensor]] = {}
        for key, (module, part) in self.copies.items():
            if key not in tensors:
                continue
            own = tensors[key]
            of_base = weights.weight(module) if part is Part.WEIGHT else weights.bias(module)
            if of_base is None:
                continue
            same = _same(own[: len(of_base)], of_base[: len(own)])
            start = len(of_base) if same and part is Part.WEIGHT else 0
            if start < len(own) and not (same and len(own) == len(of_base)):
                sharing = self.base.tied_modules if part is Part.WEIGHT else ()
                kept = own[start:].clone() if start else own
                changed |= {(each, part): (start, kept) for each in (module, *sharing)}
        return changed


def plan_replaced(
    fields: Fields,
    base: BaseSpec,
    adapted: Collection[str],
    *,
    bias_only: str = "",
    tokens: Tokens | None = None,
) -> Replaced:
    """Plans the base weights that the config replaces, besides the changes of the `adapted` modules.

    Args:
        fields: the config.
        base: the base model.
        adapted: the paths of the modules that peft wraps for the kind.
        bias_only: the value of `bias` that means the adapted modules' biases, if the kind has the field.
        tokens: the tokens that the kind itself trains, if it has no field for them.

    Raises:
        AdapterFormatError: replacing one of them is not supported.
    """
    saved = _saved_modules(fields, base)
    if tokens is None:
        tokens = tokens_of_field(fields, base, adapted=adapted, saved=saved)
    bias = fields.get("bias") if bias_only else None
    with_bias = base.modules if bias == "all" else adapted if bias == bias_only else ()
    wrapped = _Wrapped(adapted=adapted, tokens=tokens, saved=saved)
    places = {
        **{key: place for module in saved for key, place in _parameters(base, module, "")},
        **{
            key: place
            for module in with_bias
            if module not in saved
            for key, place in _parameters(base, module, wrapped.path(module))
            if place[1] is Part.BIAS
        },
        **{tokens.key(module): (module, Part.TOKENS) for module in tokens.ids.keys() - tokens.tied.keys()},
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
        **{f"{tokens.key(head, wrapped.around(head))}": (head, Part.TOKENS) for head in tokens.tied},
    }
    return Replaced(
        base=base,
        places=places,
        copies=copies,
        repeated=repeated,
        tokens=tokens,
    )


def own_vocabulary(shapes: Mapping[str, Sequence[int]], base: BaseSpec) -> int | None:
    """The number of tokens of an adapter that was trained with resized embeddings, from the shapes of its
    tensors by key; None if it has the base's.

    Raises:
        AdapterBaseError: tokens were added, and the file has their embeddings without their logits, or the
            other way round: peft saves only one if only one is a target.
    """
    modules = base.of_kind(ModuleKind.EMBEDDING, ModuleKind.HEAD)
    sizes = {
        module: shape[0]
        for module in modules
        for key, shape in shapes.items()
        if len(shape) == 2 and re.fullmatch(_WHOLE.format(re.escape(module)), key)
    }
    own = {module: size for module, size in sizes.items() if size != modules[module].num_tokens}
    if not own:
        return None
    resized, size = next(iter(own.items()))
    most = modules[resized].num_tokens + MAX_ADDED_TOKENS
    if size > most:
        # All requests of a batch have as many logits as the largest vocabulary.
        raise AdapterBaseError(
            f"module {show(resized)}: expected at most {most} tokens, {MAX_ADDED_TOKENS} more than the base "
            f"model has, found {size}"
        )
    missing = [module for module in modules if module not in sizes]
    if missing and not base.tied and size > modules[resized].num_tokens:
        raise AdapterBaseError(
            f"module {show(missing[0])}: expected its weight with {size} rows in the file, as many as "
            f"{show(resized)} has there, found none (add both to 'modules_to_save' or 'target_modules')"
        )
    return size


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
    tokens: Tokens
    saved: Collection[str]

    def around(self, module: str) -> str:
        """Where the module is, or its trained tokens, below its path."""
        return "base_layer." if module in self.adapted else ""

    def path(self, module: str) -> str:
        """Where a module's own parameters are, below its path."""
        return (
            self.around(module)
            + (f"{self.tokens.wrapper}base_layer." if module in self.tokens.ids else "")
            + ("original_module." if module in self.saved else "")
        )


def _parameters(
    base: BaseSpec, module: str, inside: str, root: str = MODULE_PREFIX
) -> Iterator[tuple[str, Place]]:
    """The keys and places of a module's weight and bias."""
    yield f"{root}{module}.{inside}weight", (module, Part.WEIGHT)
    if base.modules[module].has_bias:
        yield f"{root}{module}.{inside}bias", (module, Part.BIAS)


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
