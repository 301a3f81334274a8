"""Rows of the embedding and the head that an adapter trains alone.

These are `trainable_token_indices` of any kind, as in peft's `utils/other.py` (TrainableTokensWrapper), and
the kind TRAINABLE_TOKENS. In a tied base the head has the rows of the embedding.

Shape suffixes: N tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from turret_adapters.formats.fields import Fields, show
from turret_adapters.formats.kind import Rows, Tensors
from turret_adapters.formats.targets import ending_with
from turret_adapters.formats.tensors import MODULE_PREFIX
from turret_adapters.spec import BaseSpec, ModuleKind

_FIELD = "trainable_token_indices"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The token ids by module, in the order of the rows in the file.

    A head in `tied` uses the rows of an embedding. peft wraps each module in `wrapper`.
    """

    ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    wrapper: str = ""

    def key(self, module: str, around: str = "") -> str:
        """The key of a module's rows; `around` is the path of what peft wraps around the wrapper."""
        return f"{MODULE_PREFIX}{module}.{around}{self.wrapper}trainable_tokens_delta"

    def add_to(self, rows: Rows, tensors: Tensors) -> None:
        for module, ids in self.ids.items():
            rows_NE = tensors[self.key(self.tied.get(module, module))]
            order = sorted(range(len(ids)), key=ids.__getitem__)
            rows.replace_tokens(module, tuple(sorted(ids)), rows_NE[order].contiguous())


def tokens_of_field(
    fields: Fields, base: BaseSpec, *, adapted: Collection[str], saved: Collection[str]
) -> Tokens:
    """The tokens of `trainable_token_indices`, beside modules that the kind adapts or that are saved whole.

    Raises:
        AdapterFormatError: peft would not accept or not run them.
    """
    listed = _lists_of_tokens(fields, base)
    tokens = tokens_of_modules(base, listed, wrapper="token_adapter.")
    for module in tokens.ids:
        # An adapted head that shares the embedding's rows has them below its adapter.
        if module in saved or (module in adapted and module in listed):
            raise fields.refusal(_FIELD, f"without {show(module)}, which is adapted already")
    check_token_ids(_FIELD, fields, base, listed)
    return tokens


def check_token_ids(
    name: str, fields: Fields, base: BaseSpec, by_module: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks the token ids of a field, by module.

    Raises:
        AdapterFormatError: they are not token ids of the embedding or of a head without a bias.
    """
    for module, ids in by_module.items():
        shape = base.modules[module]
        if shape.kind not in (ModuleKind.EMBEDDING, ModuleKind.HEAD):
            raise fields.refusal(name, f"of the embedding or the head, not of {show(module)}")
        if shape.has_bias:
            # peft leaves the bias out.
            raise fields.refusal(name, f"without {show(module)}, which has a bias")
        vocabulary = shape.num_tokens
        if not ids or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
            raise fields.refusal(name, f"of token ids from 0 to {vocabulary - 1}")
        if len(set(ids)) != len(ids):
            raise fields.refusal(name, "of different token ids")


def tokens_of_modules(base: BaseSpec, listed: Mapping[str, tuple[int, ...]], *, wrapper: str) -> Tokens:
    """The tokens of the listed modules, and of a head that is tied to the embedding and has no other list."""
    embedding = next((module for module in base.of_kind(ModuleKind.EMBEDDING) if module in listed), None)
    tied: dict[str, str] = {}
    if base.tied and embedding is not None:
        heads = base.of_kind(ModuleKind.HEAD)
        tied = {head: embedding for head in heads if listed.get(head, listed[embedding]) == listed[embedding]}
    ids = {**listed, **{head: listed[embedding] for head, embedding in tied.items()}}
    return Tokens(ids=ids, tied=tied, wrapper=wrapper)


def _lists_of_tokens(fields: Fields, base: BaseSpec) -> dict[str, tuple[int, ...]]:
    """The unchecked lists of token ids, by module."""
    value = fields.get(_FIELD)
    if not value:
        return {}
    if isinstance(value, list):
        return dict.fromkeys(base.of_kind(ModuleKind.EMBEDDING), tuple(value))
    if not isinstance(value, dict) or not all(isinstance(ids, list) for ids in value.values()):
        raise fields.refusal(_FIELD, "a list of token ids, or an object of such lists")
    by_module: dict[str, tuple[int, ...]] = {}
    for ending, ids in value.items():
        modules = ending_with([ending], base.modules)
        if not modules or not by_module.keys().isdisjoint(modules):
            raise fields.refusal(_FIELD, "of different embeddings of the base model")
        by_module.update(dict.fromkeys(modules, tuple(ids)))
    return by_module
