from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from click.testing import Result

from support import scripted_server as script
from turret.v1 import inference_pb2, prompts_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

RULES = {"name": "rules", "revision": "r1", "prompt_tokens": 40}


@pytest.fixture
def prompts(turret) -> Callable[..., Result]:
    return functools.partial(turret, "prompts")


def test_pin_sends_every_option(prompts, server):
    result = prompts(
        *("pin", "rules", "Be brief.", "--adapter", "pirate=0.5"),
        *("--cache-salt", "pepper", "--no-add-special-tokens"),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert server.requests == [
        prompts_pb2.PinPromptRequest(
            name="rules",
            text="Be brief.",
            adapters=[inference_pb2.AdapterRef(name="pirate", weight=0.5)],
            cache_salt="pepper",
            add_special_tokens=False,
        )
    ]


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_pin_reads_standard_input(prompts, server, arguments):
    prompts("pin", "rules", *arguments, stdin="Be brief.\n\n")
    assert [request.text for request in server.requests] == ["Be brief.\n"]


def test_pin_names_its_argument_at_a_terminal(prompts, server, monkeypatch):
    monkeypatch.setattr("turret_cli.common.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    result = prompts("pin", "rules")
    assert (result.exit_code, server.requests) == (2, [])
    assert "Give TEXT, or pipe it in." in result.stderr


def test_pin_reads_a_file(prompts, server, tmp_path):
    (tmp_path / "rules.txt").write_bytes("Sois br\N{LATIN SMALL LETTER E WITH GRAVE}f.\n".encode())
    prompts("pin", "rules", "--file", str(tmp_path / "rules.txt"))
    assert [request.text for request in server.requests] == ["Sois br\N{LATIN SMALL LETTER E WITH GRAVE}f."]


def test_a_file_that_is_no_text_is_refused(prompts, server, tmp_path):
    (tmp_path / "rules.txt").write_bytes(b"\xff")
    result = prompts("pin", "rules", "--file", str(tmp_path / "rules.txt"))
    assert result.exit_code == 2
    assert "not UTF-8" in result.stderr
    assert server.requests == []


def test_text_and_file_together_are_refused(prompts, server, tmp_path):
    (tmp_path / "rules.txt").write_text("Be brief.")
    result = prompts("pin", "rules", "Be brief.", "--file", str(tmp_path / "rules.txt"))
    assert result.exit_code == 2
    assert server.requests == []


def test_pin_and_list_print_what_is_pinned(prompts):
    for arguments in (("pin", "rules", "Be brief."), ("list",)):
        human, machine = prompts(*arguments), prompts(*arguments, "--json")
        assert human.exit_code == machine.exit_code == 0
        assert human.stdout.splitlines() == ["NAME   REVISION  TOKENS", "rules  r1            40"]
        assert json.loads(machine.stdout) == RULES


def test_list_of_none(prompts, server):
    server.prompts = ()
    assert prompts("list").stderr == "no pinned prompts\n"
    assert prompts("list", "--json").stdout == ""


def test_unpin(prompts, server):
    assert prompts("unpin", "rules").stdout == "unpinned rules\n"
    assert json.loads(prompts("unpin", "rules", "--json").stdout) == {"name": "rules"}
    assert server.requests == [prompts_pb2.UnpinPromptRequest(name="rules")] * 2


def test_an_error_is_printed_on_one_line(prompts, server):
    server.failure = script.failure(
        script.grpc.StatusCode.NOT_FOUND, "no prompt is pinned", reason="PROMPT_NOT_FOUND"
    )
    result = prompts("unpin", "rules")
    assert (result.exit_code, result.stderr) == (1, "error: no prompt is pinned (PROMPT_NOT_FOUND)\n")
