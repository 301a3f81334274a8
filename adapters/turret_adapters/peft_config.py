"""`adapter_config.json`: what each field may say, and what the fields make of a base model.

`FIELDS` is the whole policy. A field of peft that changes the mathematics and is not served, and a field that
we do not know, must be empty; otherwise the adapter is refused, naming the field.
The semantics are those of peft 0.21: `tuners/tuners_utils.py`, `utils/other.py`, `tuners/lora/layer.py`.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from reprlib import Repr
from typing import Any, Final, TypeAlias, TypeVar

from turret_adapters.errors import AdapterBaseError, AdapterFormatError
from turret_adapters.source import CONFIG_NAME
from turret_adapters.spec import BaseSpec, LoraModule, Method

MAX_RANK = 512
MAX_VIRTUAL_TOKENS = 4096
MAX_ALPHA = 1e6
MAX_PATTERNS = 4096
MAX_MATCH_SECONDS = 5.0
ALL_LINEAR = "all-linear"
# `all-linear` leaves out the output embedding, which peft finds in the live model.
OUTPUT_EMBEDDINGS = frozenset({"lm_head", "embed_out"})


class Use(Enum):
    """What is done with a field; a tuple instead lists the values, besides empty ones, that are served."""

    READ = "read"
    INERT = "inert"


REFUSED: Final = ()

Policy: TypeAlias = Use | tuple[object, ...]

_COMMON: Mapping[str, Policy] = {
    "auto_mapping": Use.INERT,
    "base_model_name_or_path": Use.INERT,
    "inference_mode": Use.INERT,
    "modules_to_save": REFUSED,
    "peft_type": Use.READ,
    "peft_version": Use.INERT,
    "revision": Use.INERT,
    "task_type": ("CAUSAL_LM",),
}
_VIRTUAL_TOKENS: Mapping[str, Policy] = {
    **_COMMON,
    "num_attention_heads": Use.READ,
    "num_layers": Use.READ,
    "num_transformer_submodules": (1,),
    "num_virtual_tokens": Use.READ,
    "token_dim": Use.READ,
}
FIELDS: Mapping[Method, Mapping[str, Policy]] = {
    Method.LORA: {
        **_COMMON,
        "alora_invocation_tokens": REFUSED,
        "alpha_pattern": Use.READ,
        "arrow_config": REFUSED,
        "bias": ("none",),
        "corda_config": Use.INERT,
        "ensure_weight_tying": REFUSED,
        "eva_config": Use.INERT,
        "exclude_modules": Use.READ,
        "fan_in_fan_out": Use.INERT,
        # pissa, olora, corda, loftq and lora_ga take something out of the base's weights.
        "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
        "kasa_config": REFUSED,
        "layer_replication": REFUSED,
        "layers_pattern": Use.READ,
        "layers_to_transform": Use.READ,
        "loftq_config": Use.INERT,
        "lora_alpha": Use.READ,
        "lora_bias": REFUSED,
        "lora_dropout": Use.INERT,
        "lora_ga_config": Use.INERT,
        "megatron_config": REFUSED,
        "megatron_core": Use.INERT,
        "monteclora_config": REFUSED,
        "qalora_group_size": Use.INERT,
        "r": Use.READ,
        "rank_pattern": Use.READ,
        "runtime_config": Use.INERT,
        "target_modules": Use.READ,
        "target_parameters": REFUSED,
        "trainable_token_indices": REFUSED,
        "use_bdlora": REFUSED,
        "use_dora": REFUSED,
        "use_qalora": REFUSED,
        "use_rslora": Use.READ,
        "velora_config": REFUSED,
    },
    Method.PREFIX_TUNING: {
        **_VIRTUAL_TOKENS,
        "encoder_hidden_size": Use.INERT,
        "init_weights": Use.INERT,
        "prefix_projection": Use.INERT,
    },
    Method.PROMPT_TUNING: {
        **_VIRTUAL_TOKENS,
        "prompt_tuning_init": Use.INERT,
        "prompt_tuning_init_text": Use.INERT,
        "tokenizer_kwargs": Use.INERT,
        "tokenizer_name_or_path": Use.INERT,
    },
    Method.P_TUNING: {
        **_VIRTUAL_TOKENS,
        "encoder_dropout": Use.INERT,
        "encoder_hidden_size": Use.INERT,
        "encoder_num_layers": Use.INERT,
        "encoder_reparameterization_type": Use.INERT,
    },
}
_HINTS: Mapping[str, str] = {
    "init_lora_weights": " (peft's save_pretrained(path_initial_model_for_weight_conversion=...) converts an "
    "adapter that changed its base's weights)",
}


Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """What a LORA config says. Modules are a regular expression (str), or names and suffixes (frozenset)."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | frozenset[str]
    exclude_modules: str | frozenset[str]
    layers_to_transform: frozenset[int]
    layers_pattern: tuple[str, ...]

    def modules(self, base: BaseSpec) -> tuple[LoraModule, ...]:
        """The linears of `base` that the config targets, in the base's order.

        Raises:
            AdapterBaseError: it targets none.
            AdapterFormatError: a pattern is no regular expression, or takes too long to match.
        """
        names = self._targeted(list(base.linears))
        if not names:
            raise AdapterBaseError(
                f"{CONFIG_NAME}: expected 'target_modules' to name a linear of the base model "
                f"{base.name_or_path!r}, found {_show_modules(self.target_modules)}"
            )
        ranks = _resolve("rank_pattern", self.rank_pattern, self.rank, names)
        alphas = _resolve("alpha_pattern", self.alpha_pattern, self.alpha, names)
        return tuple(
            LoraModule(
                name=name,
                rank=rank,
                in_features=base.linears[name].in_features,
                out_features=base.linears[name].out_features,
                scaling=alpha / math.sqrt(rank) if self.use_rslora else alpha / rank,
            )
            for name, rank, alpha in zip(names, ranks, alphas, strict=True)
        )

    def _targeted(self, paths: Sequence[str]) -> list[str]:
        if self.target_modules == ALL_LINEAR:
            targeted = {path for path in paths if path.rpartition(".")[2] not in OUTPUT_EMBEDDINGS}
        else:
            targeted = _named("target_modules", self.target_modules, paths)
        if self.layers_to_transform:
            # A module whose whole path is named is targeted whatever its layer.
            targeted = {path for path in targeted if path in self.target_modules or self._in_layers(path)}
        targeted -= _named("exclude_modules", self.exclude_modules, paths)
        return [path for path in paths if path in targeted]

    def _in_layers(self, path: str) -> bool:
        if self.layers_pattern:
            attempts = (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", path) for name in self.layers_pattern)
            match = next(filter(None, attempts), None)
        else:
            match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return match is not None and int(match[1]) in self.layers_to_transform


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualTokensConfig:
    """What a PREFIX_TUNING, PROMPT_TUNING or P_TUNING config says."""

    method: Method
    num_virtual_tokens: int
    num_layers: int | None
    num_attention_heads: int | None
    token_dim: int | None

    def check(self, base: BaseSpec) -> None:
        """Compares the base model that the config describes with `base`.

        Raises:
            AdapterBaseError: they differ.
        """
        checks = [("num_layers", self.num_layers, base.num_layers)]
        if self.method is Method.PREFIX_TUNING:
            # peft overwrites both with the key-value heads' for this method.
            checks += [
                ("num_attention_heads", self.num_attention_heads, base.num_kv_heads),
                ("token_dim", self.token_dim, base.num_kv_heads * base.head_dim),
            ]
        else:
            checks += [("token_dim", self.token_dim, base.hidden_size)]
        for name, found, expected in checks:
            if found not in (None, expected):
                raise AdapterBaseError(
                    f"{CONFIG_NAME}: expected {name!r} to be {expected}, as in the base model "
                    f"{base.name_or_path!r}, found {found}"
                )


def parse_config(data: bytes) -> LoraConfig | VirtualTokensConfig:
    """Parses and checks the bytes of an `adapter_config.json`.

    Raises:
        AdapterFormatError: it is no JSON object, or a field says what is not served.
    """
    fields = parse_object(data, CONFIG_NAME)
    peft_type = fields.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in Method.__members__:
        raise _refusal("peft_type", peft_type, f"one of {', '.join(Method.__members__)}")
    method = Method[peft_type]
    _check_policy(FIELDS[method], fields)
    if method is Method.LORA:
        return _lora_config(fields)
    sizes = {
        name: None if fields.get(name) is None else _integer(name, fields[name], None)
        for name in ("num_layers", "num_attention_heads", "token_dim")
    }
    return VirtualTokensConfig(
        method=method,
        num_virtual_tokens=_integer(
            "num_virtual_tokens", fields.get("num_virtual_tokens"), MAX_VIRTUAL_TOKENS
        ),
        **sizes,
    )


def parse_object(data: bytes, file_name: str) -> dict[str, Any]:
    """Parses JSON that must be one object in UTF-8 without repeated keys.

    Raises:
        AdapterFormatError: it is not, in the file of that name.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise AdapterFormatError(
            f"{file_name}: expected a JSON object, found one nested too deeply"
        ) from error
    except ValueError as error:
        raise AdapterFormatError(
            f"{file_name}: expected a JSON object, found broken JSON ({error})"
        ) from error
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{file_name}: expected a JSON object, found {show(value)}")
    return value


def show(value: object) -> str:
    """A value out of a file, printable and short whatever it is."""
    return _SHORT.repr(value)


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 160


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {show(key)} stands twice")
        value[key] = item
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _refusal(field: str, value: object, expected: str) -> AdapterFormatError:
    return AdapterFormatError(f"{CONFIG_NAME}: expected {show(field)} to be {expected}, found {show(value)}")


def _check_policy(policy: Mapping[str, Policy], fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        served = policy.get(name, REFUSED)
        if isinstance(served, Use) or value is None or value is False or value in ([], {}):
            continue
        # JSON's true and 1 are different values, Python's are not.
        if not any(type(value) is type(other) and value == other for other in served):
            values = f"empty, {', '.join(map(repr, served))}" if served else "empty, since it is not served"
            raise _refusal(name, value, values + _HINTS.get(name, ""))


def _lora_config(fields: Mapping[str, Any]) -> LoraConfig:
    target_modules = _modules("target_modules", fields.get("target_modules"))
    if not target_modules:
        raise _refusal("target_modules", fields.get("target_modules"), "a list of names or a pattern")
    layers_to_transform = _layers("layers_to_transform", fields.get("layers_to_transform"))
    layers_pattern = _layer_list_names("layers_pattern", fields.get("layers_pattern"))
    if layers_to_transform and isinstance(target_modules, str):
        raise _refusal("layers_to_transform", fields["layers_to_transform"], "absent beside a pattern")
    if layers_pattern and not layers_to_transform:
        raise _refusal("layers_pattern", fields["layers_pattern"], "absent without layers_to_transform")
    use_rslora = fields.get("use_rslora")
    if not (use_rslora is None or isinstance(use_rslora, bool)):
        raise _refusal("use_rslora", use_rslora, "true or false")
    return LoraConfig(
        rank=_integer("r", fields.get("r", 8), MAX_RANK),
        alpha=_number("lora_alpha", fields.get("lora_alpha", 8)),
        use_rslora=bool(use_rslora),
        rank_pattern={
            key: _integer(f"rank_pattern[{show(key)}]", value, MAX_RANK)
            for key, value in _pattern("rank_pattern", fields.get("rank_pattern"))
        },
        alpha_pattern={
            key: _number(f"alpha_pattern[{show(key)}]", value)
            for key, value in _pattern("alpha_pattern", fields.get("alpha_pattern"))
        },
        target_modules=target_modules,
        exclude_modules=_modules("exclude_modules", fields.get("exclude_modules")),
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
    )


def _integer(field: str, value: object, most: int | None) -> int:
    if type(value) is not int or value < 1 or (most is not None and value > most):
        raise _refusal(field, value, "a positive integer" if most is None else f"an integer from 1 to {most}")
    return value


def _number(field: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_ALPHA:
        raise _refusal(field, value, f"a number of at most {MAX_ALPHA:.0f}")
    return float(value)


def _pattern(field: str, value: object) -> list[tuple[str, object]]:
    pattern = {} if value is None else value
    if not isinstance(pattern, dict) or len(pattern) > MAX_PATTERNS:
        raise _refusal(field, value, f"an object of at most {MAX_PATTERNS} patterns")
    return list(pattern.items())


def _modules(field: str, value: object) -> str | frozenset[str]:
    if isinstance(value, str):
        return ALL_LINEAR if value.lower() == ALL_LINEAR else value
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _refusal(field, value, "a list of names or a pattern")
    return frozenset(names)


def _layers(field: str, value: object) -> frozenset[int]:
    layers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(layer) is int for layer in layers):
        raise _refusal(field, value, "a layer's index or a list of them")
    return frozenset(layers)


def _layer_list_names(field: str, value: object) -> tuple[str, ...]:
    names = [] if not value else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in names):
        raise _refusal(field, value, "a module list's name or a list of them")
    return tuple(names)


def _named(field: str, modules: str | frozenset[str], paths: Sequence[str]) -> set[str]:
    if isinstance(modules, str):
        matches = _first_matches(field, "fullmatch", [modules], paths) if modules else [None] * len(paths)
        return {path for path, match in zip(paths, matches, strict=True) if match is not None}
    return {path for path in paths if not modules.isdisjoint(_suffixes(path))}


def _show_modules(modules: str | frozenset[str]) -> str:
    return show(modules if isinstance(modules, str) else sorted(modules))


def _suffixes(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[start:]) for start in range(len(names))]


def _resolve(
    field: str, pattern: Mapping[str, Number], default: Number, paths: Sequence[str]
) -> list[Number]:
    if not pattern:
        return [default] * len(paths)
    keys = list(pattern)
    matches = _first_matches(field, "match", [rf"(.*\.)?({key})$" for key in keys], paths)
    return [default if match is None else pattern[keys[match]] for match in matches]


# For each path, the index of the first regular expression that matches it.
_FIRST_MATCHES = """
import json, re, sys
how, regexes, paths = json.load(sys.stdin)
matchers = [getattr(re.compile(regex), how) for regex in regexes]
found = [next((i for i, match in enumerate(matchers) if match(path)), None) for path in paths]
json.dump(found, sys.stdout)
"""


def _first_matches(field: str, how: str, regexes: Sequence[str], paths: Sequence[str]) -> list[int | None]:
    """Matches in a process of its own: a hostile expression would hold the interpreter's lock for years."""
    try:
        done = subprocess.run(  # noqa: S603 -- the program is ours, the adapter's part is its input
            [sys.executable, "-I", "-S", "-c", _FIRST_MATCHES],
            input=json.dumps([how, regexes, paths]).encode(),
            capture_output=True,
            timeout=MAX_MATCH_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise AdapterFormatError(
            f"{CONFIG_NAME}: expected {field!r} to match the base model's modules within "
            f"{MAX_MATCH_SECONDS:.0f} s, found a pattern that takes longer"
        ) from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise AdapterFormatError(
            f"{CONFIG_NAME}: expected {field!r} to hold regular expressions, found a failure: {show(reason)}"
        ) from error
    found: list[int | None] = json.loads(done.stdout)
    return found
