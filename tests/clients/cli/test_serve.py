from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from turret_adapters.errors import AdapterSourceError
from turret_cli.main import main
from turret_cli.serve import serve
from turret_server.config import SETTINGS, Group, ServerConfig
from turret_server.errors import ConfigError, GenerationFailedError


@pytest.fixture(autouse=True)
def _root_logger_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)


def run(*arguments: str, **environ: str) -> Result:
    return CliRunner(env=environ).invoke(main, ["serve", *arguments])


@pytest.fixture
def serving(monkeypatch) -> Callable[..., None]:
    """Replaces what `turret serve` runs."""

    def replace(function: Callable[[ServerConfig, object], None]) -> None:
        monkeypatch.setitem(sys.modules, "turret_server.app.run", SimpleNamespace(serve=function))

    return replace


@pytest.fixture
def served(serving) -> list[ServerConfig]:
    """What `turret serve` would have served."""
    configs: list[ServerConfig] = []
    serving(lambda config, _signals: configs.append(config))
    return configs


def test_defaults_are_those_of_the_config(served):
    assert run("--model", "m").exit_code == 0
    assert served == [ServerConfig(model="m")]


def arguments_of(tmp_path: Path) -> dict[str, tuple[str | None, Any]]:
    """Of every setting a value that is not the default: as on the command line, and as in the config."""
    file, folder = Path(__file__), tmp_path
    return {
        "model": ("m", "m"),
        "device": ("cpu", "cpu"),
        "dtype": ("float32", "float32"),
        "max_context": ("2000", 2000),
        "chat_template": (str(file), file),
        "adapters": (str(folder), folder),
        "watch": (None, True),
        "pin": ("a", ("a",)),
        "lazy_source": ("/l/{name}", "/l/{name}"),
        "memory": ("0.5", "0.5"),
        "host_memory": ("1GiB", "1GiB"),
        "store": (str(folder / "s"), folder / "s"),
        "store_size": ("2GiB", "2GiB"),
        "cache": (str(folder / "c"), folder / "c"),
        "listen": ("0.0.0.0:1", "0.0.0.0:1"),
        "http": ("127.0.0.1:1", "127.0.0.1:1"),
        "http_cors": ("https://a", ("https://a",)),
        "metrics": ("none", None),
        "vllm_metrics": (None, True),
        "grace": ("1.5", 1.5),
        "tenants": (str(file), file),
        "auth_hook": ("m:f", "m:f"),
        "allow_unauthenticated": (None, True),
        "allow_source": ("/srv", ("/srv",)),
        "tls_cert": (str(file), file),
        "tls_key": (str(file), file),
        "tls_client_ca": (str(file), file),
        "max_batch_tokens": ("100", 100),
        "max_batch_requests": ("3", 3),
        "max_step_seconds": ("0.25", 0.25),
        "max_queue": ("4", 4),
        "max_queue_tokens": ("5", 5),
        "log_level": ("debug", "debug"),
        "log_format": ("json", "json"),
        "usage_log": (str(folder / "u"), folder / "u"),
        "otel": (None, True),
    }


def test_every_flag_and_every_variable_reaches_its_field(served, tmp_path):
    values = arguments_of(tmp_path)
    flags, variables = [], {}
    for setting in SETTINGS:
        text, _ = values[setting.name]
        flags += [setting.flag, text] if text else [setting.flag]
        variables[setting.variable] = text or "true"
    expected = ServerConfig(**{name: value for name, (_, value) in values.items()})
    assert run(*flags).output == ""
    assert run(**variables).output == ""
    assert served == [expected, expected]


def test_repeatable_options_are_repeated(served):
    assert run("--model", "m", "--pin", "a", "--pin", "b", "--allow-source", "/x,y").exit_code == 0
    assert (served[0].pin, served[0].allow_source) == (("a", "b"), ("/x,y",))


def test_flags_go_before_the_environment_and_that_before_the_file(served, tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('model = "f"\nmax_queue = 3\nmax_queue_tokens = 3\nwatch = true\nadapters = "/"\n')
    environ = {"TURRET_CONFIG": str(file), "TURRET_MAX_QUEUE": "2", "TURRET_MAX_QUEUE_TOKENS": "2"}
    assert run("--max-queue", "1", **environ).output == ""
    assert run("--config", str(file)).output == ""
    assert served == [
        ServerConfig(model="f", max_queue=1, max_queue_tokens=2, watch=True, adapters=Path("/")),
        ServerConfig(model="f", max_queue=3, max_queue_tokens=3, watch=True, adapters=Path("/")),
    ]


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        ((), {}, "--model is missing: "),
        (
            ("--model", "m", "--device", "abacus"),
            {},
            "--device abacus: expected auto, cpu, cuda, or a GPU such as cuda:1 (",
        ),
        (("--model", "m", "--memory", "lots"), {}, "--memory lots: expected a size such as 2GiB"),
        (("--model", "m"), {"TURRET_GRACE": "soon"}, "TURRET_GRACE soon: expected a number of at least 0 ("),
        (
            ("--model", "m"),
            {"TURRET_GRASE": "1"},
            "unknown variable TURRET_GRASE; the nearest is TURRET_GRACE",
        ),
    ],
)
def test_a_wrong_setting_is_an_error_of_one_line_that_exits_2(served, arguments, environ, said):
    result = run(*arguments, **environ)
    assert (result.exit_code, result.stdout, served) == (2, "", [])
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.endswith(" (INVALID_CONFIG)\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--no-such-option",), "No such option"),
        (("--config", "/no/such/file"), "/no/such/file"),
        (("--max-queue",), "requires an argument"),
    ],
)
def test_wrong_usage_exits_2(served, arguments, said):
    result = run(*arguments)
    assert (result.exit_code, served) == (2, [])
    assert said in result.stderr


@pytest.mark.parametrize(
    ("error", "reason", "status"),
    [
        (ConfigError("--memory 2GiB: more than is free"), "INVALID_CONFIG", 2),
        (GenerationFailedError("--memory 2GiB: more than is free"), "GENERATION_FAILED", 1),
        (AdapterSourceError("--memory 2GiB: more than is free"), "ADAPTER_SOURCE_NOT_FOUND", 1),
    ],
)
def test_an_error_of_the_server_is_one_line_and_exits_2_if_a_setting_is_wrong(serving, error, reason, status):
    def fail(*_: object) -> None:
        raise error

    serving(fail)
    result = run("--model", "m", "--memory", "2GiB")
    expected = f"error: --memory 2GiB: more than is free ({reason})\n"
    assert (result.exit_code, result.stderr) == (status, expected)


def test_an_error_of_the_start_names_the_setting_as_it_was_given(serving):
    def fail(*_: object) -> None:
        raise ConfigError("--memory 2GiB: more than is free")

    serving(fail)
    result = run("--model", "m", TURRET_MEMORY="2GiB")
    assert result.stderr == "error: TURRET_MEMORY 2GiB: more than is free (INVALID_CONFIG)\n"


def test_the_signals_are_handled_while_it_serves(serving):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    during = []
    serving(lambda *_: during.extend(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))))
    run("--model", "m")
    assert len(during) == 2
    assert not set(during) & set(before)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_it_logs_at_its_level_and_in_its_format(served, monkeypatch):
    logged = []
    monkeypatch.setattr("turret_server.logs.set_up", lambda *given: logged.append(given))
    run("--model", "m", "--log-level", "warning", "--log-format", "json")
    assert logged == [("warning", "json")]
    assert served


def test_help_has_a_section_for_every_group_with_its_settings():
    sections: dict[str, list[str]] = {}
    for line in run("--help").stdout.splitlines():
        if re.fullmatch(r"\w.*:", line):
            sections[line.removesuffix(":")] = []
        elif sections and (flag := re.match(r"  (--[a-z-]+)", line)):
            list(sections.values())[-1].append(flag[1])
    assert list(sections) == ["Configuration", *Group, "Other"]
    for group in Group:
        assert sections[group] == [setting.flag for setting in SETTINGS if setting.group is group]


def test_help_says_what_every_setting_does_and_its_default():
    words = " ".join(run("--help").stdout.split())
    for setting in SETTINGS:
        default = f"  [default: {setting.default_text}]" if setting.default_text else ""
        assert " ".join(f"{setting.help}{default}".split()) in words
    assert "A store belongs to one server" in words


def test_the_options_are_made_once():
    context = click.Context(serve)
    names = [option.name for option in serve.get_params(context)]
    assert names == [option.name for option in serve.get_params(context)]
    assert names == ["config", *(setting.name for setting in SETTINGS), names[-1]]


# Their import fails, as where the package is not installed.
WITHOUT = """
import sys
for name in ("torch", "transformers", "prometheus_client"):
    sys.modules[name] = None
from turret_cli.main import main
main(sys.argv[1:])
"""


def test_it_says_what_to_install():
    done = subprocess.run(  # noqa: S603 -- our own code
        [sys.executable, "-c", WITHOUT, "serve", "--model", "m"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    starting, error = done.stderr.splitlines()
    assert starting.endswith("starting: model m, address 127.0.0.1:50051")
    assert error.startswith("error: ")
    install = "in Turret's source folder, install it with: pip install"
    assert error.endswith(f' is not installed; {install} ".[server]"')
