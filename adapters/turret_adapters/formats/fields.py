"""`adapter_config.json`: a JSON object with a policy for every field.

A field that changes the result and is not supported, or that is unknown, must be empty; otherwise the adapter
is refused, naming the field.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from enum import Enum
from reprlib import Repr
from typing import Any, Final, TypeAlias

from turret_adapters.errors import AdapterFormatError
from turret_adapters.formats.files import CONFIG_NAME

MAX_NUMBER = 1e6
MAX_PATTERNS = 4096


class Use(Enum):
    """How a field is used. A policy can also be a tuple of the values that are allowed besides empty ones."""

    READ = "read"
    INERT = "inert"


REFUSED: Final = ()

Policy: TypeAlias = Use | tuple[object, ...]

COMMON: Mapping[str, Policy] = {
    "auto_mapping": Use.INERT,
    "base_model_name_or_path": Use.INERT,
    "inference_mode": Use.INERT,
    "peft_type": Use.READ,
    "peft_version": Use.INERT,
    "revision": Use.INERT,
    "task_type": Use.READ,
}


class Fields:
    """The fields of a config, with the types that peft gives them.

    Every method raises AdapterFormatError for a field with another type or value.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def check(self, policy: Mapping[str, Policy]) -> None:
        """Checks every field against its policy."""
        for name, value in self._values.items():
            if value is None or value is False or value in ([], {}):
                continue
            if name not in policy:
                raise self.refusal(name, f"absent, since this version does not know it{self._version()}")
            served = policy[name]
            if isinstance(served, Use):
                continue
            # JSON's true and 1 are different values, Python's are not.
            if not any(type(value) is type(other) and value == other for other in served):
                values = f"empty, {', '.join(map(repr, served))}"
                raise self.refusal(name, values if served else "empty, since it is not supported")

    def _version(self) -> str:
        version = self._values.get("peft_version")
        found = f"peft {show(version)}" if isinstance(version, str) else "a newer peft"
        return f" (the file may be from {found}; remove the field if it does not change the result)"

    def integer(self, name: str, *, most: int, default: int | None = None) -> int:
        return integer(name, self._values.get(name, default), most)

    def optional_size(self, name: str) -> int | None:
        value = self.get(name)
        return None if value is None else integer(name, value, None)

    def number(self, name: str, *, default: float) -> float:
        return number(name, self._values.get(name, default))

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refusal(name, "true or false")
        return value

    def names(self, name: str) -> frozenset[str] | None:
        """A list of names; None if the field is absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refusal(name, "a list of names")
        return frozenset(value)

    def patterns(self, name: str) -> list[tuple[str, object]]:
        """The items of an object, in their order."""
        value = {} if self.get(name) is None else self.get(name)
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            raise self.refusal(name, f"an object of at most {MAX_PATTERNS} patterns")
        return list(value.items())

    def refusal(self, name: str, expected: str) -> AdapterFormatError:
        return refusal(name, self.get(name), expected)


def parse_object(data: bytes, file_name: str) -> dict[str, Any]:
    """Parses a JSON object in UTF-8 without repeated keys.

    Args:
        data: the JSON.
        file_name: for messages.

    Raises:
        AdapterFormatError: it is something else.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise AdapterFormatError(
            f"{file_name}: expected a JSON object, found one nested too deeply"
        ) from error
    except ValueError as error:
        raise AdapterFormatError(
            f"{file_name}: expected a JSON object, found invalid JSON ({error})"
        ) from error
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{file_name}: expected a JSON object, found {show(value)}")
    return value


def parse_file(data: bytes, file_name: str) -> dict[str, Any]:
    """`parse_object` of a file that people edit."""
    # Editors on Windows begin a file in UTF-8 with a mark.
    return parse_object(data.removeprefix(codecs.BOM_UTF8), file_name)


def integer(field: str, value: object, most: int | None) -> int:
    """Returns a positive integer.

    Raises:
        AdapterFormatError: the value is something else, or larger than `most`.
    """
    if type(value) is not int or value < 1 or (most is not None and value > most):
        raise refusal(field, value, "a positive integer" if most is None else f"an integer from 1 to {most}")
    return value


def number(field: str, value: object) -> float:
    """Returns a number.

    Raises:
        AdapterFormatError: the value is something else, or above `MAX_NUMBER` in size.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_NUMBER:
        raise refusal(field, value, f"a number of at most {MAX_NUMBER:.0f}")
    return float(value)


def refusal(field: str, value: object, expected: str, file_name: str = CONFIG_NAME) -> AdapterFormatError:
    """The error for a config field with another value than expected."""
    return AdapterFormatError(f"{file_name}: expected {show(field)} to be {expected}, found {show(value)}")


def show(value: object) -> str:
    """A value from a file, printable and short."""
    return _SHORT.repr(value)


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 160


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {show(key)} is repeated")
        value[key] = item
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
