"""The transformers class with which a model is computed: a decoder of text, or an encoder without a head.

Multimodal models become language models: their towers and projectors are taken out before any weight is read,
so that these are neither read nor held. What remains keeps its paths, by which adapters name their modules.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from turret_server.errors import UnsupportedModelError


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration is an encoder: its type can fill masks, and it is no decoder."""
    is_other = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    return not is_other and type(config) in AutoModelForMaskedLM._model_mapping  # noqa: SLF001


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class for models of this configuration.

    Raises:
        UnsupportedModelError: transformers has none that generates text or encodes it.
    """
    if is_encoder(config):
        found: type[PreTrainedModel] = AutoModel._model_mapping[type(config)]  # noqa: SLF001
        return found
    is_multimodal = "text_config" in config.sub_configs
    autos = (AutoModelForMultimodalLM, AutoModelForCausalLM) if is_multimodal else (AutoModelForCausalLM,)
    for auto in autos:
        found = auto._model_mapping.get(type(config), None)  # noqa: SLF001 (transformers offers no public way)
        if found is not None:
            return _language_model(found) if is_multimodal else found
    raise UnsupportedModelError(
        f"{config.model_type} models are not supported: transformers has no causal language model and no "
        "encoder of this type",
        model=config.model_type,
    )


def left_out(model: PreTrainedModel) -> tuple[str, ...]:
    """The paths of the modules that were taken out of a multimodal model."""
    return getattr(model, "left_out", ())


class _LanguageModel:
    """Mixed into a multimodal class."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        assert isinstance(self, PreTrainedModel)
        self.left_out = _take_out_towers(self)
        # Otherwise transformers warns of every weight of theirs in the checkpoint.
        self._keys_to_ignore_on_load_unexpected |= {rf"^{name}\." for name in self.left_out}


def _language_model(multimodal: type[PreTrainedModel]) -> type[PreTrainedModel]:
    # By its name and module transformers knows how checkpoints of the class are laid out.
    names = {"__module__": multimodal.__module__}
    return type(multimodal.__name__, (_LanguageModel, multimodal), names)


def _take_out_towers(model: PreTrainedModel) -> tuple[str, ...]:
    """Takes out what stands beside the decoder, except the head, and returns the paths."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    taken_out: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in list(module.named_children()):
            if child is decoder or child is head:
                continue
            if any(each is decoder for each in child.modules()):
                visit(child, f"{prefix}{name}.")
            else:
                delattr(module, name)
                taken_out.append(prefix + name)

    if any(each is decoder for each in model.modules() if each is not model):
        visit(model, "")
    return tuple(taken_out)
