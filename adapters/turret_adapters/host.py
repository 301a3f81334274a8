"""An adapter in host memory, whatever kind it is of.

Shape suffixes: N rows or virtual tokens, X a row's width, L layers, K key-value heads, D a head's width,
E hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch

from turret_adapters.spec import AdapterSpec, Part, RowGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleDelta:
    """What an adapter changes in one module: `rows` [N, X] by part, the LoRA rows counting `scaling`-fold.

    `token_ids` name the rows of `Part.TOKENS`, ascending.
    """

    rows: Mapping[Part, torch.Tensor]
    scaling: float = 1.0
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAdapter:
    """An adapter's tensors, contiguous and owning their memory.

    `deltas` is keyed by module path. `prefix_kv` is [N, L, 2, K, D], keys then values, the keys without
    rotary embedding; `prompt_embeddings` is [N, E]. Where `tasks` is not empty, a request chooses one of
    these adapters instead of this one.
    """

    spec: AdapterSpec
    deltas: Mapping[str, ModuleDelta]
    prefix_kv: torch.Tensor | None = None
    prompt_embeddings: torch.Tensor | None = None
    tasks: tuple[HostAdapter, ...] = ()

    @property
    def num_bytes(self) -> int:
        """What its tensors take."""
        tensors = [rows_NX for delta in self.deltas.values() for rows_NX in delta.rows.values()]
        tensors += [tensor for tensor in (self.prefix_kv, self.prompt_embeddings) if tensor is not None]
        own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return own + sum(task.num_bytes for task in self.tasks)

    def page_locked(self) -> HostAdapter:
        """The same in memory from which a GPU copies while it computes."""

        def lock(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.pin_memory()

        return replace(
            self,
            deltas={
                module: replace(delta, rows={part: rows.pin_memory() for part, rows in delta.rows.items()})
                for module, delta in self.deltas.items()
            },
            prefix_kv=lock(self.prefix_kv),
            prompt_embeddings=lock(self.prompt_embeddings),
            tasks=tuple(task.page_locked() for task in self.tasks),
        )


def row_groups(deltas: Mapping[str, ModuleDelta]) -> tuple[RowGroup, ...]:
    """What of an adapter's rows the engine has to know."""
    return _shared(
        tuple(
            RowGroup(module, part, *rows_NX.shape)
            for module, delta in deltas.items()
            for part, rows_NX in delta.rows.items()
        )
    )


@lru_cache(maxsize=1024)
def _shared(groups: tuple[RowGroup, ...]) -> tuple[RowGroup, ...]:
    """One object for all that are equal: thousands of adapters are of a few shapes."""
    return groups


class BaseWeights(Protocol):
    """The base's weights, for what can only be computed with them."""

    def weight(self, module: str) -> torch.Tensor:
        """Of a linear or the head [out_features, in_features], dequantised, of the embedding
        [vocabulary, hidden]; in float32.
        """

    def bias(self, module: str) -> torch.Tensor | None:
        """Of a linear or the head, [out_features], in float32; None where it has none."""
