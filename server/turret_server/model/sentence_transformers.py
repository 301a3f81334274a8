"""What sentence-transformers saves of a base: how its vectors come from its hidden states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from turret_server.engine.pooling import Pooling
from turret_server.model.checkpoint import reading

_MODULES = "modules.json"
_ALLOWED = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_POOLINGS = {pooling.value: pooling for pooling in Pooling}
# A flag for each, in versions before 6.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Of the module Transformer, by the class with which it was saved.
_OF_TEXTS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_REMEDY = "(name the pooling in the request for vectors that are pooled without it)"


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorDefaults:
    """The vectors of a base, for requests that say nothing else. `max_tokens` is the length of the texts that
    it was trained for, if that is known. `refusal` is why the server does not compute the vectors that the
    base was trained for, or "".
    """

    pooling: Pooling
    normalize: bool = True
    max_tokens: int | None = None
    refusal: str = ""


def read_vector_defaults(name_or_path: str, *, is_encoder: bool) -> VectorDefaults:
    """The vectors of a base. If sentence-transformers did not save it, they are pooled as vLLM and
    text-embeddings-inference do.

    Raises:
        ConfigError: a file of sentence-transformers is missing or broken.
    """
    default = Pooling.MEAN if is_encoder else Pooling.LAST
    with reading(name_or_path, f"{_MODULES} or a file that it names"):
        modules = _json(name_or_path, _MODULES)
        if modules is None:
            return VectorDefaults(pooling=default)
        # The classes have moved between the library's packages.
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        if kinds not in _ALLOWED:
            why = f"{_MODULES}: expected Transformer, Pooling and at most Normalize, found {', '.join(kinds)}"
            return VectorDefaults(pooling=default, refusal=f"{why} {_REMEDY}")
        transformer, file = modules[0]["path"], _path(modules[1]["path"], "config.json")
        pooling, of_texts = _json(name_or_path, file), _of_texts(name_or_path, transformer)
        if pooling is None:
            raise ValueError(f"{file} is missing")
        modes = _modes(pooling)
        why = _refusal(file, pooling, modes) or _refusal_of_texts(of_texts)
        return VectorDefaults(
            pooling=default if why else _POOLINGS[modes[0]],
            normalize="Normalize" in kinds,
            max_tokens=of_texts.get("max_seq_length"),
            refusal=f"{why} {_REMEDY}" if why else "",
        )


def _json(name_or_path: str, file: str) -> Any:
    """What a file contains; None if the checkpoint does not have it."""
    found = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else json.loads(Path(found).read_bytes())


def _path(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file


def _of_texts(name_or_path: str, folder: str) -> Mapping[str, Any]:
    for file in _OF_TEXTS:
        if found := _json(name_or_path, _path(folder, file)):
            return dict(found)
    return {}


def _modes(pooling: Mapping[str, Any]) -> list[str]:
    """Those whose vectors follow each other in one."""
    mode = pooling.get("pooling_mode")
    if mode is None:
        mode = [name for flag, name in _FLAGS.items() if pooling.get(flag)] or ["mean"]
    return [mode] if isinstance(mode, str) else list(mode)


def _refusal(file: str, pooling: Mapping[str, Any], modes: list[str]) -> str:
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        return f"{file}: expected one pooling of {', '.join(_POOLINGS)}, found {', '.join(modes)}"
    if not pooling.get("include_prompt", True):
        return f"{file}: expected include_prompt, since all tokens of a text are pooled, found false"
    return ""


def _refusal_of_texts(of_texts: Mapping[str, Any]) -> str:
    if of_texts.get("do_lower_case"):
        return "do_lower_case: expected texts as the tokenizer reads them, found that they become lower-case"
    return ""
