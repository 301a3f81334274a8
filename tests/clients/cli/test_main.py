from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click
import grpc
import pytest
from click.testing import CliRunner

from support import scripted_server as script
from turret_cli.main import main

if TYPE_CHECKING:
    from collections.abc import Iterator

HANG_S = 60
"""Only so that a failing test ends."""
TURRET = str(Path(sys.executable).with_name("turret"))
SERVER_ONLY = (
    "accelerate",
    "bitsandbytes",
    "grpc_health",
    "grpc_reflection",
    "numpy",
    "prometheus_client",
    "psutil",
    "safetensors",
    "torch",
    "transformers",
)


def commands(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from commands(child, (*path, name))


def params_of(command: click.Command) -> list[click.Parameter]:
    return command.get_params(click.Context(command))


COMMANDS = dict(commands(main))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_has_examples_with_options_that_exist(path):
    result = CliRunner().invoke(main, [*path, "--help"])
    assert result.exit_code == 0
    examples = re.findall(r"^    turret (.*?)(?: [<|].*)?$", result.stdout, re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example)
        assert tuple(words[: len(path)]) == path
        *_, command = (COMMANDS[tuple(words[:n])] for n in (1, 2) if tuple(words[:n]) in COMMANDS)
        known = {name for option in params_of(command) for name in option.opts}
        assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_and_command_says_what_it_does(path):
    assert COMMANDS[path].help
    assert all(option.help for option in params_of(COMMANDS[path]) if isinstance(option, click.Option))


@pytest.mark.parametrize("path", [path for path, each in COMMANDS.items() if isinstance(each, click.Group)])
def test_the_list_of_commands_has_whole_sentences(path):
    _, _, listed = CliRunner().invoke(main, [*path, "--help"]).stdout.partition("Commands:\n")
    assert listed
    assert "..." not in listed.partition("Examples:")[0]


def test_version():
    result = CliRunner().invoke(main, ["--version"])
    assert result.stdout.split()[-1] == version("turret")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--max-tokens", "0", "Hello"),
        ("generate", "--max-tokens", str(2**31), "Hello"),
        ("generate", "--temperature", "-1", "Hello"),
        ("generate", "--top-p", "0", "Hello"),
        ("generate", "--top-k", "-1", "Hello"),
        ("generate", "--seed", str(2**64), "Hello"),
        ("adapters", "load", "pirate"),
        ("adapters", "show"),
        ("no-such-command",),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(turret, server, arguments):
    result = turret(*arguments)
    assert (result.exit_code, server.requests) == (2, [])
    assert "Usage: " in result.stderr


@pytest.mark.parametrize(
    "arguments", [("generate", "Hello"), ("generate", "--json", "--no-stream", "Hello"), ("adapters", "list")]
)
def test_an_error_is_one_line_and_exits_1(turret, server, arguments):
    server.failure = script.failure(
        grpc.StatusCode.NOT_FOUND, "no adapter\npirate", reason="ADAPTER_NOT_FOUND"
    )
    result = turret(*arguments)
    assert (result.exit_code, result.stderr) == (1, "error: no adapter pirate (ADAPTER_NOT_FOUND)\n")


def test_an_internal_error_names_the_request_for_a_report(turret, server):
    server.failure = script.failure(
        grpc.StatusCode.INTERNAL, "the step failed", reason="INTERNAL", request_id="r-17"
    )
    result = turret("generate", "Hello")
    assert result.stderr == "error: the step failed; request id r-17 (INTERNAL)\n"


def test_no_server_there():
    result = CliRunner().invoke(main, ["adapters", "list", "--server", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot reach a Turret server at 127.0.0.1:1: no server listens")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("address", ["nowhere", "http://127.0.0.1:1", "127.0.0.1:99999", ""])
def test_an_address_that_is_none_is_wrong_usage(address):
    result = CliRunner().invoke(main, ["adapters", "list", "--server", address])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: the ")
    assert "HOST:PORT" in result.stderr or "from 1 to 65535" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("generate", "Hello", "--stop", ""), ("prompts", "pin", "a b", "Hello"), ("generate", "a\udcff")],
)
def test_an_argument_that_client_or_server_find_invalid_is_wrong_usage(turret, server, arguments):
    server.failure = script.failure(
        grpc.StatusCode.INVALID_ARGUMENT, "stop has 1 to 256 characters; found 0", reason="INVALID_REQUEST"
    )
    result = turret(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.endswith(" (INVALID_REQUEST)\n")


def run_turret(
    *arguments: str | bytes, server: str = "127.0.0.1:1", **options
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 -- our own command
        [TURRET, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=HANG_S,
        env=os.environ | {"TURRET_SERVER": server},
        **options,
    )


NO_UTF_8 = r"error: .*; found a lone surrogate.* \(INVALID_REQUEST\)\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--stop", "\udcff", "a"),
        ("generate", "--adapter", "\udcff", "a"),
        ("adapters", "load", "poet", "/\udcff"),
        ("adapters", "show", "\udcff"),
        ("prompts", "pin", "\udcff", "a"),
    ],
)
def test_an_argument_that_is_not_utf_8_is_one_line(turret, server, arguments):
    result = turret(*arguments)
    assert (result.exit_code, result.stdout, server.requests) == (2, "", [])
    assert re.fullmatch(NO_UTF_8, result.stderr)


def test_a_prompt_that_is_not_utf_8_is_one_line():
    done = run_turret(b"generate", b"\xff\xfe a", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(NO_UTF_8, done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "Hello"),
        ("adapters", "list"),
        ("generate", "--help"),
    ],
)
def test_a_full_output_is_one_line(server, arguments):
    with Path("/dev/full").open("w") as full:
        done = run_turret(*arguments, server=server.address, stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


def test_an_output_that_nobody_reads_ends_quietly(server):
    reader, writer = os.pipe()
    os.close(reader)
    done = run_turret("adapters", "list", server=server.address, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_tls_for_a_server_without_it_is_one_line(server):
    done = run_turret("adapters", "list", "--tls", server=server.address, stdout=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.endswith(": what listens there does not use TLS; leave the TLS options out\n")
    assert done.stderr.count("\n") == 1


def completion(instruction: str, **environment: str) -> str:
    return subprocess.run(  # noqa: S603 -- our own command
        [TURRET],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"_TURRET_COMPLETE": instruction} | environment,
    ).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_script_that_completes(shell):
    assert f"_TURRET_COMPLETE={shell}_complete" in completion(f"{shell}_source")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("turret gen", "generate"),
        ("turret serve --max-b", "--max-batch-tokens"),
    ],
)
def test_commands_and_options_are_completed(typed, expected):
    position = str(len(typed.split()) - 1)
    assert expected in completion("bash_complete", COMP_WORDS=typed, COMP_CWORD=position)


def test_server_option_beats_the_environment(server):
    result = CliRunner(env={"TURRET_SERVER": "127.0.0.1:1"}).invoke(
        main, ["adapters", "list", "--server", server.address]
    )
    assert result.exit_code == 0


# Their import fails, as where only the client is installed; then it tells what was imported.
CLIENT_ONLY = f"""
import atexit, sys
for name in {SERVER_ONLY}:
    sys.modules[name] = None
imported = lambda: {{name for name in sys.modules if name.startswith(("turret_server", "turret_adapters"))}}
atexit.register(lambda: print(sorted(imported()), file=sys.stderr))
from turret_cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("generate", "--help"),
        ("generate", "Hello"),
        ("adapters", "--help"),
        ("adapters", "list"),
        ("adapters", "show", "pirate"),
        ("adapters", "validate", "--help"),
        ("adapters", "convert", "--help"),
        ("prompts", "list"),
        ("bench", "--requests", "1", "--warm-up", "0"),
        ("tenants", "--help"),
    ],
    ids=" ".join,
)
def test_commands_import_nothing_of_the_server_and_need_only_the_client(server, arguments):
    run = subprocess.run(  # noqa: S603 -- our own code
        [sys.executable, "-c", CLIENT_ONLY, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TURRET_SERVER": server.address},
    )
    assert (run.returncode, run.stderr.splitlines()[-1]) == (0, "[]")
    assert run.stdout


def test_tenants_key_imports_only_what_makes_keys():
    run = subprocess.run(  # noqa: S603 -- our own code
        [sys.executable, "-c", CLIENT_ONLY, "tenants", "key", "acme"],
        capture_output=True,
        text=True,
        check=False,
    )
    expected = [
        "turret_server",
        "turret_server.config",
        "turret_server.errors",
        "turret_server.tenancy",
        "turret_server.tenancy.keys",
    ]
    assert (run.returncode, run.stderr) == (0, f"{expected}\n")


def test_serve_help_imports_only_the_settings():
    run = subprocess.run(  # noqa: S603 -- our own code
        [sys.executable, "-c", CLIENT_ONLY, "serve", "--help"], capture_output=True, text=True, check=False
    )
    expected = ["turret_server", "turret_server.config", "turret_server.errors"]
    assert (run.returncode, run.stderr) == (0, f"{expected}\n")


INTERRUPTED_WHILE_IMPORTING = """
import sys
from turret_cli import run

class Interrupting:
    def find_spec(self, name, *_):
        if name == "turret_cli.adapters":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
run()
"""


def test_ctrl_c_during_the_imports_ends_quietly():
    done = subprocess.run(  # noqa: S603 -- our own code
        [sys.executable, "-c", INTERRUPTED_WHILE_IMPORTING], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
