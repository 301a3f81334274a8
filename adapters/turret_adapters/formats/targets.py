"""The modules of a base model that a config targets, as peft 0.21 finds them.

The semantics are those of `tuners/tuners_utils.py` (check_target_module_exists), `utils/other.py`
(get_pattern_key, _set_trainable) and, for `all-linear`, _maybe_include_all_linear_layers.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from turret_adapters.errors import AdapterBaseError, AdapterFormatError
from turret_adapters.formats.fields import Fields, Policy, Use, show
from turret_adapters.formats.files import CONFIG_NAME
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape

# Seconds of CPU time, so that a busy machine accepts what an idle one accepts, and of wall-clock time.
MAX_MATCH_SECONDS = 5
_MAX_WAIT_SECONDS = 60.0
ALL_LINEAR = "all-linear"
# The names that peft assumes for the embedding and the head of any model.
EMBEDDING_NAMES = ("embed_tokens", "lm_head")

TARGETED: Mapping[str, Policy] = {
    "modules_to_save": Use.READ,
    "target_modules": Use.READ,
}
BY_LAYER: Mapping[str, Policy] = {
    **TARGETED,
    "layers_pattern": Use.READ,
    "layers_to_transform": Use.READ,
}

Value = TypeVar("Value", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The targets of a config. Modules are a regular expression (str), or names and suffixes (frozenset)."""

    target_modules: str | frozenset[str]
    exclude_modules: str | frozenset[str]
    layers_to_transform: frozenset[int]
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    tied: tuple[str, ...]

    @classmethod
    def read(cls, fields: Fields, base: BaseSpec) -> Targets:
        """Reads the fields of BY_LAYER and `exclude_modules`, as far as the kind has them.

        Raises:
            AdapterFormatError: peft would not accept one of them.
        """
        target_modules = read_modules(fields, "target_modules")
        if not target_modules:
            raise fields.refusal("target_modules", "a list of names or a pattern")
        layers_to_transform = _layers(fields, "layers_to_transform")
        layers_pattern = _layer_list_names(fields, "layers_pattern")
        if layers_to_transform and isinstance(target_modules, str):
            raise fields.refusal("layers_to_transform", "absent beside a pattern")
        if layers_pattern and not layers_to_transform:
            raise fields.refusal("layers_pattern", "absent without layers_to_transform")
        return cls(
            target_modules=target_modules,
            exclude_modules=read_modules(fields, "exclude_modules"),
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            modules_to_save=modules_to_save(fields, base),
            tied=_tied(fields, base, target_modules),
        )

    def find(self, base: BaseSpec, *kinds: ModuleKind) -> dict[str, ModuleShape]:
        """The targeted modules of `base`, in its order; all must be of `kinds`.

        Raises:
            AdapterBaseError: there are none.
            AdapterFormatError: one is of another kind, or a pattern is not a regular expression or takes too
                long to match.
        """
        names = self._targeted(base)
        modules = {name: shape for name, shape in base.modules.items() if name in names}
        served = " or ".join(kind.value for kind in kinds)
        if not modules:
            raise AdapterBaseError(
                f"{CONFIG_NAME}: expected 'target_modules' to name a {served} of the base model "
                f"{base.name_or_path!r}, found {_show_modules(self.target_modules)}"
            )
        for name, shape in modules.items():
            if shape.kind not in kinds:
                raise AdapterFormatError(
                    f"{CONFIG_NAME}: expected every module in 'target_modules' to be a {served}, "
                    f"found {show(name)}, which is a {shape.kind.value}"
                )
        return modules

    def _targeted(self, base: BaseSpec) -> set[str]:
        # For peft an expert is not a module but a part of a parameter.
        paths = [path for path, shape in base.modules.items() if shape.kind is not ModuleKind.EXPERT]
        if self.target_modules == ALL_LINEAR:
            targeted = set(base.of_kind(ModuleKind.LINEAR))
        else:
            targeted = match_modules("target_modules", self.target_modules, paths)
        if self.layers_to_transform:
            # A module that is named by its whole path is targeted in any layer.
            targeted = {path for path in targeted if path in self.target_modules or self._in_layers(path)}
        for name in self.modules_to_save:
            targeted -= {path for path in paths if re.match(rf"(^|.*\.){name}($|\..*)", path)}
        targeted -= match_modules("exclude_modules", self.exclude_modules, paths)
        # peft ties the modules that are trained as a whole rather than the adapted ones.
        return targeted if set(self.tied) <= set(self.modules_to_save) else targeted.union(self.tied)

    def _in_layers(self, path: str) -> bool:
        if self.layers_pattern:
            attempts = (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", path) for name in self.layers_pattern)
            match = next(filter(None, attempts), None)
        else:
            match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return match is not None and int(match[1]) in self.layers_to_transform


def modules_to_save(fields: Fields, base: BaseSpec) -> tuple[str, ...]:
    """The names in the field; peft saves every module whose path ends with one.

    Raises:
        AdapterFormatError: the field is not a list of names.
    """
    names = fields.names("modules_to_save") or frozenset()
    # peft also uses them in regular expressions.
    if not all(re.fullmatch(r"[\w.]+", name) for name in names):
        raise fields.refusal("modules_to_save", "a list of names")
    return tuple(sorted(names.union(_tied(fields, base, names))))


def read_modules(fields: Fields, name: str) -> str | frozenset[str]:
    """A field of names (frozenset) or a regular expression (str); empty if the field is."""
    value = fields.get(name)
    if isinstance(value, str):
        return ALL_LINEAR if value.lower() == ALL_LINEAR else value
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
        raise fields.refusal(name, "a list of names or a pattern")
    return frozenset(names)


def match_modules(field: str, modules: str | frozenset[str], paths: Sequence[str]) -> set[str]:
    """The paths that a regular expression matches completely, or that equal a name or end with `.name`."""
    if isinstance(modules, str):
        matches = _first_matches(field, "fullmatch", [modules], paths)
        return {path for path, match in zip(paths, matches, strict=True) if match is not None}
    return {path for path in paths if not modules.isdisjoint(_suffixes(path))}


def ending_with(names: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The paths that end with a name, even in the middle of a word."""
    return [path for path in paths if path.endswith(tuple(names))]


def resolve(field: str, pattern: Mapping[str, Value], default: Value, paths: Sequence[str]) -> list[Value]:
    """For each path the value of the first key that matches it, as peft resolves `rank_pattern`."""
    if not pattern:
        return [default] * len(paths)
    keys = list(pattern)
    matches = _first_matches(field, "match", [rf"(.*\.)?({key})$" for key in keys], paths)
    return [default if match is None else pattern[keys[match]] for match in matches]


def _tied(fields: Fields, base: BaseSpec, modules: str | frozenset[str]) -> tuple[str, ...]:
    """The embedding and the head, if `ensure_weight_tying` adds them to modules that name one of them."""
    if not (fields.flag("ensure_weight_tying") and base.tied and _names_embedding(modules)):
        return ()
    return tuple(base.of_kind(ModuleKind.EMBEDDING, ModuleKind.HEAD))


def _names_embedding(modules: str | frozenset[str]) -> bool:
    if isinstance(modules, str):
        return bool(match_modules("target_modules", modules, EMBEDDING_NAMES))
    return any(name.rpartition(".")[2] in EMBEDDING_NAMES for name in modules)


def _layers(fields: Fields, name: str) -> frozenset[int]:
    value = fields.get(name)
    layers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(layer) is int for layer in layers):
        raise fields.refusal(name, "a layer's index or a list of them")
    return frozenset(layers)


def _layer_list_names(fields: Fields, name: str) -> tuple[str, ...]:
    value = fields.get(name)
    names = [] if not value else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) and re.fullmatch(r"[\w.]+", item) for item in names):
        raise fields.refusal(name, "a module list's name or a list of them")
    return tuple(names)


def _show_modules(modules: str | frozenset[str]) -> str:
    return show(modules if isinstance(modules, str) else sorted(modules))


def _suffixes(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[start:]) for start in range(len(names))]


# For each path, the index of the first regular expression that matches it.
_FIRST_MATCHES = """
import json, re, resource, sys
seconds, how, regexes, paths = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
matchers = [getattr(re.compile(regex), how) for regex in regexes]
found = [next((i for i, match in enumerate(matchers) if match(path)), None) for path in paths]
json.dump(found, sys.stdout)
"""


def _first_matches(field: str, how: str, regexes: Sequence[str], paths: Sequence[str]) -> list[int | None]:
    """Matches in a separate process: a hostile expression would hold the interpreter's lock for years."""
    too_long = AdapterFormatError(
        f"{CONFIG_NAME}: expected {field!r} to match the base model's modules within {MAX_MATCH_SECONDS} s, "
        "found a pattern that takes longer"
    )
    try:
        done = subprocess.run(  # noqa: S603 -- the program is ours, the adapter's part is its input
            [sys.executable, "-I", "-S", "-c", _FIRST_MATCHES],
            input=json.dumps([MAX_MATCH_SECONDS, how, regexes, paths]).encode(),
            capture_output=True,
            timeout=_MAX_WAIT_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise too_long from error
    except subprocess.CalledProcessError as error:
        if -error.returncode in {signal.SIGXCPU, signal.SIGKILL}:
            raise too_long from error
        reason = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise AdapterFormatError(
            f"{CONFIG_NAME}: expected {field!r} to hold regular expressions, found an error: {show(reason)}"
        ) from error
    found: list[int | None] = json.loads(done.stdout)
    return found
