from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from turret_server.config import (
    SETTINGS,
    GivenSettings,
    ServerConfig,
    Size,
    default_cache,
    default_store,
    parse_size,
    split_address,
)
from turret_server.errors import ConfigError

BY_NAME = {setting.name: setting for setting in SETTINGS}
FILE = Path(__file__)
FOLDER = FILE.parent


def given(
    tmp_path: Path,
    flags: dict[str, object] | None = None,
    environ: dict[str, str] | None = None,
    toml: str = "",
) -> ServerConfig:
    file = tmp_path / "server.toml"
    file.write_text(toml)
    return GivenSettings({"model": "m"} | (flags or {}), environ or {}, file).config()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", Size(2 * 2**30, is_fraction=False)),
        ("1.5 KiB", Size(1536, is_fraction=False)),
        ("64MiB", Size(64 * 2**20, is_fraction=False)),
        ("3k", Size(3072, is_fraction=False)),
        ("1TB", Size(2**40, is_fraction=False)),
        ("2", Size(2, is_fraction=False)),
        ("1", Size(1, is_fraction=True)),
        ("0.5", Size(0.5, is_fraction=True)),
        ("1B", Size(1, is_fraction=True)),
        *((text, None) for text in ("", "0", "0.0", "-1", "plenty", "2XB", "GiB", "1e3", "inf")),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:x", "host:65536", "host:-1", "host:²"])
def test_an_address_has_a_host_and_a_port(address):
    with pytest.raises(ValueError, match="HOST:PORT"):
        split_address(address)


def test_an_address_is_split_at_its_last_colon():
    assert split_address("[::1]:65535") == ("[::1]", 65535)
    assert split_address("localhost:0") == ("localhost", 0)


@pytest.mark.parametrize(
    ("listen", "is_local"),
    [
        ("127.0.0.1:1", True),
        ("127.8.8.8:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.com:1", False),
    ],
)
def test_which_addresses_are_local(listen, is_local):
    assert ServerConfig(model="m", listen=listen).is_local is is_local
    assert ServerConfig(model="m", http=listen).is_local is is_local


def test_the_address_that_other_machines_reach_is_named():
    assert ServerConfig(model="m").open_address is None
    assert ServerConfig(model="m", http="0.0.0.0:1").open_address == ("--http", "0.0.0.0:1")
    assert ServerConfig(model="m", http=None, listen="[::]:1").open_address == ("--listen", "[::]:1")


# Of every setting but switches: values that are allowed, and values just outside.
BOUNDS = {
    "model": (["m"], [""]),
    "device": (
        ["auto", "cpu", "cuda", "cuda:1"],
        ["", "abacus", "CPU", "cuda:", "cuda:-1", "cuda:01", "cuda:one"],
    ),
    "dtype": (["auto", "float32", "bfloat16", "float16"], ["int8"]),
    "max_context": ([None, 1, 10**9], [0, -1]),
    "adapters": ([FOLDER], [FILE, FOLDER / "none"]),
    "chat_template": ([FILE], [FOLDER, FOLDER / "none"]),
    "pin": ([(), ("a",), ("a" * 128, "b.c-d_e")], [("",), ("a" * 129,), ("-a",), ("a", "b/c")]),
    "lazy_source": (["/a/{name}", "hf://o/{name}"], ["", "o/{name}", "hf://o/name", "/a/{name}/{name}"]),
    "memory": ([None, "1", "0.001", "2GiB"], ["", "0", "-1", "plenty"]),
    "host_memory": ([None, "1", "2GiB"], ["", "0", "plenty"]),
    "store": ([FOLDER, FOLDER / "none"], [FILE]),
    "store_size": ([None, "50GiB", "2"], ["", "0", "0.5", "1", "plenty"]),
    "cache": ([FOLDER, FOLDER / "none"], [FILE]),
    "listen": (["127.0.0.1:0"], ["", "nowhere", "127.0.0.1:65536"]),
    "http": ([None, "0.0.0.0:65535"], ["", "nowhere"]),
    "http_cors": (
        [(), ("*", "https://a.example.com"), ("http://localhost:3000",)],
        [("a.example.com",), ("https://a/b",)],
    ),
    "metrics": ([None, "0.0.0.0:65535"], ["", "nowhere"]),
    "grace": ([0.0, 1e9], [-0.001, float("inf"), float("nan")]),
    "tenants": ([None, FILE], [FOLDER, FOLDER / "none"]),
    "auth_hook": ([None, "m:f"], ["", "m", "m:", ":f"]),
    "allow_source": ([(), ("/srv", "hf://owner")], [("",)]),
    "max_batch_tokens": ([64, 10**9], [0, -1]),
    "max_batch_requests": ([1, 512], [0, -1, 513]),
    "max_step_seconds": ([1e-6, 1e6], [0.0, -1.0, float("nan"), float("inf")]),
    "max_queue": ([1, 10**9], [0, -1]),
    "max_queue_tokens": ([1, 10**9], [0, -1]),
    "log_level": (["debug", "info", "warning", "error"], ["", "loud"]),
    "log_format": (["human", "json"], ["xml"]),
    "usage_log": ([None, FOLDER / "usage.jsonl"], []),
}
TLS = {"tls_cert", "tls_key", "tls_client_ca"}


def test_every_setting_has_bounds_that_are_tested():
    switches = {setting.name for setting in SETTINGS if setting.kind is bool}
    assert {setting.name for setting in SETTINGS} == BOUNDS.keys() | TLS | switches


@pytest.mark.parametrize(("name", "value"), [(name, each) for name, (ok, _) in BOUNDS.items() for each in ok])
def test_allowed_values(name, value):
    assert getattr(ServerConfig(**{"model": "m", name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"), [(name, each) for name, (_, bad) in BOUNDS.items() for each in bad]
)
def test_other_values_are_refused_and_the_message_names_the_flag(name, value):
    with pytest.raises(ConfigError, match=rf"^{BY_NAME[name].flag} .*expected "):
        ServerConfig(**{"model": "m", name: value})


def test_a_changed_copy_is_validated_too():
    with pytest.raises(ConfigError, match="--max-queue 0"):
        replace(ServerConfig(model="m"), max_queue=0)


def test_certificate_and_key_belong_together_and_an_authority_needs_both():
    ServerConfig(model="m", tls_cert=FILE, tls_key=FILE)
    ServerConfig(model="m", tls_cert=FILE, tls_key=FILE, tls_client_ca=FILE)
    for alone in ({"tls_cert": FILE}, {"tls_key": FILE}, {"tls_client_ca": FILE}):
        with pytest.raises(ConfigError, match="--tls-cert and --tls-key"):
            ServerConfig(model="m", **alone)
    for name in TLS:
        with pytest.raises(ConfigError, match=f"^{BY_NAME[name].flag} .*expected an existing file"):
            ServerConfig(model="m", **dict.fromkeys(TLS, FILE) | {name: FOLDER})


def test_a_watch_needs_a_folder():
    ServerConfig(model="m", watch=True, adapters=FOLDER)
    with pytest.raises(ConfigError, match=r"--watch.*--adapters"):
        ServerConfig(model="m", watch=True)


def test_defaults(monkeypatch):
    for variable in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(variable, "/xdg")
    assert ServerConfig(model="m").cache == default_cache() == Path("/xdg/turret")
    assert ServerConfig(model="m").store == default_store() == Path("/xdg/turret")
    monkeypatch.setenv("HOME", "/home/me")
    for variable in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(variable, "")
    assert default_cache() == Path("/home/me/.cache/turret")
    assert default_store() == Path("/home/me/.local/share/turret")


# One value of each kind of setting, in all three forms.
FORMS = [
    ("model", "x", "x", '"x"', "x"),
    ("watch", True, "true", "true", True),
    ("otel", True, "1", "true", True),
    ("max_queue", "7", "7", "7", 7),
    ("grace", "2", "2", "2", 2.0),
    ("grace", "0.5", "0.5", "0.5", 0.5),
    ("memory", "auto", "auto", '"auto"', None),
    ("metrics", "none", "none", '"none"', None),
    ("store", "/s", "/s", '"/s"', Path("/s")),
    ("pin", ("a", "b"), "a,b", '["a", "b"]', ("a", "b")),
    ("log_format", "json", "json", '"json"', "json"),
]


@pytest.mark.parametrize(("name", "flag", "variable", "key", "value"), FORMS)
def test_a_setting_means_the_same_in_all_three_forms(name, flag, variable, key, value, tmp_path):
    adapters = {"adapters": str(tmp_path)}
    for config in (
        given(tmp_path, adapters | {name: flag}),
        given(tmp_path, adapters, {BY_NAME[name].variable: variable}) if name != "model" else None,
        given(tmp_path, adapters, toml=f"{name} = {key}") if name != "model" else None,
    ):
        found = getattr(config, name) if config else value
        assert (found, type(found)) == (value, type(value))


def test_a_model_may_come_from_the_environment_or_the_file(tmp_path):
    assert GivenSettings({}, {"TURRET_MODEL": "e"}, None).config().model == "e"
    (tmp_path / "server.toml").write_text('model = "f"')
    assert GivenSettings({}, {}, tmp_path / "server.toml").config().model == "f"
    with pytest.raises(ConfigError, match="--model is missing"):
        GivenSettings({}, {"TURRET_MODEL": ""}, None).config()


def test_flags_go_before_the_environment_and_that_before_the_file_and_that_before_the_default(tmp_path):
    toml, environ = "max_queue = 3", {"TURRET_MAX_QUEUE": "2"}
    assert given(tmp_path, {"max_queue": "1"}, environ, toml).max_queue == 1
    assert given(tmp_path, {}, environ, toml).max_queue == 2
    assert given(tmp_path, {}, {"TURRET_MAX_QUEUE": ""}, toml).max_queue == 3
    assert given(tmp_path).max_queue == 1024
    for off in ("False", "0"):
        assert given(tmp_path, {}, {"TURRET_OTEL": off}, "otel = true").otel is False


@pytest.mark.parametrize(
    ("name", "text", "toml"),
    [
        ("max_queue", "many", '"7"'),
        ("max_queue", "1.5", "1.5"),
        ("max_queue", "true", "true"),
        ("grace", "soon", '"2"'),
        ("grace", "false", "false"),
        ("watch", "yes", "1"),
        ("device", "abacus", "7"),
        ("store", None, "7"),
        ("pin", None, '"a"'),
        ("pin", None, "[1]"),
        ("model", None, '["m"]'),
    ],
)
def test_a_value_of_another_type_is_refused_in_every_form(name, text, toml, tmp_path):
    setting = BY_NAME[name]
    with pytest.raises(ConfigError, match=rf"^{name} \({tmp_path}/server.toml\) .*: expected "):
        given(tmp_path, toml=f"{name} = {toml}")
    if text:
        with pytest.raises(ConfigError, match=f"^{setting.variable} {text}: expected "):
            given(tmp_path, environ={setting.variable: text})
    if text and setting.kind is not bool:
        with pytest.raises(ConfigError, match=f"^{setting.flag} {text}: expected "):
            given(tmp_path, {name: text})


def test_a_value_that_is_refused_is_named_in_the_form_in_which_it_was_given(tmp_path):
    with pytest.raises(ConfigError, match=r"^--max-queue 0: expected an integer of at least 1$"):
        given(tmp_path, {"max_queue": "0"}, {"TURRET_MAX_QUEUE": "1"})
    with pytest.raises(ConfigError, match=r"^TURRET_MAX_QUEUE 0: expected"):
        given(tmp_path, {}, {"TURRET_MAX_QUEUE": "0"}, "max_queue = 1")
    with pytest.raises(ConfigError, match=rf"^max_queue \({tmp_path}/server.toml\) 0: expected"):
        given(tmp_path, {}, {}, "max_queue = 0")
    with pytest.raises(ConfigError, match=r"^TURRET_WATCH: .*; name one with --adapters"):
        given(tmp_path, {}, {"TURRET_WATCH": "1"})


def test_errors_of_the_start_name_settings_likewise():
    settings = GivenSettings({"model": "m", "metrics": "none"}, {"TURRET_MAX_QUEUE": "1"}, None)
    message = "--max-queue 1, --max-queue-tokens, --metrics and a--max-queue"
    with pytest.raises(ConfigError) as named, settings.named_as_given():
        raise ConfigError(message, about="this")
    expected = "TURRET_MAX_QUEUE 1, --max-queue-tokens, --metrics and a--max-queue"
    assert (str(named.value), named.value.metadata) == (expected, {"about": "this"})


@pytest.mark.parametrize(("key", "nearest"), [("max_qeue", "max_queue"), ("max-queue", "max_queue")])
def test_an_unknown_key_is_an_error_that_names_the_nearest(key, nearest, tmp_path):
    with pytest.raises(ConfigError, match=f"server.toml: unknown key {key}; the nearest is {nearest}$"):
        given(tmp_path, toml=f"{key} = 1")


def test_an_unknown_variable_is_an_error_that_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"variable TURRET_MEMROY; the nearest is TURRET_MEMORY$"):
        given(tmp_path, environ={"TURRET_MEMROY": "1"})


def test_variables_of_the_client_of_kubernetes_and_of_others_are_no_settings(tmp_path):
    variables = [
        "TURRET_SERVER",
        "TURRET_API_KEY",
        "TURRET_CONFIG",
        "TURRETS",
        "MODEL",
        "TURRET_PORT",
        "TURRET_SERVICE_HOST",
        "TURRET_SERVICE_PORT",
        "TURRET_SERVICE_PORT_GRPC",
        "TURRET_PORT_50051_TCP",
        "TURRET_PORT_50051_TCP_ADDR",
        "TURRET_METRICS_PORT_9090_TCP_PROTO",
        "TURRET_METRICS_SERVICE_HOST",
    ]
    assert given(tmp_path, environ=dict.fromkeys(variables, "x")) == ServerConfig(model="m")


@pytest.mark.parametrize("content", [b"model", b"\xff"])
def test_a_file_that_is_no_toml_is_refused(content, tmp_path):
    (tmp_path / "server.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"--config .*: expected a TOML file"):
        GivenSettings({}, {}, tmp_path / "server.toml")
    with pytest.raises(ConfigError, match=r"--config .*: expected a TOML file"):
        GivenSettings({}, {}, tmp_path / "none.toml")


def test_settings_are_read_without_the_servers_libraries():
    script = "import sys, turret_server.config; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)  # noqa: S603
    assert not set(run.stdout.split()) & {"torch", "grpc", "numpy", "click", "turret_adapters"}


def test_defaults_as_help_shows_them():
    assert {setting.name: setting.default_text for setting in SETTINGS if setting.default_text} == {
        "device": "auto",
        "dtype": "auto",
        "max_context": "the model's context",
        "chat_template": "the model's chat template",
        "memory": "auto",
        "host_memory": "auto",
        "store": "$XDG_DATA_HOME/turret or ~/.local/share/turret",
        "store_size": "no limit",
        "cache": "$XDG_CACHE_HOME/turret or ~/.cache/turret",
        "listen": "127.0.0.1:50051",
        "http": "127.0.0.1:8000",
        "metrics": "127.0.0.1:9090",
        "grace": "30",
        "max_batch_tokens": "512",
        "max_batch_requests": "64",
        "max_step_seconds": "0.5",
        "max_queue": "1024",
        "max_queue_tokens": "1048576",
        "log_level": "info",
        "log_format": "human",
    }
    switches = [setting.name for setting in SETTINGS if setting.kind is bool]
    config = ServerConfig(model="m")
    assert [getattr(config, name) for name in switches] == [False] * 4


def test_messages_show_values_as_they_are_written(tmp_path):
    with pytest.raises(ConfigError, match=r'^--memory "": expected'):
        ServerConfig(model="m", memory="")
    with pytest.raises(
        ConfigError, match=r"^device \(.*\) true: expected auto, cpu, cuda, or a GPU such as cuda:1$"
    ):
        given(tmp_path, toml="device = true")
    with pytest.raises(ConfigError, match=r'^metrics \(.*\) 1: expected HOST:PORT, .*, or "none"$'):
        given(tmp_path, toml="metrics = 1")
    with pytest.raises(ConfigError, match=r"^pin \(.*\) \[1\]: expected a list of strings, each 1 to 128 "):
        given(tmp_path, toml="pin = [1]")
    with pytest.raises(ConfigError, match=r"^pin \(.*\) b/c: expected 1 to 128 of the characters"):
        given(tmp_path, toml='pin = ["a", "b/c"]')
