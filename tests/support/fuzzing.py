"""What the fuzzers of files have in common."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(
    max_examples=40,
    deadline=None,
    # The folder is written anew for each example, so a fixture of the whole test is safe.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

EDGES = st.sampled_from([0, 1, -1, 4, 5, 8, 512, 513, 4096, 4097, 2**31, 2**63, 2**64, -(2**64), 10**400])
SCALARS = st.none() | st.booleans() | st.integers() | EDGES | st.floats() | st.text(max_size=8)


def values(words: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Any JSON, with some words that mean something."""
    return st.recursive(
        SCALARS | words,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | words, inner, max_size=4)
        ),
        max_leaves=8,
    )


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with a few of them changed."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        # The beginning is where a byte means most.
        at = draw(st.integers(0, min(len(found), 1600)) | st.integers(0, len(found)))
        match draw(st.sampled_from(["set", "insert", "remove", "cut", "double"])):
            case "set":
                found[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "insert":
                found[at:at] = draw(st.binary(min_size=1, max_size=12))
            case "remove":
                del found[at : at + draw(st.integers(1, 40))]
            case "cut":
                del found[at:]
            case "double":
                found[at:at] = found[at : at + draw(st.integers(1, 40))]
    return bytes(found)


@st.composite
def edited(draw: st.DrawFn, value: Any, others: st.SearchStrategy[Any]) -> Any:
    """JSON with one of the others somewhere in it."""
    if isinstance(value, dict) and value and draw(st.integers(0, 7)):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: draw(edited(value[key], others))}
    if isinstance(value, list) and value and draw(st.integers(0, 7)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(edited(value[at], others)), *value[at + draw(st.integers(0, 1)) :]]
    return draw(others)
