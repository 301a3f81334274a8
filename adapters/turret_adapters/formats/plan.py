"""What a kind of adapter has to say of itself, so that the reader can read it.

A kind is a policy for each field of its config, and `plan`, which makes of a config and a base model the
tensors to expect and, once they are read and sound, what the adapter holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from turret_adapters.formats.fields import Fields, Policy
from turret_adapters.formats.tensors import Expected
from turret_adapters.host import BaseWeights, ModuleDelta
from turret_adapters.spec import BaseSpec, Method, PrefixKind

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What an adapter holds. `tasks` are the prompts of which a request chooses one."""

    deltas: Mapping[str, ModuleDelta] = field(default_factory=dict)
    max_rank: int = 0
    invocation_tokens: tuple[int, ...] = ()
    prefix_kind: PrefixKind | None = None
    num_virtual_tokens: int = 0
    prefix_kv: torch.Tensor | None = None
    prompt_embeddings: torch.Tensor | None = None
    tasks: tuple[torch.Tensor, ...] = ()


class Plan(Protocol):
    """What to expect in an adapter's file, and what to make of it."""

    @property
    def expected(self) -> Mapping[str, Expected]: ...

    def build(self, tensors: Tensors, weights: BaseWeights) -> Content:
        """Makes of the expected tensors what is served.

        Raises:
            AdapterBaseError: a saved copy of the base's weights is none of `weights`.
            AdapterFormatError: something computed is not finite.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One `peft_type`.

    `plan` raises AdapterFormatError where a field says what is not served, and AdapterBaseError where the
    config is of another base model.
    """

    method: Method
    fields: Mapping[str, Policy]
    plan: Callable[[Fields, BaseSpec], Plan]
