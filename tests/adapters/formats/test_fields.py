"""The types and limits of a config's fields."""

from __future__ import annotations

import math
from typing import Any

import pytest

from turret_adapters.errors import AdapterFormatError
from turret_adapters.formats.fields import MAX_NUMBER, MAX_PATTERNS, Fields, Use, show

MOST = 12


@pytest.mark.parametrize("value", [MAX_NUMBER, -MAX_NUMBER, int(MAX_NUMBER), 0, 0.5])
def test_a_number_is_accepted_up_to_the_limit_and_becomes_a_float(value: float) -> None:
    found = Fields({"lora_alpha": value}).number("lora_alpha", default=1)
    assert found == value
    assert type(found) is float


@pytest.mark.parametrize(
    "value",
    [math.nextafter(MAX_NUMBER, math.inf), -math.nextafter(MAX_NUMBER, math.inf), math.nan, True, "1", None],
)
def test_another_number_is_refused_by_the_fields_name(value: object) -> None:
    with pytest.raises(AdapterFormatError, match="'lora_alpha' to be a number of at most 1000000"):
        Fields({"lora_alpha": value}).number("lora_alpha", default=1)


@pytest.mark.parametrize("value", [1, MOST])
def test_an_integer_is_accepted_from_1_to_the_limit(value: int) -> None:
    assert Fields({"r": value}).integer("r", most=MOST) == value


@pytest.mark.parametrize("value", [0, -1, MOST + 1, True, 2.0, "2", None])
def test_another_integer_is_refused_by_the_fields_name(value: object) -> None:
    with pytest.raises(AdapterFormatError, match=f"'r' to be an integer from 1 to {MOST}, found"):
        Fields({"r": value}).integer("r", most=MOST, default=3)


def test_a_default_is_that_of_an_absent_field() -> None:
    fields = Fields({})
    assert fields.integer("r", most=MOST, default=3) == 3
    assert fields.number("lora_alpha", default=2.5) == 2.5
    assert (fields.flag("use_dora"), fields.flag("save_projection", default=True)) == (False, True)
    with pytest.raises(AdapterFormatError, match="'r' to be an integer from 1"):
        fields.integer("r", most=MOST)


def test_a_flag_that_is_null_has_its_default_and_false_is_false() -> None:
    fields = Fields({"empty": None, "no": False, "yes": True})
    assert fields.flag("empty", default=True)
    assert not fields.flag("empty")
    assert not fields.flag("no", default=True)
    assert fields.flag("yes")


@pytest.mark.parametrize("value", [None, 1, 1 << 40])
def test_a_size_may_be_null_and_has_no_limit(value: int | None) -> None:
    assert Fields({"token_dim": value}).optional_size("token_dim") == value


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2"])
def test_another_size_is_refused(value: object) -> None:
    with pytest.raises(AdapterFormatError, match="'token_dim' to be a positive integer, found"):
        Fields({"token_dim": value}).optional_size("token_dim")


def test_patterns_are_in_the_configs_order_and_no_more_than_the_limit() -> None:
    values = {str(index): index for index in reversed(range(MAX_PATTERNS))}
    assert Fields({"rank_pattern": values}).patterns("rank_pattern") == list(values.items())
    values["one more"] = 1
    with pytest.raises(AdapterFormatError, match=f"'rank_pattern' to be an object of at most {MAX_PATTERNS}"):
        Fields({"rank_pattern": values}).patterns("rank_pattern")


@pytest.mark.parametrize("values", [{}, {"p": None}, {"p": {}}])
def test_absent_patterns_are_none(values: dict[str, Any]) -> None:
    assert Fields(values).patterns("p") == []


def test_names_that_are_absent_differ_from_an_empty_list() -> None:
    fields = Fields({"null": None, "empty": [], "some": ["b", "a"]})
    assert (fields.names("absent"), fields.names("null")) == (None, None)
    assert (fields.names("empty"), fields.names("some")) == (frozenset(), {"a", "b"})


def test_every_field_is_checked() -> None:
    fields = Fields({"read": 1, "empty": None, "no": False, "allowed": "x", "unknown": 2})
    policy = {"read": Use.READ, "allowed": ("y", "x")}
    with pytest.raises(AdapterFormatError, match=r"'unknown' to be absent, .* from a newer peft.* found 2"):
        fields.check(policy)
    with pytest.raises(AdapterFormatError, match="'unknown' to be empty, since it is not supported, found 2"):
        fields.check(policy | {"unknown": ()})


def test_an_unknown_field_names_the_peft_that_wrote_it() -> None:
    fields = Fields({"peft_version": "0.99.0", "new": {"a": 1}})
    with pytest.raises(AdapterFormatError, match=r"'new' to be absent, .* may be from peft '0\.99\.0'"):
        fields.check({"peft_version": Use.INERT})


@pytest.mark.parametrize("value", ["x" * 5000, "\n\x00", {"a": ["b" * 500] * 500}, [[[[[[[[1]]]]]]]] * 50])
def test_what_messages_show_of_a_value_is_short_and_printable(value: object) -> None:
    assert len(show(value)) < 1000
    assert show(value).isprintable()
