"""Answers that have a form, from a server over a socket."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from turret_client import Client, Generation, InvalidArgumentError

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", None, "é\n"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
FORMS = {
    "json_schema": json.dumps(SCHEMA),
    "regex": "[a-c]{3}-[0-9]{1,2}",
    "choice": ["yes", "no", "perhaps"],
    "grammar": 'start: "<" inner ">"\ninner: /[a-z]/',
}


def is_kept(form: str, text: str) -> bool:
    match form:
        case "json_schema":
            jsonschema.validate(json.loads(text), SCHEMA)
            return True
        case "regex":
            return re.fullmatch(FORMS["regex"], text) is not None
        case "choice":
            return text in FORMS["choice"]
        case _:
            return re.fullmatch("<[a-z]>", text) is not None


def answers(client: Client, seeds: range) -> list[tuple[str, Generation]]:
    """One of each form and each seed, all at once, with a neighbour that has no form."""

    def ask(form: str, seed: int) -> Generation:
        options = {form: FORMS[form]} if form else {}
        return client.generate("a prompt", temperature=1.5, seed=seed, max_tokens=40, **options)

    asks = [(form, seed) for seed in seeds for form in ("", *FORMS)]
    with ThreadPoolExecutor(len(asks)) as pool:
        found = pool.map(lambda each: ask(*each), asks)
        return [(form, answer) for (form, _), answer in zip(asks, found, strict=True)]


def test_answers_keep_their_forms_in_one_batch(client: Client) -> None:
    found = answers(client, range(4))
    for form, answer in found:
        if form:
            assert answer.finish_reason == "stop"
            assert answer.stop_token_id is None or not answer.text.endswith("</s>")
            assert is_kept(form, answer.text)
    assert len({answer.text for form, answer in found if form == "json_schema"}) > 1


def test_a_form_changes_no_neighbour_and_no_batch_changes_a_form(client: Client) -> None:
    together = [answer.text for _, answer in answers(client, range(2))]
    alone = [answer.text for seed in range(2) for _, answer in answers(client, range(seed, seed + 1))]
    assert together == alone


def test_every_choice_keeps_the_form(client: Client) -> None:
    found = client.generate("a", n=3, temperature=1.0, seed=1, regex="[ab]{4}")
    texts = [choice.text for choice in found.choices]
    assert len(texts) == 3
    assert all(re.fullmatch("[ab]{4}", text) for text in texts)


def test_an_invalid_form_is_refused_by_name(client: Client) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"json_schema is invalid: Unimplemented keys: \[\"not\"\]"
    ):
        client.generate("a", json_schema='{"not": {}}')
    with pytest.raises(InvalidArgumentError, match="one form"):
        client.generate("a", json_object=True, regex="a")
