from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from turret.v1 import inference_pb2, prompts_pb2
from turret_cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RULES = {"name": "rules", "revision": "r1", "prompt_tokens": 40}


@pytest.fixture(scope="session")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "python" / "scripted_server.py"
    spec = importlib.util.spec_from_file_location("scripted_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(script) -> Iterator[Any]:
    with script.ScriptedServer() as server:
        yield server


@pytest.fixture
def turret(server) -> Callable[..., Result]:
    def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner(env={"TURRET_SERVER": server.address}).invoke(
            main, ["prompts", *arguments], input=stdin
        )

    return run


def test_pin_sends_every_option(turret, server):
    result = turret("pin", "rules", "Be brief.", "--adapter", "pirate=0.5", "--cache-salt", "pepper")
    assert (result.exit_code, result.stderr) == (0, "")
    assert server.requests == [
        prompts_pb2.PinPromptRequest(
            name="rules",
            text="Be brief.",
            adapters=[inference_pb2.AdapterRef(name="pirate", weight=0.5)],
            cache_salt="pepper",
        )
    ]


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_pin_reads_standard_input(turret, server, arguments):
    turret("pin", "rules", *arguments, stdin="Be brief.\n\n")
    assert [request.text for request in server.requests] == ["Be brief.\n"]


def test_pin_reads_a_file(turret, server, tmp_path):
    (tmp_path / "rules.txt").write_bytes("Sois br\N{LATIN SMALL LETTER E WITH GRAVE}f.\n".encode())
    turret("pin", "rules", "--file", str(tmp_path / "rules.txt"))
    assert [request.text for request in server.requests] == ["Sois br\N{LATIN SMALL LETTER E WITH GRAVE}f."]


def test_a_file_that_is_no_text_is_refused(turret, server, tmp_path):
    (tmp_path / "rules.txt").write_bytes(b"\xff")
    result = turret("pin", "rules", "--file", str(tmp_path / "rules.txt"))
    assert result.exit_code == 2
    assert "not UTF-8" in result.stderr
    assert server.requests == []


def test_text_and_file_together_are_refused(turret, server, tmp_path):
    (tmp_path / "rules.txt").write_text("Be brief.")
    result = turret("pin", "rules", "Be brief.", "--file", str(tmp_path / "rules.txt"))
    assert result.exit_code == 2
    assert server.requests == []


def test_pin_and_list_print_what_is_pinned(turret):
    for arguments in (("pin", "rules", "Be brief."), ("list",)):
        human, machine = turret(*arguments), turret(*arguments, "--json")
        assert human.exit_code == machine.exit_code == 0
        assert human.stdout.splitlines() == ["NAME   REVISION  TOKENS", "rules  r1            40"]
        assert json.loads(machine.stdout) == RULES


def test_list_of_none(turret, server):
    server.prompts = ()
    assert turret("list").stderr == "no pinned prompts\n"
    assert turret("list", "--json").stdout == ""


def test_unpin(turret, server):
    assert turret("unpin", "rules").stdout == "unpinned rules\n"
    assert json.loads(turret("unpin", "rules", "--json").stdout) == {"name": "rules"}
    assert server.requests == [prompts_pb2.UnpinPromptRequest(name="rules")] * 2


def test_an_error_is_told_in_one_line(turret, server, script):
    server.failure = script.failure(
        script.grpc.StatusCode.NOT_FOUND, "no prompt is pinned", reason="PROMPT_NOT_FOUND"
    )
    result = turret("unpin", "rules")
    assert (result.exit_code, result.stderr) == (1, "error: no prompt is pinned (PROMPT_NOT_FOUND)\n")
