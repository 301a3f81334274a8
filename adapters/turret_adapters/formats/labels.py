"""What the outputs of an adapter's head are called, from the `config.json` that people save beside it.

It is transformers' configuration of the model with the head. Only its `id2label` and `problem_type` are kept,
as JSON, in `LABELS_NAME`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turret_adapters.errors import AdapterFormatError, AdapterSourceError
from turret_adapters.formats.fields import parse_file, parse_object, refusal, show
from turret_adapters.formats.files import (
    CONFIG_NAME,
    LABELS_FILE,
    LABELS_NAME,
    MAX_CONFIG_BYTES,
    MAX_LABELS_BYTES,
    TENSORS_NAME,
    describe,
    open_inside,
)
from turret_adapters.spec import HeadTask, Problem

# The outputs of QUESTION_ANS are start and end.
_TASKS = (HeadTask.SEQ_CLS.value, HeadTask.TOKEN_CLS.value)


def has_labels(config: bytes) -> bool:
    """Whether an `adapter_config.json` is that of an adapter whose outputs may have names. A broken one is
    refused when the adapter is read.
    """
    try:
        return parse_file(config, CONFIG_NAME).get("task_type") in _TASKS
    except AdapterFormatError:
        return False


def read_labels(folder: Path) -> bytes:
    """What `config.json` in an adapter's folder says of its head, as JSON; empty if nothing, if there is no
    such file, or if the adapter has no such head.

    Raises:
        AdapterFormatError: it is broken.
        AdapterSourceError: it is unreadable, too large, or a link out of the folder.
    """
    try:
        with open_inside(folder, CONFIG_NAME, MAX_CONFIG_BYTES) as (file, size):
            config = file.read(size)
        if not has_labels(config) or not (folder / LABELS_FILE).exists():
            return b""
        with open_inside(folder, LABELS_FILE, MAX_LABELS_BYTES) as (file, size):
            values = parse_file(file.read(size), LABELS_FILE)
    except OSError as error:
        raise AdapterSourceError(
            f"{error.filename!r}: expected a readable file, found {describe(error)}"
        ) from error
    found = {name: values[name] for name in ("id2label", "problem_type") if values.get(name) is not None}
    _names(found)
    _problem(found)
    return json.dumps(found, sort_keys=True).encode() if found else b""


def parse_labels(data: bytes, num_labels: int) -> tuple[tuple[str, ...], Problem | None]:
    """The names of a head's outputs, and what they mean if it is known, from what `read_labels` returned.

    Raises:
        AdapterFormatError: they are broken, or of another number.
    """
    values = parse_object(data, LABELS_NAME) if data else {}
    names = _names(values)
    if names is None:
        names = tuple(f"LABEL_{index}" for index in range(num_labels))
    if len(names) != num_labels:
        raise AdapterFormatError(
            f"{LABELS_FILE}: expected 'id2label' to have {num_labels} labels, the outputs of the head in "
            f"{TENSORS_NAME}, found {len(names)} (save the configuration of the model that was trained)"
        )
    return names, _problem(values)


def _names(values: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels in order; None without."""
    value = values.get("id2label")
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {str(index) for index in range(len(value))}:
        raise refusal("id2label", value, "an object with the keys 0, 1 and so on", LABELS_FILE)
    names = tuple(value[str(index)] for index in range(len(value)))
    for name in names:
        # Half of a surrogate pair is valid JSON, and no text.
        if not isinstance(name, str) or name.encode(errors="ignore").decode() != name:
            raise AdapterFormatError(f"{LABELS_FILE}: expected labels that are text, found {show(name)}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise AdapterFormatError(
            f"{LABELS_FILE}: expected each label in 'id2label' once, found {show(twice[0])} twice"
        )
    return names


def _problem(values: Mapping[str, Any]) -> Problem | None:
    value, allowed = values.get("problem_type"), [problem.value for problem in Problem]
    if value is not None and value not in allowed:
        raise refusal("problem_type", value, f"empty or one of {', '.join(allowed)}", LABELS_FILE)
    return None if value is None else Problem(value)
