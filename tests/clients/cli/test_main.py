from __future__ import annotations

import importlib.util
import json
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
import grpc
import pytest
from click.testing import CliRunner, Result

from support.adapter_files import write_folder
from turret.v1 import adapters_pb2, inference_pb2
from turret_cli.main import main
from turret_client import Client
from turret_server.config import ServerConfig, default_cache
from turret_server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
        return CliRunner(env={"TURRET_SERVER": server.address}).invoke(main, arguments, input=stdin)

    return run


def commands(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from commands(child, (*path, name))


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
        known = {name for option in command.params for name in option.opts}
        assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_and_command_says_what_it_does(path):
    assert COMMANDS[path].help
    assert all(option.help for option in COMMANDS[path].params if isinstance(option, click.Option))


def test_version():
    result = CliRunner().invoke(main, ["--version"])
    assert result.stdout.split()[-1] == version("turret")


def test_generate_prints_the_text(turret, server):
    result = turret("generate", "Hello")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Ahoy, mátey\n", "")
    assert server.requests == [inference_pb2.GenerateRequest(text="Hello")]


def test_generate_no_stream(turret):
    assert turret("generate", "--no-stream", "Hello").stdout == "Ahoy, mátey\n"


def test_generate_json_is_the_chunks(turret, server):
    lines = turret("generate", "--json", "Hello").stdout.splitlines()
    with Client(server.address) as client:
        assert [json.loads(line) for line in lines] == [
            json.loads(json.dumps(asdict(chunk))) for chunk in client.stream("Hello")
        ]


def test_generate_no_stream_json_is_one_object(turret):
    [line] = turret("generate", "--no-stream", "--json", "Hello").stdout.splitlines()
    assert json.loads(line) == {
        "text": "Ahoy, mátey",
        "token_ids": [7, 8, 9, 2],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "cached_tokens": 2, "generated_tokens": 4},
        "revision": "r1",
    }


def test_generate_sends_every_option(turret, server):
    turret(
        *("generate", "--adapter", "pirate", "--max-tokens", "5", "--temperature", "0.5", "--top-p", "0.25"),
        *("--top-k", "40", "--seed", "0", "--stop", "\n", "--stop", "END"),
        *("--tenant", "acme", "--priority", "-3", "--cache-salt", "pepper", "Hello"),
    )
    assert server.tenants == ["acme"]
    assert server.requests == [
        inference_pb2.GenerateRequest(
            text="Hello",
            adapters=[inference_pb2.AdapterRef(name="pirate", weight=1)],
            max_tokens=5,
            temperature=0.5,
            top_p=0.25,
            top_k=40,
            seed=0,
            stop=["\n", "END"],
            priority=-3,
            cache_salt="pepper",
        )
    ]


@pytest.mark.parametrize(
    ("value", "ref"),
    [
        ("pirate", {"name": "pirate", "weight": 1}),
        ("pirate=0.25", {"name": "pirate", "weight": 0.25}),
        ("many#2", {"name": "many", "weight": 1, "task": 2}),
        ("many#0=-1", {"name": "many", "weight": -1, "task": 0}),
    ],
)
def test_an_adapter_may_have_a_task_and_a_weight(turret, server, value, ref):
    turret("generate", "--adapter", "first", "--adapter", value, "Hello")
    assert list(server.requests[0].adapters)[1:] == [inference_pb2.AdapterRef(**ref)]


@pytest.mark.parametrize("value", ["pirate=much", "many#one"])
def test_a_task_or_a_weight_that_is_no_number_is_a_usage_error(turret, value):
    result = turret("generate", "--adapter", value, "Hello")
    assert result.exit_code == 2
    assert "NAME[#TASK][=WEIGHT]" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("-",)])
@pytest.mark.parametrize(
    ("stdin", "prompt"),
    [("Ahoy\n", "Ahoy"), ("Ahoy", "Ahoy"), ("Ah\n\u00f6y\n\n", "Ah\n\u00f6y\n"), ("", "")],
)
def test_generate_reads_standard_input(turret, server, arguments, stdin, prompt):
    turret("generate", *arguments, stdin=stdin)
    assert [request.text for request in server.requests] == [prompt]


def test_generate_asks_for_a_prompt_at_a_terminal(turret, server, monkeypatch):
    monkeypatch.setattr(
        "turret_cli.generate.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    )
    result = turret("generate")
    assert (result.exit_code, server.requests) == (2, [])
    assert "PROMPT" in result.stderr


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
        ("serve",),
        ("serve", "--model", "m", "--device", "abacus"),
        ("serve", "--model", "m", "--adapters", "/no/such/folder"),
        ("no-such-command",),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(turret, server, arguments):
    result = turret(*arguments)
    assert (result.exit_code, server.requests) == (2, [])
    assert "Usage: " in result.stderr


def test_standard_input_that_is_no_text(turret):
    result = turret("generate", stdin=b"\xff\xfe")
    assert result.exit_code == 2
    assert "UTF-8" in result.stderr


@pytest.mark.parametrize(
    "arguments", [("generate", "Hello"), ("generate", "--json", "--no-stream", "Hello"), ("adapters", "list")]
)
def test_an_error_is_one_line_and_exits_1(turret, server, script, arguments):
    server.failure = script.failure(
        grpc.StatusCode.NOT_FOUND, "no adapter\npirate", reason="ADAPTER_NOT_FOUND"
    )
    result = turret(*arguments)
    assert (result.exit_code, result.stderr) == (1, "error: no adapter pirate (ADAPTER_NOT_FOUND)\n")


def test_an_error_after_some_text_begins_its_own_line(turret, server, script):
    server.failure = script.failure(grpc.StatusCode.INTERNAL, "broke", reason="GENERATION_FAILED")
    result = turret("generate", "Hello")
    assert result.output == "Ahoy, \nerror: broke (GENERATION_FAILED)\n"


def test_no_server_there():
    result = CliRunner().invoke(main, ["adapters", "list", "--server", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot reach a Turret server at 127.0.0.1:1 (")
    assert result.stderr.count("\n") == 1


def test_server_option_beats_the_environment(server):
    result = CliRunner(env={"TURRET_SERVER": "127.0.0.1:1"}).invoke(
        main, ["adapters", "list", "--server", server.address]
    )
    assert result.exit_code == 0


def test_list_is_an_aligned_table(turret, server, script):
    server.adapters = [
        script.BROKEN,
        script.PIRATE,
        adapters_pb2.Adapter(
            name="soft",
            revision="abc",
            state=adapters_pb2.ADAPTER_STATE_STAGED,
            method=adapters_pb2.ADAPTER_METHOD_PROMPT_TUNING,
            num_parameters=999,
            num_virtual_tokens=20,
            file_bytes=1023,
            arena_bytes=1024,
        ),
    ]
    assert turret("adapters", "list").stdout.splitlines() == [
        "NAME    STATE     METHOD         REVISION      RANK  VIRTUAL  PARAMETERS      FILE    ARENA  ACTIVE",
        "broken  failed    unspecified    -                -        -           0       0 B      0 B       0",
        "pirate  resident  lora           0123456789ab    16        -        4.5M  17.2 MiB  9.0 MiB       2",
        "soft    staged    prompt_tuning  abc              -       20         999    1023 B  1.0 KiB       0",
    ]


def test_list_json_is_an_object_a_line(turret, server):
    server.adapters = [adapters_pb2.Adapter(name=f"a{index}") for index in range(5)]
    lines = turret("adapters", "list", "--json").stdout.splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["a0", "a1", "a2", "a3", "a4"]


def test_list_of_nothing(turret, server):
    server.adapters = []
    assert turret("adapters", "list").output == "no adapters\n"
    assert turret("adapters", "list", "--json").output == ""


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (
            ("load", "pirate", "/srv/pirate"),
            adapters_pb2.LoadAdapterRequest(name="pirate", path="/srv/pirate"),
        ),
        (("unload", "pirate"), adapters_pb2.UnloadAdapterRequest(name="pirate")),
        (("show", "pirate"), adapters_pb2.GetAdapterRequest(name="pirate")),
        (("rollback", "pirate"), adapters_pb2.RollbackAdapterRequest(name="pirate")),
        (
            ("rollback", "pirate", "01234567"),
            adapters_pb2.RollbackAdapterRequest(name="pirate", revision="01234567"),
        ),
        (
            ("split", "pirate", "01234567", "--percent", "10"),
            adapters_pb2.SetTrafficSplitRequest(name="pirate", revision="01234567", percent=10),
        ),
        (
            ("split", "pirate", "--percent", "0"),
            adapters_pb2.SetTrafficSplitRequest(name="pirate", percent=0),
        ),
    ],
)
def test_load_unload_show_rollback_and_split_print_the_adapter(turret, server, arguments, request_):
    human = turret("adapters", *arguments)
    machine = turret("adapters", *arguments, "--json")
    assert human.exit_code == machine.exit_code == 0
    assert server.requests == [request_, request_]
    assert "9.0 MiB" in human.stdout
    with Client(server.address) as client:
        assert json.loads(machine.stdout) == json.loads(json.dumps(asdict(client.get_adapter("pirate"))))


def test_show_tells_all(turret):
    assert turret("adapters", "show", "pirate").stdout.splitlines() == [
        "name            pirate",
        "state           resident",
        "method          lora",
        "revision        0123456789abcdef0123456789abcdef",
        "rank            16",
        "virtual tokens  -",
        "parameters      4,500,000",
        "file            17.2 MiB",
        "arena           9.0 MiB",
        "active          2",
        "draining        fedcba, abcdef",
        "split           10 % go to 4567",
        "history         1970-01-01 00:00:01+00:00  0123  /srv/pirate",
    ]


def test_upload_sends_a_folder(turret, server, tmp_path):
    write_folder(tmp_path, b"tensors")
    result = turret("adapters", "upload", "pirate", str(tmp_path), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["name"] == "pirate"
    assert server.uploaded == b"tensors"
    (tmp_path / "adapter_model.safetensors").unlink()
    result = turret("adapters", "upload", "pirate", str(tmp_path))
    assert result.exit_code == 2
    assert "adapter_model.safetensors: no such file" in result.stderr


def test_watch_prints_each_change(turret):
    assert turret("adapters", "watch").stdout.splitlines() == [
        "pirate  resident  0123456789ab  draining fedcba, abcdef",
        "broken  failed  adapter_config.json is not JSON",
    ]
    printed = turret("adapters", "watch", "--json").stdout.splitlines()
    assert [json.loads(line)["name"] for line in printed] == ["pirate", "broken"]


@pytest.mark.parametrize("options", [(), ("--no-stream",), ("--json",)], ids=" ".join)
def test_ctrl_c_cancels_the_request(server, options):
    server.hold = True
    # Whoever runs the tests in the background may have told them to ignore it, and so their children.
    heeding = ("/usr/bin/env", "--default-signal=INT")
    with subprocess.Popen(  # noqa: S603 -- our own command
        [*heeding, TURRET, "generate", "--server", server.address, *options, "Hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert server.began.wait(HANG_S)
        if "--no-stream" not in options:
            # The text comes before the generation has ended, though a pipe takes it.
            assert process.stdout.read(6) == (b'{"text' if options else b"Ahoy, ")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=HANG_S)
    assert server.ended.wait(HANG_S)
    assert (process.returncode, stderr) == (130, b"")


def test_a_closed_pipe_cancels_the_request(server):
    """As in `turret generate … | head -c1`."""
    server.endless = True
    with subprocess.Popen(  # noqa: S603 -- our own command
        [TURRET, "generate", "--server", server.address, "Hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        stderr = process.stderr.read()
    assert server.ended.wait(HANG_S)
    assert (process.returncode, stderr) == (1, b"")


@pytest.fixture(autouse=True)
def _root_logger_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)


@pytest.fixture
def served(monkeypatch) -> list[ServerConfig]:
    """What `turret serve` would have served."""
    configs: list[ServerConfig] = []
    run = SimpleNamespace(serve=lambda config, _signals: configs.append(config))
    monkeypatch.setitem(sys.modules, "turret_server.app.run", run)
    return configs


def test_serve_defaults_are_those_of_the_config(served):
    assert CliRunner().invoke(main, ["serve", "--model", "m"]).exit_code == 0
    assert served == [ServerConfig(model="m", cache=default_cache())]


def test_serve_sends_every_option(served, tmp_path):
    CliRunner().invoke(
        main,
        [
            *(
                "serve",
                "--model",
                "m",
                "--adapters",
                str(tmp_path),
                "--listen",
                "0.0.0.0:1",
                "--metrics",
                "none",
            ),
            *("--tls-cert", __file__, "--tls-key", __file__, "--tls-client-ca", __file__),
            "--allow-unauthenticated",
            *("--device", "cpu", "--dtype", "float32", "--memory", "0.5", "--max-batch-tokens", "2"),
            *(
                "--max-batch-requests",
                "3",
                "--max-queue",
                "4",
                "--cache",
                str(tmp_path / "c"),
                "--log-level",
                "debug",
            ),
        ],
        catch_exceptions=False,
    )
    assert served == [
        ServerConfig(
            model="m",
            adapters=tmp_path,
            listen="0.0.0.0:1",
            allow_unauthenticated=True,
            tls_cert=Path(__file__),
            tls_key=Path(__file__),
            tls_client_ca=Path(__file__),
            metrics=None,
            device="cpu",
            dtype="float32",
            memory="0.5",
            max_batch_tokens=2,
            max_batch_requests=3,
            max_queue=4,
            cache=tmp_path / "c",
            log_level="debug",
        )
    ]


def test_serve_logs_at_its_level(monkeypatch):
    levels = []
    monkeypatch.setitem(sys.modules, "turret_server.app.run", SimpleNamespace(serve=lambda *_: None))
    monkeypatch.setattr("logging.basicConfig", lambda **options: levels.append(options["level"]))
    CliRunner().invoke(main, ["serve", "--model", "m", "--log-level", "warning"])
    assert levels == ["WARNING"]


def test_a_wrong_setting_is_an_error_of_one_line(monkeypatch):
    def serve(config: ServerConfig, _signals: object) -> None:
        raise ConfigError(f"--memory {config.memory}: expected a size")

    monkeypatch.setitem(sys.modules, "turret_server.app.run", SimpleNamespace(serve=serve))
    result = CliRunner().invoke(main, ["serve", "--model", "m", "--memory", "lots"])
    assert (result.exit_code, result.stderr) == (
        1,
        "error: --memory lots: expected a size (INVALID_CONFIG)\n",
    )


def test_serve_cache_follows_xdg(served):
    CliRunner(env={"XDG_CACHE_HOME": "/xdg"}).invoke(main, ["serve", "--model", "m"])
    assert [config.cache for config in served] == [Path("/xdg/turret")]


CLIENT_ONLY = f"""
import sys
for name in {SERVER_ONLY}:
    sys.modules[name] = None  # its import fails, as where it is not installed
from turret_cli.main import main
main(sys.argv[1:])
"""


def client_only(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 -- our own code
        [sys.executable, "-c", CLIENT_ONLY, *arguments], capture_output=True, text=True, check=False
    )


def test_client_commands_need_no_more_than_the_client(server):
    run = client_only("generate", "--server", server.address, "Hello")
    assert (run.returncode, run.stdout, run.stderr) == (0, "Ahoy, mátey\n", "")


def test_serve_says_what_to_install():
    run = client_only("serve", "--model", "m")
    assert run.returncode == 1
    assert run.stderr.startswith("error: the server needs ")
    assert run.stderr.endswith(' which is not installed: pip install "turret[server]"\n')
    assert run.stderr.count("\n") == 1
