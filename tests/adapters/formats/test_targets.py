"""Regular expressions of an adapter are matched in a process of its own, which can fail in several ways.

What they and the other fields select is compared with peft in `test_peft.py`.
"""

from __future__ import annotations

import pytest

from turret_adapters.errors import AdapterFormatError
from turret_adapters.formats import targets
from turret_adapters.formats.targets import match_modules

PATHS = ["layers.0.q_proj", "layers.1.q_proj", "layers.1.up_proj"]


def test_a_process_that_does_not_answer_is_a_pattern_that_takes_too_long(monkeypatch):
    monkeypatch.setattr(targets, "_MAX_WAIT_SECONDS", 0.0)
    with pytest.raises(
        AdapterFormatError, match=r"'exclude_modules' to match .* a pattern that takes longer"
    ):
        match_modules("exclude_modules", r".*q_proj", PATHS)


def test_a_pattern_that_is_none_is_refused_with_the_reason():
    with pytest.raises(
        AdapterFormatError, match=r"'target_modules' to hold regular .*missing \), unt"
    ) as error:
        match_modules("target_modules", "(q_proj", PATHS)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        ("", []),
        (frozenset(), []),
        (frozenset({"q_proj"}), PATHS[:2]),
        (frozenset({"1.q_proj", "layers.1.up_proj"}), PATHS[1:]),
        (frozenset({"_proj", "layers", ""}), []),
    ],
)
def test_names_match_whole_components_and_an_empty_pattern_nothing(modules, found):
    assert sorted(match_modules("target_modules", modules, PATHS)) == found
