"""What a kind of adapter provides so that `peft.read_adapter` can read it.

A `Kind` is a policy for each field of the config and a function `plan`, which turns a config and a base model
into the tensors to expect and, once they are read and checked, into the adapter's `Content`.

Shape suffixes: R rank, I in_features, O out_features, X any width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.nn.functional import pad

from turret_adapters.errors import AdapterFormatError
from turret_adapters.formats.fields import Fields, Policy, show
from turret_adapters.formats.tensors import Expected
from turret_adapters.host import BaseWeights, ModuleDelta
from turret_adapters.spec import BaseSpec, Method, ModuleKind, Part, PrefixKind

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """The contents of an adapter. `tasks` are the prompts of a multitask adapter; a request chooses one."""

    deltas: Mapping[str, ModuleDelta] = field(default_factory=dict)
    max_rank: int = 0
    invocation_tokens: tuple[int, ...] = ()
    prefix_kind: PrefixKind | None = None
    num_virtual_tokens: int = 0
    prefix_kv: torch.Tensor | None = None
    prompt_embeddings: torch.Tensor | None = None
    tasks: tuple[torch.Tensor, ...] = ()


class Plan(Protocol):
    """The tensors to expect in an adapter's file, and how to build its content from them."""

    @property
    def expected(self) -> Mapping[str, Expected]: ...

    def build(self, tensors: Tensors, weights: BaseWeights) -> Content:
        """Builds the content from the expected tensors.

        Raises:
            AdapterBaseError: a saved copy of a base weight differs from `weights`.
            AdapterFormatError: a computed number is not finite.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One `peft_type`.

    `plan` raises AdapterFormatError for a field whose value is not supported, and AdapterBaseError for a
    config that was made for another base model.
    """

    method: Method
    fields: Mapping[str, Policy]
    plan: Callable[[Fields, BaseSpec], Plan]


class Rows:
    """Collects an adapter's rows by module and part. Replaced weights come first, then changes of modules."""

    def __init__(self, base: BaseSpec, weights: BaseWeights) -> None:
        self.base = base
        self._weights = weights
        self.parts: dict[str, dict[Part, torch.Tensor]] = defaultdict(dict)
        self.scalings: dict[str, float] = {}
        self.token_ids: dict[str, tuple[int, ...]] = {}

    def weight(self, module: str) -> torch.Tensor:
        """The adapter's own weight of a module, or else the base's, in float32."""
        parts = self.parts.get(module, {})
        if Part.WEIGHT in parts:
            return parts[Part.WEIGHT].float()
        weight_VE = self._weights.weight(module)
        if module in self.token_ids:  # they may follow the last of the base
            ids = torch.tensor(self.token_ids[module])
            missing = max(int(ids.max()) + 1 - len(weight_VE), 0)
            weight_VE = pad(weight_VE, (0, 0, 0, missing)).index_copy(0, ids, parts[Part.TOKENS].float())
        return weight_VE[: self.base.modules[module].num_tokens]

    def bias(self, module: str) -> torch.Tensor | None:
        """The adapter's own bias of a module, or else the base's, in float32."""
        own = self.parts.get(module, {}).get(Part.BIAS)
        if own is not None:
            return own.view(-1).float()
        bias_O = self._weights.bias(module)
        if bias_O is None:
            return None
        num_outputs = self.base.modules[module].out_features
        return pad(bias_O, (0, max(num_outputs - len(bias_O), 0)))[:num_outputs]

    def replace(self, module: str, part: Part, tensor: torch.Tensor) -> None:
        """Replaces a weight or a bias, and rows of the weight that were replaced before."""
        if part is Part.WEIGHT:
            self.parts[module].pop(Part.TOKENS, None)
            self.token_ids.pop(module, None)
        if tensor.dim() == 1:
            self.add_vector(module, part, tensor)
        else:
            self.parts[module][part] = tensor

    def replace_tokens(self, module: str, token_ids: tuple[int, ...], rows_NE: torch.Tensor) -> None:
        """Replaces the rows of some tokens, whose ids ascend, of the embedding or the head."""
        own_VE = self.parts.get(module, {}).get(Part.WEIGHT)
        if own_VE is None:
            before = zip(self.token_ids.get(module, ()), self.parts[module].get(Part.TOKENS, ()), strict=True)
            rows = {**dict(before), **dict(zip(token_ids, rows_NE, strict=True))}
            self.token_ids[module] = tuple(sorted(rows))
            self.parts[module][Part.TOKENS] = torch.stack([rows[each] for each in self.token_ids[module]])
        else:
            dtype = torch.promote_types(own_VE.dtype, rows_NE.dtype)
            self.parts[module][Part.WEIGHT] = own_VE.to(dtype).index_copy(
                0, torch.tensor(token_ids), rows_NE.to(dtype)
            )

    def add_vector(self, module: str, part: Part, vector_X: torch.Tensor) -> None:
        """Adds a part with one number for each input or output."""
        # No row may be as wide as the vocabulary, so a vector over the vocabulary becomes one row per token.
        by_token = self.base.modules[module].kind is ModuleKind.HEAD and part is not Part.INPUT_GAIN
        self.parts[module][part] = vector_X.reshape((-1, 1) if by_token else (1, -1)).contiguous()

    def add_lora(self, module: str, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float) -> None:
        """Adds a low-rank pair, transposed where the rows of an embedding or the head are tokens."""
        kind = self.base.modules[module].kind
        a = a_RI.t() if kind is ModuleKind.EMBEDDING else a_RI
        b = b_OR if kind is ModuleKind.HEAD else b_OR.t()
        self.parts[module][Part.LORA_A] = a.contiguous()
        self.parts[module][Part.LORA_B] = b.contiguous()
        self.scalings[module] = scaling

    def deltas(self) -> Mapping[str, ModuleDelta]:
        """All rows, in the order of the base's modules and of `Part`."""
        return {
            module: ModuleDelta(
                rows={part: self.parts[module][part] for part in Part if part in self.parts[module]},
                scaling=self.scalings.get(module, 1.0),
                token_ids=self.token_ids.get(module, ()),
            )
            for module in self.base.modules
            if module in self.parts
        }


def check_finite(module: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor that was computed from the tensors of a file.

    Raises:
        AdapterFormatError: it has a NaN or an infinity.
    """
    if not tensor.isfinite().all():
        raise AdapterFormatError(
            f"module {show(module)}: expected finite numbers when combining its tensors, found NaN or an "
            "infinity (check the training, and save the adapter again)"
        )
    return tensor
