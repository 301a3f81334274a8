"""Which model families are computed exactly, decided before any weight is read.

Some families go wrong in silence when their attention is replaced or their tokens are packed; they are
refused by name here.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from turret_server.errors import UnsupportedModelError
from turret_server.model.experts import EXPERT_MODELS, EXPERTS_METHOD, has_experts, is_stacked

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Their frequencies follow the longest position of the batch: an answer would depend on who shares it.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def check_config(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """Refuse what cannot be served exactly.

    Raises:
        UnsupportedModelError: names the model type and what it needs that is not here.
    """
    text = config.get_text_config(decoder=True)

    def refuse(why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{config.model_type} models are not served: {why}", model=config.model_type
        )

    if config.is_encoder_decoder:
        raise refuse("they have an encoder")
    if model_class._is_stateful:  # noqa: SLF001 (transformers offers no public way)
        raise refuse("they keep a state beside keys and values")
    if not model_class._can_set_attn_implementation():  # noqa: SLF001
        raise refuse("their attention cannot be replaced")
    if other := set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES:
        raise refuse(f"they have layers of type {', '.join(sorted(other))}")
    if batch_dependent := _rope_types(text) & _BATCH_DEPENDENT_ROPE:
        raise refuse(
            f"their {', '.join(sorted(batch_dependent))} rotary embedding "
            "depends on the longest sequence of a batch"
        )
    _check_quantization(config)


def _check_quantization(config: PreTrainedConfig) -> None:
    quantization: dict[str, Any] = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    if quantization and quantization.get("bnb_4bit_quant_type") != "nf4":
        found = quantization.get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"the checkpoint is quantised with {found}; give one in 16 or 32 bit, or in bitsandbytes NF4"
        )
    if quantization and has_experts(config) and quantization.get("quant_method") != EXPERTS_METHOD:
        raise UnsupportedModelError(
            f"{config.model_type} models are not served as bitsandbytes quantised them, since it leaves out "
            "their experts; give a checkpoint in 16 or 32 bit",
            model=config.model_type,
        )


def _rope_types(config: PreTrainedConfig) -> set[str]:
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(each.get("rope_type", "default")) for each in (nested or [parameters])}


def check_model(model: PreTrainedModel) -> None:
    """Refuse weights that would stay unquantised and out of an adapter's reach; their numbers do not matter.

    Raises:
        UnsupportedModelError: names the model type and the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2 and not (has_experts(model.config) and is_stacked(name)):
            model_type = model.config.model_type
            raise UnsupportedModelError(
                f"{model_type} models are not served: {name} holds stacked weights, which are quantised "
                f"and adapted only in models of type {', '.join(EXPERT_MODELS)}",
                model=model_type,
            )
