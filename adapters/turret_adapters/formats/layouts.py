"""The names that an adapter's files have for the modules of a base model.

The language model of a multimodal model has had three names, by the version of transformers and by whether it
was loaded alone. Adapters that were trained on any of them fit all. `experts` has the names of experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from turret_adapters.errors import AdapterBaseError, AdapterFormatError
from turret_adapters.formats.experts import Place, check_pairs, join_halves, linears_apart
from turret_adapters.formats.fields import show
from turret_adapters.formats.files import CONFIG_NAME
from turret_adapters.formats.kind import Content
from turret_adapters.formats.tensors import MODULE_PREFIX, PROMPT_KEY
from turret_adapters.host import BaseWeights, ModuleDelta
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape, Part

# The paths of the language model and of its head.
_LAYOUTS = (
    ("model.language_model", "lm_head"),  # in a multimodal model since transformers 4.52
    ("language_model.model", "language_model.lm_head"),  # before; Qwen-VL had that of the next line
    ("model", "lm_head"),  # alone
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The base's modules by the names that a file has for them, in order."""

    base: BaseSpec
    places: Mapping[str, Place]
    modules: Mapping[str, ModuleShape]

    def weights(self, weights: BaseWeights) -> BaseWeights:
        """The base's weights by these names."""
        return _RenamedWeights(weights, self.places)

    def content(self, content: Content) -> Content:
        """The content by the base's own names.

        Raises:
            AdapterFormatError: experts are changed in a way that is not supported.
        """
        of_path: dict[str, list[tuple[str, ModuleDelta]]] = defaultdict(list)
        for name, delta in content.deltas.items():
            of_path[self.places[name].path].append((name, delta))
        deltas = {path: self._joined(path, parts) for path, parts in of_path.items()}
        if content.invocation_tokens and any(map(self._is_expert, deltas)):
            raise AdapterFormatError(
                f"{CONFIG_NAME}: expected 'alora_invocation_tokens' to be empty beside experts or a router, "
                f"found {len(content.invocation_tokens)} tokens"
            )
        ranks = [len(delta.rows[Part.LORA_A]) for path, delta in deltas.items() if self._is_expert(path)]
        return replace(content, deltas=deltas, max_rank=max([content.max_rank, *ranks]))

    def _is_expert(self, path: str) -> bool:
        return self.base.modules[path].kind in (ModuleKind.EXPERT, ModuleKind.ROUTER)

    def _joined(self, path: str, parts: Sequence[tuple[str, ModuleDelta]]) -> ModuleDelta:
        if self._is_expert(path):
            for name, delta in parts:
                check_pairs(name, delta)
        halves = [(half, delta) for name, delta in parts if (half := self.places[name].half) is not None]
        return join_halves(halves) if halves else parts[0][1]


def layout_of_file(keys: Sequence[str], base: BaseSpec) -> Layout:
    """The layout of the file with these keys.

    Raises:
        AdapterBaseError: the adapter changes a part of a multimodal model that is left out.
    """
    _check_parts(keys, base)
    apart = linears_apart(keys, base)
    if apart is not None:
        return Layout(
            base=base,
            places={name: place for name, (place, _) in apart.items()},
            modules={name: shape for name, (_, shape) in apart.items()},
        )
    names = _names_in_file(keys, base)
    return Layout(
        base=base,
        places={name: Place(path) for name, path in names.items()},
        modules={name: base.modules[path] for name, path in names.items()},
    )


class _RenamedWeights:
    """The base's weights by other names of its modules."""

    def __init__(self, weights: BaseWeights, places: Mapping[str, Place]) -> None:
        self._weights = weights
        self._places = places

    def weight(self, module: str) -> torch.Tensor:
        place = self._places[module]
        weight_OI = self._weights.weight(place.path)
        return weight_OI if place.half is None else weight_OI.chunk(2)[place.half]

    def bias(self, module: str) -> torch.Tensor | None:
        return self._weights.bias(self._places[module].path)


def _names_in_file(keys: Sequence[str], base: BaseSpec) -> Mapping[str, str]:
    own = {path: path for path in base.modules}
    unknown = [key for key in keys if key.startswith(MODULE_PREFIX) and not _names_one_of(own, key)]
    if not unknown:
        return own
    others = [_renamed(base, *layout) for layout in _LAYOUTS] if not base.is_encoder else []
    if PROMPT_KEY not in keys:  # beside it, peft leaves out the module around the model
        others += [_under(base, prefix) for prefix in ("", *(f"{each}." for each in base.task_prefixes))]
    best = max(others, key=lambda names: sum(_names_one_of(names, key) for key in keys), default=own)
    return best if any(_names_one_of(best, key) for key in unknown) else own


def _under(base: BaseSpec, prefix: str) -> dict[str, str]:
    """As the modules of the base model are called without a head, or in one of the classes for tasks."""
    own = f"{base.prefix}." if base.prefix else ""
    return {prefix + path.removeprefix(own): path for path in base.modules}


def _check_parts(keys: Iterable[str], base: BaseSpec) -> None:
    parts = {path.rpartition(".")[2] for path in base.left_out}
    for key in keys:
        for part in parts.intersection(key.split(".")):
            raise AdapterBaseError(
                f"tensor {show(key)}: expected only tensors of the language model of the base model "
                f"{base.name_or_path!r}, found one of its {part}, which is left out (train the adapter with "
                f'exclude_modules=".*{part}.*")'
            )


def _renamed(base: BaseSpec, language_model: str, head: str) -> dict[str, str]:
    embedding = next(iter(base.of_kind(ModuleKind.EMBEDDING)), "")
    own = embedding.rpartition(".")[0]
    names = {}
    for path, shape in base.modules.items():
        if shape.kind is ModuleKind.HEAD:
            names[head] = path
        else:
            names[language_model + path.removeprefix(own)] = path
    return names


def _names_one_of(names: Mapping[str, str], key: str) -> bool:
    """Whether a key is that of a tensor of one of the modules."""
    # A hostile key has millions of dots: only as many are looked at as a module's path has.
    deepest = max(path.count(".") for path in names) + 1
    parts = key.removeprefix(MODULE_PREFIX).split(".", deepest)
    return any(".".join(parts[:end]) in names for end in range(1, deepest + 1))
