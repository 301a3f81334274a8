"""How many tokens a model's rotary embedding is exact for.

The frequencies of some types change for all sequences of a batch as soon as one is long, so that an answer
would depend on the other requests of its batch. Up to that length they do not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from turret_server.errors import ConfigError, UnsupportedModelError

_CHANGING = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class ContextLength:
    """Tokens of a prompt and its answer. `note` continues a sentence that ends with "tokens"."""

    tokens: int
    note: str = ""


def context_length(config: PreTrainedConfig, wanted: int | None, first_position: int = 0) -> ContextLength:
    """The length of the context of a model that numbers positions from the first on, or `wanted` if it is
    shorter.

    Raises:
        ConfigError: `wanted` is longer.
        UnsupportedModelError: the configuration does not say how long.
    """
    text = config.get_text_config(decoder=True)
    if not hasattr(text, "max_position_embeddings"):
        raise UnsupportedModelError(
            f"{config.model_type} models are not supported: their configuration has no "
            "max_position_embeddings, the length of their context; use a model of another type",
            model=config.model_type,
        )
    found = ContextLength(text.max_position_embeddings - first_position)
    for parameters in _parameters(text):
        rope_type, tokens = parameters.get("rope_type"), text.max_position_embeddings
        if rope_type == "longrope":
            tokens = parameters["original_max_position_embeddings"]
        if rope_type in _CHANGING and tokens <= found.tokens:
            found = ContextLength(
                tokens, f", beyond which its rotary embedding ({rope_type}) would change for the whole batch"
            )
    if wanted is None or wanted == found.tokens:
        return found
    if wanted > found.tokens:
        raise ConfigError(
            f"--max-context {wanted}: the model's context has {found.tokens} tokens{found.note}; give at "
            f"most {found.tokens}"
        )
    return ContextLength(wanted, " (--max-context)")


def fix(model: nn.Module) -> None:
    """Lets the frequencies of changing types stay what they are up to the length of the context.

    Otherwise each step computes whether they change, and a GPU waits for the answer.
    """
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, str):
            setattr(module, "rope_type", _fixed(rope_type))  # noqa: B010 -- of torch's type of attributes
        elif isinstance(rope_type, dict):  # by type of layer
            setattr(module, "rope_type", {layer: _fixed(each) for layer, each in rope_type.items()})  # noqa: B010


def _fixed(rope_type: str) -> str:
    return "default" if rope_type in _CHANGING else rope_type


def _parameters(config: PreTrainedConfig) -> Sequence[Mapping[str, Any]]:
    """One for the whole model, or one for each type of layer."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
