"""The head that an adapter's task adds to the base, saved whole as peft's `modules_to_save`.

CAUSAL_LM and FEATURE_EXTRACTION have none: the one generates text, the other ends with the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from turret_adapters.errors import AdapterFormatError
from turret_adapters.formats.fields import Fields, show
from turret_adapters.formats.labels import parse_labels
from turret_adapters.formats.tensors import MODULE_PREFIX, PROMPT_PREFIX, WIDTH, Entry, Expected, saved_key
from turret_adapters.spec import BaseSpec, HeadSpec, HeadTask, Problem

MAX_LABELS = 1 << 16
_GENERATES = ("CAUSAL_LM",)
_FEATURES = ("FEATURE_EXTRACTION",)
# Below a module's name, where peft's wrapper keeps the trained copy.
_TRAINED = "modules_to_save"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPlan:
    """The tensors of a head, by their keys in the file: which parameter each is, and its shape."""

    spec: HeadSpec
    names: Mapping[str, str]
    expected: Mapping[str, Expected]

    def build(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The head's parameters, by name."""
        return {name: tensors[key] for key, name in self.names.items()}


def plan_head(fields: Fields, base: BaseSpec, entries: Sequence[Entry], labels: bytes) -> HeadPlan | None:
    """The head of an adapter's task, with outputs named as in what `read_labels` returned; None if it has
    none.

    Raises:
        AdapterFormatError: the base model cannot do the task, the file lacks the head, or the labels are
            those of another one.
    """
    task = _task(fields, base)
    if task is None:
        return None
    shapes = base.heads[task]
    found = [(saved_key(entry.key), entry.shape) for entry in entries]
    names = {key: name for key, _ in found if (name := _parameter(key)) in shapes}
    sizes = {names[key]: shape for key, shape in found if key in names}
    missing = [
        name
        for name, shape in shapes.items()
        if name not in sizes and (0 in shape or name not in base.head_weights)
    ]
    if missing:
        modules = sorted({name.partition(".")[0] for name in missing})
        raise AdapterFormatError(
            f"tensor {show(missing[0])}: expected the head of a {task.value} adapter in the file, found none "
            f"(train it with 'modules_to_save': {modules})"
        )
    by_label = (
        size
        for name, shape in sizes.items()
        for expected, size in zip(shapes[name], shape, strict=False)
        if not expected
    )
    num_labels = next(by_label, 0)
    if task is not HeadTask.QUESTION_ANS and not 0 < num_labels <= MAX_LABELS:
        raise AdapterFormatError(
            f"tensor {show(next(iter(names)))}: expected 1 to {MAX_LABELS} labels, found {num_labels}"
        )
    return HeadPlan(
        spec=_spec(task, num_labels, labels),
        names=names,
        expected={
            key: Expected(
                tuple(size or num_labels for size in shapes[name]),
                tuple(WIDTH if size else None for size in shapes[name]),
            )
            for key, name in names.items()
        },
    )


def _task(fields: Fields, base: BaseSpec) -> HeadTask | None:
    value = fields.get("task_type") or None
    allowed = [*_FEATURES, *(task.value for task in base.heads)]
    if not base.is_encoder:
        allowed = [*_GENERATES, *allowed]
    if value is not None and value not in allowed:
        does = f"what the base model {base.name_or_path!r} does: {', '.join(allowed)}"
        raise fields.refusal("task_type", f"empty or {does}")
    return HeadTask(value) if value in {task.value for task in HeadTask} else None


def _parameter(key: str) -> str:
    """The name of the parameter that a key may be of, or of the trained copy in peft's wrapper."""
    name = key.removeprefix(MODULE_PREFIX if key.startswith(MODULE_PREFIX) else PROMPT_PREFIX)
    return ".".join(part for part in name.split(".") if part != _TRAINED)


def _spec(task: HeadTask, num_labels: int, labels: bytes) -> HeadSpec:
    if task is HeadTask.QUESTION_ANS:
        return HeadSpec(task=task, labels=("start", "end"))
    names, problem = parse_labels(labels, num_labels)
    default = Problem.REGRESSION if task is HeadTask.SEQ_CLS and num_labels == 1 else Problem.SINGLE_LABEL
    return HeadSpec(task=task, labels=names, problem=problem or default)
