"""From peft's tensors to the rows that are served.

Shape suffixes: R rank, I in_features, O out_features, X any width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from turret_adapters.errors import AdapterFormatError
from turret_adapters.formats.fields import show
from turret_adapters.host import ModuleDelta
from turret_adapters.spec import BaseSpec, ModuleKind, Part


class Rows:
    """Rows by module and part, collected in any order."""

    def __init__(self, base: BaseSpec) -> None:
        self.base = base
        self.parts: dict[str, dict[Part, torch.Tensor]] = defaultdict(dict)
        self.scalings: dict[str, float] = {}
        self.token_ids: dict[str, tuple[int, ...]] = {}

    def add_vector(self, module: str, part: Part, vector_X: torch.Tensor) -> None:
        """A part that has one number for each input or output."""
        # No row may be as wide as a vocabulary, so what has one number for each token has one row for each.
        by_token = self.base.modules[module].kind is ModuleKind.HEAD and part is not Part.INPUT_GAIN
        self.parts[module][part] = vector_X.reshape((-1, 1) if by_token else (1, -1)).contiguous()

    def add_lora(self, module: str, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float) -> None:
        """The rows of a low-rank pair, by token in an embedding and the head."""
        kind = self.base.modules[module].kind
        a = a_RI.t() if kind is ModuleKind.EMBEDDING else a_RI
        b = b_OR if kind is ModuleKind.HEAD else b_OR.t()
        self.parts[module][Part.LORA_A] = a.contiguous()
        self.parts[module][Part.LORA_B] = b.contiguous()
        self.scalings[module] = scaling

    def deltas(self) -> Mapping[str, ModuleDelta]:
        """What was added, in the order of the base's modules and of `Part`."""
        return {
            module: ModuleDelta(
                rows={part: self.parts[module][part] for part in Part if part in self.parts[module]},
                scaling=self.scalings.get(module, 1.0),
                token_ids=self.token_ids.get(module, ()),
            )
            for module in self.base.modules
            if module in self.parts
        }


def computed(module: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which was computed from those of a file.

    Raises:
        AdapterFormatError: a number in it is not finite.
    """
    if not tensor.isfinite().all():
        raise AdapterFormatError(
            f"module {show(module)}: expected to compute finite numbers from its tensors, "
            "found NaN or an infinity"
        )
    return tensor
