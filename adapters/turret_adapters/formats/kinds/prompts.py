"""PREFIX_TUNING, PROMPT_TUNING, P_TUNING and MULTITASK_PROMPT_TUNING: virtual tokens before the prompt.

peft's `tuners/prefix_tuning`, `prompt_tuning`, `p_tuning` and `multitask_prompt_tuning` (arXiv 2303.02861).

Shape suffixes: N virtual tokens, X a row's width, E hidden size, L layers, T keys then values, H key-value
heads, D a head's width, S tasks, R their rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turret_adapters.errors import AdapterBaseError
from turret_adapters.formats.fields import COMMON, Fields, Policy, Use, refusal
from turret_adapters.formats.files import CONFIG_NAME, MAX_TENSORS_BYTES
from turret_adapters.formats.kind import Content, Kind, Tensors, check_finite
from turret_adapters.formats.replaced import Replaced, plan_copies
from turret_adapters.formats.tensors import PROMPT_KEY, WIDTH, Expected
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec, Method, PrefixKind

MAX_VIRTUAL_TOKENS = 4096
MAX_TASKS = 1024
MAX_TASK_RANK = 512

_COLS, _ROWS = "prefix_task_cols", "prefix_task_rows"
_FLOAT_BYTES = 4

_FIELDS: Mapping[str, Policy] = {
    **COMMON,
    "modules_to_save": Use.READ,
    "num_attention_heads": Use.READ,
    "num_layers": Use.READ,
    "num_transformer_submodules": (1,),
    "num_virtual_tokens": Use.READ,
    "token_dim": Use.READ,
}
_PROMPT_FIELDS: Mapping[str, Policy] = {
    **_FIELDS,
    "prompt_tuning_init": Use.INERT,
    "prompt_tuning_init_text": Use.INERT,
    "tokenizer_kwargs": Use.INERT,
    "tokenizer_name_or_path": Use.INERT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixPlan:
    """The keys and values of virtual tokens, as peft's cache holds them."""

    base: BaseSpec
    num_virtual_tokens: int
    replaced: Replaced

    @property
    def expected(self) -> Mapping[str, Expected]:
        return {
            **self.replaced.expected,
            PROMPT_KEY: Expected((self.num_virtual_tokens, self.base.kv_width), (None, WIDTH)),
        }

    def build(self, tensors: Tensors, weights: BaseWeights) -> Content:
        base = self.base
        kv_NLTHD = tensors[PROMPT_KEY].view(-1, base.num_layers, 2, base.num_kv_heads, base.head_dim)
        return Content(
            deltas=self.replaced.rows(tensors, weights).deltas(),
            prefix_kind=PrefixKind.KEY_VALUE,
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_kv=kv_NLTHD,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPlan:
    """The embeddings of virtual tokens."""

    base: BaseSpec
    num_virtual_tokens: int
    replaced: Replaced

    @property
    def expected(self) -> Mapping[str, Expected]:
        return {
            **self.replaced.expected,
            PROMPT_KEY: Expected((self.num_virtual_tokens, self.base.hidden_size), (None, WIDTH)),
        }

    def build(self, tensors: Tensors, weights: BaseWeights) -> Content:
        return Content(
            deltas=self.replaced.rows(tensors, weights).deltas(),
            prefix_kind=PrefixKind.EMBEDDING,
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_embeddings=tensors[PROMPT_KEY],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MultitaskPlan:
    """A prompt for each task: the shared embeddings, scaled by the task's low-rank matrix."""

    base: BaseSpec
    num_virtual_tokens: int
    num_tasks: int
    rank: int
    replaced: Replaced

    @property
    def expected(self) -> Mapping[str, Expected]:
        hidden = self.base.hidden_size
        return {
            **self.replaced.expected,
            PROMPT_KEY: Expected((self.num_virtual_tokens, hidden), (None, WIDTH)),
            _COLS: Expected((self.num_tasks, self.num_virtual_tokens, self.rank), (None, None, None)),
            _ROWS: Expected((self.num_tasks, self.rank, hidden), (None, None, WIDTH)),
        }

    def build(self, tensors: Tensors, weights: BaseWeights) -> Content:
        shared_NE = tensors[PROMPT_KEY].float()
        cols_SNR, rows_SRE = tensors[_COLS].float(), tensors[_ROWS].float()
        tasks = [shared_NE * (cols_NR @ rows_RE) for cols_NR, rows_RE in zip(cols_SNR, rows_SRE, strict=True)]
        return Content(
            deltas=self.replaced.rows(tensors, weights).deltas(),
            prefix_kind=PrefixKind.EMBEDDING,
            num_virtual_tokens=self.num_virtual_tokens,
            tasks=tuple(check_finite(PROMPT_KEY, task_NE) for task_NE in tasks),
        )


def _plan_prefix(fields: Fields, base: BaseSpec) -> PrefixPlan:
    _check_saved(fields)
    if not base.takes_prefix:
        raise AdapterBaseError(
            f"{CONFIG_NAME}: expected a method that peft runs on the base model {base.name_or_path!r}, which "
            "takes no keys and values before the first token, found PREFIX_TUNING (train the adapter with "
            "another method)"
        )
    num_virtual_tokens = fields.integer("num_virtual_tokens", most=MAX_VIRTUAL_TOKENS)
    # peft overwrites the last two with the key-value heads' for this method.
    _check_base(
        fields,
        base,
        num_layers=base.num_layers,
        num_attention_heads=base.num_kv_heads,
        token_dim=base.num_kv_heads * base.head_dim,
    )
    return PrefixPlan(base=base, num_virtual_tokens=num_virtual_tokens, replaced=plan_copies(base))


def _plan_prompt(fields: Fields, base: BaseSpec) -> PromptPlan:
    _check_saved(fields)
    num_virtual_tokens = fields.integer("num_virtual_tokens", most=MAX_VIRTUAL_TOKENS)
    _check_base(
        fields, base, num_layers=base.num_layers, num_attention_heads=None, token_dim=base.hidden_size
    )
    return PromptPlan(base=base, num_virtual_tokens=num_virtual_tokens, replaced=plan_copies(base))


def _plan_multitask(fields: Fields, base: BaseSpec) -> MultitaskPlan:
    prompt = _plan_prompt(fields, base)
    num_tasks = fields.integer("num_tasks", most=MAX_TASKS, default=1)
    rank = fields.integer("num_ranks", most=MAX_TASK_RANK, default=1)
    num_bytes = num_tasks * prompt.num_virtual_tokens * base.hidden_size * _FLOAT_BYTES
    if num_bytes > MAX_TENSORS_BYTES:
        raise refusal(
            "num_tasks", num_tasks, f"a number of tasks whose prompts take at most {MAX_TENSORS_BYTES} bytes"
        )
    return MultitaskPlan(
        base=base,
        num_virtual_tokens=prompt.num_virtual_tokens,
        num_tasks=num_tasks,
        rank=rank,
        replaced=prompt.replaced,
    )


def _check_saved(fields: Fields) -> None:
    """Only a head is saved whole beside virtual tokens; `heads` checks that it is in the file."""
    if fields.get("task_type") in (None, "CAUSAL_LM") and fields.get("modules_to_save"):
        raise fields.refusal("modules_to_save", "empty, since it is not supported")


def _check_base(fields: Fields, base: BaseSpec, **expected: int | None) -> None:
    for name, size in expected.items():
        found = fields.optional_size(name)
        if size is not None and found not in (None, size):
            raise AdapterBaseError(
                f"{CONFIG_NAME}: expected {name!r} to be {size}, as in the base model "
                f"{base.name_or_path!r}, found {found}"
            )


PREFIX_TUNING = Kind(
    method=Method.PREFIX_TUNING,
    fields={
        **_FIELDS,
        "encoder_hidden_size": Use.INERT,
        "init_weights": Use.INERT,
        "prefix_projection": Use.INERT,
    },
    plan=_plan_prefix,
)
PROMPT_TUNING = Kind(method=Method.PROMPT_TUNING, fields=_PROMPT_FIELDS, plan=_plan_prompt)
P_TUNING = Kind(
    method=Method.P_TUNING,
    fields={
        **_FIELDS,
        "encoder_dropout": Use.INERT,
        "encoder_hidden_size": Use.INERT,
        "encoder_num_layers": Use.INERT,
        "encoder_reparameterization_type": Use.INERT,
    },
    plan=_plan_prompt,
)
MULTITASK_PROMPT_TUNING = Kind(
    method=Method.MULTITASK_PROMPT_TUNING,
    fields={
        **_PROMPT_FIELDS,
        "num_ranks": Use.READ,
        "num_tasks": Use.READ,
        "prompt_tuning_init_state_dict_path": Use.INERT,
        "prompt_tuning_init_task": Use.INERT,
    },
    plan=_plan_multitask,
)
