"""What a packed batch needs of an encoder, whose model assumes one text to a row."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from turret_server.model.classes import is_encoder

_TYPES = "token_type_ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """`padding_id` is the padding token of a model that numbers positions from after it, as RoBERTa does;
    None for the others. `pooler` computes a vector of each text's first state, if the model has one.
    """

    padding_id: int | None
    num_token_types: int
    takes_token_types: bool
    pooler: nn.Module | None

    def pool(self, first_SE: torch.Tensor) -> torch.Tensor:
        """The pooler's vectors for the first states of texts, [S, hidden]."""
        assert self.pooler is not None
        pooled_SE: torch.Tensor = type(self.pooler).forward(self.pooler, first_SE[:, None])
        return pooled_SE


def prepare_encoder(model: PreTrainedModel) -> Encoder:
    """Makes the model compute packed batches; its modules may be adapted already.

    Attention modules get the number of their layer, where they do not have it. The pooler does nothing in the
    model's own forward, which would take the first token of the batch.
    """
    attention = (module for module in model.modules() if getattr(module, "is_causal", None) is False)
    for index, module in enumerate(attention):
        if getattr(module, "layer_idx", None) is None:
            module.layer_idx = index
    pooler = getattr(model, "pooler", None)
    if pooler is not None:
        pooler.forward = lambda _: None
    takes_types = _TYPES in inspect.signature(model.forward).parameters
    return Encoder(
        padding_id=padding_of_positions(model),
        num_token_types=getattr(model.config, "type_vocab_size", 1) if takes_types else 1,
        takes_token_types=takes_types,
        pooler=pooler,
    )


def takes_prefix(model: PreTrainedModel) -> bool:
    """Whether transformers lets keys and values stand before a text, as peft passes them."""
    return not is_encoder(model.config) or "past_key_values" in inspect.signature(model.forward).parameters


def first_position(model: nn.Module) -> int:
    """The position of a text's first token."""
    padding_id = padding_of_positions(model)
    return 0 if padding_id is None else padding_id + 1


def padding_of_positions(model: nn.Module) -> int | None:
    """The padding token from after which a model numbers positions; None if it begins at 0."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.padding_idx
    return None
