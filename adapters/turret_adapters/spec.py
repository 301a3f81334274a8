"""What an adapter is, as plain data: no tensors, no torch.

The engine plans memory with these, the reader in `peft.py` fills them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Method(Enum):
    """How an adapter was trained, in the field's names."""

    LORA = "lora"
    PREFIX_TUNING = "prefix_tuning"
    PROMPT_TUNING = "prompt_tuning"
    P_TUNING = "p_tuning"


class PrefixKind(Enum):
    """What the file holds of the virtual tokens: their keys and values, or their embeddings."""

    KEY_VALUE = "key_value"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSpec:
    """What of the base model an adapter must fit.

    `linears` maps the path of every adaptable linear (`model.layers.0.self_attn.q_proj`) to its shape.
    """

    name_or_path: str
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    linears: Mapping[str, LinearShape]

    @property
    def kv_width(self) -> int:
        """Elements that the keys and values of one token take over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """One adapted linear: y += scaling · B(Ax), A [rank, in_features], B [out_features, rank]."""

    name: str
    rank: int
    in_features: int
    out_features: int
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSpec:
    """Virtual tokens that stand before the prompt at positions 0 … num_virtual_tokens − 1."""

    num_virtual_tokens: int
    kind: PrefixKind


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """One revision of an adapter. `revision` is the digest of its files; `lora` is empty without LoRA."""

    revision: str
    method: Method
    lora: tuple[LoraModule, ...]
    prefix: PrefixSpec | None
    num_parameters: int
    file_bytes: int

    @property
    def num_virtual_tokens(self) -> int:
        return self.prefix.num_virtual_tokens if self.prefix else 0

    @property
    def max_rank(self) -> int:
        return max((module.rank for module in self.lora), default=0)
