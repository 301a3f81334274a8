"""What an adapter is, as plain data: no tensors, no torch.

The engine plans memory with these; the readers in `kinds/` fill them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

# Stands in a revision between an adapter's digest and the number of one of its tasks.
TASK_MARK = "#"


class Method(Enum):
    """How an adapter was trained, in the field's names. The members' names are peft's `peft_type`s."""

    LORA = "lora"
    PREFIX_TUNING = "prefix_tuning"
    PROMPT_TUNING = "prompt_tuning"
    P_TUNING = "p_tuning"
    MULTITASK_PROMPT_TUNING = "multitask_prompt_tuning"
    ADALORA = "adalora"
    VERA = "vera"
    IA3 = "ia3"
    LN_TUNING = "ln_tuning"


class PrefixKind(Enum):
    """What the file holds of the virtual tokens: their keys and values, or their embeddings."""

    KEY_VALUE = "key_value"
    EMBEDDING = "embedding"


class Part(Enum):
    """What rows of an adapter do in one module, which computes y from x with its weight W and bias b.

    In a linear: y = gain · (W(input_gain · x) + scaling · Bᵀ(Ax)) + b. In an embedding, where x is a token,
    y = W[x] + scaling · B(A[x]).
    """

    LORA_A = "lora_a"  # [rank, in_features]; of an embedding [vocabulary, rank]
    LORA_B = "lora_b"  # [rank, out_features]; of the head [vocabulary, rank]
    GAIN = "gain"  # [1, out_features]; of the head [vocabulary, 1]
    INPUT_GAIN = "input_gain"  # [1, in_features]
    BIAS = "bias"  # in the place of b: [1, out_features]; of the head [vocabulary, 1]
    WEIGHT = "weight"  # in the place of W: of a norm [1, hidden]; of embedding and head [vocabulary, hidden]
    TOKENS = "tokens"  # in the place of some tokens' rows of embedding or head: [tokens, hidden]


class ModuleKind(Enum):
    LINEAR = "linear"  # quantised
    EXPERT = "expert"  # one expert's part of a stacked parameter, a quantised linear without a bias
    ROUTER = "router"  # from hidden states to the chances of experts
    HEAD = "head"  # from hidden states to logits
    EMBEDDING = "embedding"
    NORM = "norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleShape:
    """A module of the base that adapters may change. A norm has as many in as out features."""

    kind: ModuleKind
    in_features: int
    out_features: int
    has_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSpec:
    """What of the base model an adapter must fit.

    `modules` maps the path of every module that can be adapted (`model.layers.0.self_attn.q_proj`) to its
    shape, in the model's order. In a tied model, head and embedding share their weight.
    """

    name_or_path: str
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    modules: Mapping[str, ModuleShape]
    tied: bool = False

    @property
    def kv_width(self) -> int:
        """Elements that the keys and values of one token take over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def of_kind(self, *kinds: ModuleKind) -> dict[str, ModuleShape]:
        return {name: shape for name, shape in self.modules.items() if shape.kind in kinds}


@dataclass(frozen=True, slots=True)
class RowGroup:
    """`count` rows of `width` elements that an adapter has for a part of a module."""

    module: str
    part: Part
    count: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSpec:
    """Virtual tokens that stand before the prompt at positions 0 … num_virtual_tokens − 1."""

    num_virtual_tokens: int
    kind: PrefixKind


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """One revision of an adapter; `revision` is the digest of its files.

    With `invocation_tokens` (activated LoRA) its rows apply from the last place on at which these stand in
    the prompt, and nowhere without them. `num_tasks` is 0, or from how many prefixes a request chooses one.
    """

    revision: str
    method: Method
    rows: tuple[RowGroup, ...]
    prefix: PrefixSpec | None
    max_rank: int
    num_parameters: int
    file_bytes: int
    invocation_tokens: tuple[int, ...] = ()
    num_tasks: int = 0

    @property
    def resident_revisions(self) -> list[str]:
        """What of it requests run on: itself, or each of its tasks."""
        if not self.num_tasks:
            return [self.revision]
        return [self.of_task(task).revision for task in range(self.num_tasks)]

    def of_task(self, task: int) -> AdapterSpec:
        """What a request for one of the tasks runs on."""
        return replace(self, revision=f"{self.revision}{TASK_MARK}{task}", num_tasks=0)

    @property
    def num_virtual_tokens(self) -> int:
        return self.prefix.num_virtual_tokens if self.prefix else 0
