"""The names that an adapter's files have for the modules of a base model.

The language model of a multimodal model has had three names, by the version of transformers and by whether it
was loaded alone. Adapters that were trained on any of them fit all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from turret_adapters.errors import AdapterBaseError
from turret_adapters.formats.fields import show
from turret_adapters.formats.tensors import MODULE_PREFIX
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, ModuleKind

# The paths of the language model and of its head.
_LAYOUTS = (
    ("model.language_model", "lm_head"),  # in a multimodal model since transformers 4.52
    ("language_model.model", "language_model.lm_head"),  # before; Qwen-VL had that of the next line
    ("model", "lm_head"),  # alone
)


def names_in_file(keys: Sequence[str], base: BaseSpec) -> Mapping[str, str]:
    """The paths of the base's modules by the names that the file with these keys has for them, in order.

    Raises:
        AdapterBaseError: the adapter changes a part of a multimodal model that is left out.
    """
    _check_parts(keys, base)
    own = {path: path for path in base.modules}
    unknown = [key for key in keys if key.startswith(MODULE_PREFIX) and not _names_one_of(own, key)]
    if not unknown:
        return own
    others = [_renamed(base, *layout) for layout in _LAYOUTS]
    best = max(others, key=lambda names: sum(_names_one_of(names, key) for key in keys))
    return best if any(_names_one_of(best, key) for key in unknown) else own


class RenamedWeights:
    """The base's weights by other names of its modules."""

    def __init__(self, weights: BaseWeights, paths: Mapping[str, str]) -> None:
        self._weights = weights
        self._paths = paths

    def weight(self, module: str) -> torch.Tensor:
        return self._weights.weight(self._paths[module])

    def bias(self, module: str) -> torch.Tensor | None:
        return self._weights.bias(self._paths[module])


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
    path = key.removeprefix(MODULE_PREFIX)
    while path and path not in names:
        path = path.rpartition(".")[0]
    return bool(path)
