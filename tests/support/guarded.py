"""Whether what a lock protects is used without it: a race that a test with threads sees only by chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_USES = (
    *("__getitem__", "__setitem__", "__delitem__", "__contains__", "__iter__", "__ior__"),
    *("get", "pop", "setdefault", "keys", "values", "items", "add", "discard", "clear"),
    *("append", "popleft", "popitem", "move_to_end"),
)


def guard(owner: Any, is_locked: Callable[[], bool], *names: str) -> None:
    """From now on, every use of these dicts, sets and deques of `owner` fails if the lock is not locked."""
    for name in names:
        inner = getattr(owner, name)
        assert not inner
        kind = type(inner)
        uses = {use: _guarded(getattr(kind, use), is_locked, name) for use in _USES if hasattr(kind, use)}
        setattr(owner, name, type(f"Guarded{kind.__name__}", (kind,), uses)())


def guard_calls(owner: Any, is_locked: Callable[[], bool], *names: str) -> None:
    """From now on, every call of these methods of `owner` fails if the lock is not locked."""
    for name in names:
        setattr(owner, name, _guarded(getattr(owner, name), is_locked, name))


def _guarded(use: Callable[..., Any], is_locked: Callable[[], bool], name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        assert is_locked(), f"{name} is used without its lock"
        return use(*arguments, **options)

    return call
