"""Refuses models that would not be computed exactly, before any weight is read.

Some families go wrong silently when their attention is replaced or their tokens are packed.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from turret_server.errors import UnsupportedModelError
from turret_server.model.classes import is_encoder
from turret_server.model.experts import EXPERT_MODELS, EXPERTS_METHOD, has_experts, is_stacked

_NF4 = "bitsandbytes NF4"
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_config(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """Refuses a model by its configuration and class.

    Raises:
        UnsupportedModelError: names the model type, the unsupported feature and what is supported.
    """
    text = config.get_text_config(decoder=True)

    def refuse(why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{config.model_type} models are not supported: {why}", model=config.model_type
        )

    if config.is_encoder_decoder:
        raise refuse("they have an encoder; use a decoder-only model")
    if model_class._is_stateful:  # noqa: SLF001 (transformers offers no public way)
        raise refuse(
            "their layers keep a recurrent state, and the arena holds only keys and values; use a model in "
            "which every layer is attention"
        )
    if not model_class._can_set_attn_implementation():  # noqa: SLF001
        raise refuse(
            "transformers does not let their attention be replaced (_can_set_attn_implementation is False); "
            "use a model that takes attn_implementation"
        )
    if not hasattr(text, "num_attention_heads"):
        raise refuse("their layers have no attention heads; use a model in which every layer is attention")
    if other := set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES:
        raise refuse(
            f"found layers of type {', '.join(sorted(other))}; supported are "
            f"{', '.join(sorted(_LAYER_TYPES))}"
        )
    if text.is_heterogeneous:
        raise refuse("their layers differ in width or number of heads; use a model in which all are alike")
    widths = {getattr(text, each, None) for each in ("qk_head_dim", "head_dim")} - {None}
    value_width = getattr(text, "v_head_dim", None)
    if value_width is not None and widths - {value_width}:
        raise refuse(
            f"their values are {value_width} wide (v_head_dim) and their keys are not; use a model in which "
            "both have one width"
        )
    _check_quantization(config)


def _check_quantization(config: PreTrainedConfig) -> None:
    quantization: dict[str, Any] = getattr(config, "quantization_config", None) or {}
    if quantization and _method(quantization) != _NF4:
        raise UnsupportedModelError(
            f"the checkpoint is quantised with {_method(quantization)}; use the checkpoint that it was "
            f"made from, in 16 or 32 bit, which the first start quantises, or one that is in {_NF4}"
        )
    if quantization and has_experts(config) and quantization.get("quant_method") != EXPERTS_METHOD:
        raise UnsupportedModelError(
            f"{config.model_type} models are not supported as quantised by bitsandbytes, which leaves their "
            "experts in 16 bit; use a checkpoint in 16 or 32 bit",
            model=config.model_type,
        )


def _method(quantization: dict[str, Any]) -> str:
    found = str(quantization.get("quant_method") or "an unknown method")
    if found != "bitsandbytes":
        return _NF4 if found == EXPERTS_METHOD else found
    if quantization.get("load_in_8bit"):
        return "bitsandbytes in 8 bit"
    return f"bitsandbytes {str(quantization.get('bnb_4bit_quant_type', 'fp4')).upper()}"


def check_model(model: PreTrainedModel) -> None:
    """Refuses attention of a decoder that looks at later tokens, or of an encoder that does not; and stacked
    weights, which would stay unquantised and unreachable for adapters.

    The model may be on the meta device.

    Raises:
        UnsupportedModelError: names the model type and the first such module or parameter.
    """
    model_type = model.config.model_type
    encodes = is_encoder(model.config)
    for name, module in model.named_modules():
        is_causal = getattr(module, "is_causal", None)
        if encodes and is_causal:
            raise UnsupportedModelError(
                f"{model_type} models are not supported: {name} does not look at later tokens; use an "
                "encoder of another type",
                model=model_type,
            )
        if is_causal is False and not encodes:
            raise UnsupportedModelError(
                f"{model_type} models are not supported: {name} looks at later tokens, as an encoder does; "
                "use a decoder (is_decoder in config.json, for a model that can be either)",
                model=model_type,
            )
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2 and not (has_experts(model.config) and is_stacked(name)):
            raise UnsupportedModelError(
                f"{model_type} models are not supported: {name} holds stacked weights, of shape "
                f"{list(parameter.shape)}; these are supported in models of type {', '.join(EXPERT_MODELS)}",
                model=model_type,
            )
