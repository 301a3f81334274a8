"""Adapters in host memory, in one form for all kinds.

Shape suffixes: N rows or virtual tokens, X a row's width, L layers, K key-value heads, D a head's width,
E hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import torch

from turret_adapters.spec import AdapterSpec, Method, Part, PrefixKind, PrefixSpec, RowGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleDelta:
    """An adapter's change of one module: `rows` [N, X] by part. The LoRA product is multiplied by `scaling`.

    `token_ids` are the tokens of the rows of `Part.TOKENS`, ascending.
    """

    rows: Mapping[Part, torch.Tensor]
    scaling: float = 1.0
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAdapter:
    """An adapter's tensors; each is contiguous and owns its memory.

    `deltas` is keyed by module path, `head` by the names of its parameters. `prefix_kv` is [N, L, 2, K, D],
    keys then values, the keys without rotary embedding; `prompt_embeddings` is [N, E]. A request for a
    multitask adapter uses one of `tasks` instead of this adapter.
    """

    spec: AdapterSpec
    deltas: Mapping[str, ModuleDelta]
    head: Mapping[str, torch.Tensor] = field(default_factory=dict)
    prefix_kv: torch.Tensor | None = None
    prompt_embeddings: torch.Tensor | None = None
    tasks: tuple[HostAdapter, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = [rows_NX for delta in self.deltas.values() for rows_NX in delta.rows.values()]
        tensors += [tensor for tensor in (self.prefix_kv, self.prompt_embeddings) if tensor is not None]
        tensors += self.head.values()
        own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return own + sum(task.num_bytes for task in self.tasks)

    def page_locked(self) -> HostAdapter:
        """A copy in page-locked memory, which a GPU copies from asynchronously."""

        def lock(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.pin_memory()

        return replace(
            self,
            deltas={
                module: replace(delta, rows={part: rows.pin_memory() for part, rows in delta.rows.items()})
                for module, delta in self.deltas.items()
            },
            head={name: tensor.pin_memory() for name, tensor in self.head.items()},
            prefix_kv=lock(self.prefix_kv),
            prompt_embeddings=lock(self.prompt_embeddings),
            tasks=tuple(task.page_locked() for task in self.tasks),
        )


def row_groups(
    deltas: Mapping[str, ModuleDelta], head: Mapping[str, torch.Tensor] | None = None
) -> tuple[RowGroup, ...]:
    """The shapes of an adapter's rows, as the engine plans with them. A vector of the head has a row for each
    number, as it may be wider than a page.
    """
    rows = [
        RowGroup(module, part, *rows_NX.shape)
        for module, delta in deltas.items()
        for part, rows_NX in delta.rows.items()
    ]
    of_head = [
        RowGroup(name, Part.HEAD, len(tensor), tensor[0].numel()) for name, tensor in (head or {}).items()
    ]
    return _shared((*rows, *of_head))


@lru_cache(maxsize=1024)
def _shared(groups: tuple[RowGroup, ...]) -> tuple[RowGroup, ...]:
    """Returns one object for all equal tuples: thousands of adapters have only a few shapes."""
    return groups


class BaseWeights(Protocol):
    """The base's weights, for adapters whose rows depend on them."""

    def weight(self, module: str) -> torch.Tensor:
        """The weight of a linear or the head [out_features, in_features] or of the embedding
        [vocabulary, hidden], dequantised, in float32.
        """

    def bias(self, module: str) -> torch.Tensor | None:
        """The bias of a linear or the head, [out_features], in float32; None if it has none."""


def joined_spec(specs: Sequence[AdapterSpec]) -> AdapterSpec:
    """The spec of several prefixes, joined in order to one."""
    parts = tuple(spec.prefix for spec in specs if spec.prefix)
    kinds = {part.kind for part in parts}
    kind = PrefixKind.EMBEDDING if PrefixKind.EMBEDDING in kinds else PrefixKind.KEY_VALUE
    digest = hashlib.sha256("+".join(spec.revision for spec in specs).encode()).hexdigest()
    return AdapterSpec(
        revision=f"joined-{digest[:32]}",
        method=Method.PREFIX_TUNING if kind is PrefixKind.KEY_VALUE else Method.PROMPT_TUNING,
        rows=(),
        prefix=PrefixSpec(
            num_virtual_tokens=sum(part.num_virtual_tokens for part in parts),
            kind=kind,
            parts=parts if len(kinds) > 1 else (),
        ),
        max_rank=0,
        num_parameters=sum(spec.num_parameters for spec in specs),
        file_bytes=sum(spec.file_bytes for spec in specs),
    )


def join_prefixes(adapters: Sequence[HostAdapter]) -> HostAdapter:
    """The tensors of `joined_spec`, each with a row for every virtual token if there are both.

    The keys of a prefix have no rotary embedding, so keys and values do not depend on their position; the
    keys and values of embeddings are computed at their position in the joined prefix, after those before.
    """
    return HostAdapter(
        spec=joined_spec([adapter.spec for adapter in adapters]),
        deltas={},
        prefix_kv=_joined([(adapter.prefix_kv, adapter.spec.num_virtual_tokens) for adapter in adapters]),
        prompt_embeddings=_joined(
            [(adapter.prompt_embeddings, adapter.spec.num_virtual_tokens) for adapter in adapters]
        ),
    )


def _joined(parts: Sequence[tuple[torch.Tensor | None, int]]) -> torch.Tensor | None:
    """The tensors one after another, with zeros for the rows of those that are missing; None if all are."""
    found = next((tensor for tensor, _ in parts if tensor is not None), None)
    if found is None:
        return None
    return torch.cat(
        [
            torch.zeros(count, *found.shape[1:]) if tensor is None else tensor.float()
            for tensor, count in parts
        ]
    )
