"""Heads: what transformers' classes for a task compute of the hidden states of a text.

A head is such a class without its base model, in whose place the hidden states stand that were computed in
the packed batch. So each family's pooling, activations and choice of tokens are transformers' own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.func import functional_call
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import cached_file

from turret_adapters.spec import HeadSpec, HeadTask, Problem
from turret_server.model.tensor_files import files_of_tensors

_AUTOS = {
    HeadTask.SEQ_CLS: AutoModelForSequenceClassification,
    HeadTask.TOKEN_CLS: AutoModelForTokenClassification,
    HeadTask.QUESTION_ANS: AutoModelForQuestionAnswering,
}
# As many labels as no layer has features: it shows which dimensions are the labels'.
_LABELS = 7919
# The start and the end of an answer.
_NUM_BOUNDS = 2


class _States(nn.Module):
    """Stands for the base model; `pools` is whether that has a pooler for the head."""

    def __init__(self, *, pools: bool) -> None:
        super().__init__()
        self.pools = pools
        self.output: BaseModelOutputWithPoolingAndCrossAttentions | None = None

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        assert self.output is not None
        return self.output


Shapes = Mapping[str, tuple[int, ...]]


def head_shapes(config: PreTrainedConfig, *, has_pooler: bool) -> dict[HeadTask, Shapes]:
    """The parameters of the heads that a base model of this configuration can have, with its pooler or
    without, by task and name; a dimension that is the number of labels is 0.
    """
    found: dict[HeadTask, Shapes] = {}
    for task, auto in _AUTOS.items():
        if type(config) not in auto._model_mapping:  # noqa: SLF001 (transformers offers no public way)
            continue
        head, states = _make(config, task, _LABELS)
        if has_pooler or not states.pools:
            found[task] = {
                name: tuple(0 if size == _LABELS else size for size in parameter.shape)
                for name, parameter in head.named_parameters()
            }
    return found


def task_prefixes(config: PreTrainedConfig) -> tuple[str, ...]:
    """The names that the base model has within transformers' classes for tasks."""
    kinds = [auto._model_mapping.get(type(config), None) for auto in _AUTOS.values()]  # noqa: SLF001
    return tuple(dict.fromkeys(kind.base_model_prefix for kind in kinds if kind is not None))


def read_head_weights(
    name_or_path: str, config: PreTrainedConfig, shapes: Mapping[HeadTask, Shapes]
) -> dict[str, torch.Tensor]:
    """The parameters of heads that a checkpoint has, by name: those of a head of its own, or parts that do
    not depend on the labels.
    """
    own = own_head(config)
    names = {
        name
        for task, of_task in shapes.items()
        for name, shape in of_task.items()
        if 0 not in shape or (own is not None and own.task is task)
    }
    files = files_of_tensors(name_or_path)
    found = {}
    for name in names & files.keys():
        with safe_open(cached_file(name_or_path, files[name]), "pt") as tensors:
            found[name] = tensors.get_tensor(name)
    return found


def own_head(config: PreTrainedConfig) -> HeadSpec | None:
    """The head of a checkpoint that was saved with one, by its configuration."""
    for task, auto in _AUTOS.items():
        kind = auto._model_mapping.get(type(config), None)  # noqa: SLF001
        if kind is not None and kind.__name__ in (config.architectures or ()):
            if task is HeadTask.QUESTION_ANS:
                return HeadSpec(task=task, labels=("start", "end"))
            labels = tuple(str(config.id2label[index]) for index in range(config.num_labels))
            if len(set(labels)) < len(labels):  # scores are told apart by them
                labels = tuple(f"LABEL_{index}" for index in range(config.num_labels))
            is_regression = task is HeadTask.SEQ_CLS and len(labels) == 1
            default = Problem.REGRESSION if is_regression else Problem.SINGLE_LABEL
            return HeadSpec(task=task, labels=labels, problem=Problem(config.problem_type or default))
    return None


class Heads:
    """The heads of a base model, each made when it is first used."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._shapes = head_shapes(config, has_pooler=True)
        self._made = lru_cache(maxsize=64)(self._make)

    def _make(self, task: HeadTask, num_labels: int) -> tuple[PreTrainedModel, _States]:
        return _make(self._config, task, num_labels)

    def __call__(
        self,
        task: HeadTask,
        parameters: Mapping[str, torch.Tensor],
        states_TE: torch.Tensor,
        pooled_E: torch.Tensor | None,
    ) -> torch.Tensor:
        """The logits of one text, [1, labels], or of each of its tokens, [T, labels].

        Args:
            task: what is computed.
            parameters: those of the head, by name.
            states_TE: the hidden states of the text's tokens.
            pooled_E: what the base model's pooler makes of the first, if it has one.
        """
        head, states = self._made(task, _num_labels(self._shapes[task], parameters))
        states.output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=states_TE[None], pooler_output=None if pooled_E is None else pooled_E[None]
        )
        found = functional_call(head, dict(parameters), kwargs={"inputs_embeds": states_TE[None]})
        states.output = None
        if task is HeadTask.QUESTION_ANS:
            return torch.stack((found.start_logits[0], found.end_logits[0]), dim=-1)
        logits: torch.Tensor = found.logits
        return logits[0] if task.by_token else logits


def _num_labels(shapes: Shapes, parameters: Mapping[str, torch.Tensor]) -> int:
    return next(
        (parameters[name].shape[shape.index(0)] for name, shape in shapes.items() if 0 in shape), _NUM_BOUNDS
    )


def _make(config: PreTrainedConfig, task: HeadTask, num_labels: int) -> tuple[PreTrainedModel, _States]:
    """A head without numbers, and what stands for its base model."""
    config = copy.deepcopy(config)
    config.num_labels = _NUM_BOUNDS if task is HeadTask.QUESTION_ANS else num_labels
    kind = _AUTOS[task]._model_mapping[type(config)]  # noqa: SLF001
    with torch.device("meta"):
        head = kind._from_config(config)  # noqa: SLF001
    of_base = getattr(head, head.base_model_prefix)
    states = _States(pools=getattr(of_base, "pooler", None) is not None)
    setattr(head, head.base_model_prefix, states)
    return head.eval(), states
