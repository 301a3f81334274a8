"""No container runs here: what can be held is that the files agree with each other and with the command."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from itertools import takewhile
from pathlib import Path

import click
import pytest
import yaml

from turret_cli.serve import serve
from turret_client import DEFAULT_ADDRESS
from turret_server.config import ServerConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DEFAULTS = ServerConfig(model="m")
PARAMS = serve.get_params(click.Context(serve))
SWITCHES = {name for option in PARAMS if option.is_flag for name in option.opts}
FLAGS = {name for option in PARAMS for name in option.opts}


def port(address: str) -> str:
    return address.rpartition(":")[2]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The Containerfile's instructions: name and arguments, continued lines joined."""
    lines = (DEPLOY / "Containerfile").read_text().replace("\\\n", "").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def entry_point(instructions) -> list[str]:
    return json.loads(dict(instructions)["ENTRYPOINT"])


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def service(compose) -> dict:
    return compose["services"]["turret"]


@pytest.fixture(scope="module")
def settings(entry_point, service) -> dict[str, str]:
    """Flag and value of all that `turret serve` is started with under compose; "" where a flag has none."""
    words = []
    for word in [*entry_point[2:], *service["command"]]:
        words += [word, ""] if word in SWITCHES else [word]
    assert len(words) % 2 == 0
    return dict(zip(words[::2], words[1::2], strict=True))


def test_hadolint():
    hadolint = Path(sys.executable).with_name("hadolint")
    run = subprocess.run([hadolint, DEPLOY / "Containerfile"], capture_output=True, text=True, check=False)  # noqa: S603 -- our own
    assert run.stdout + run.stderr == ""
    assert run.returncode == 0


def test_the_container_serves(entry_point):
    assert entry_point[:2] == ["turret", "serve"]


def test_every_flag_exists(settings):
    assert set(settings) <= FLAGS
    assert "--model" in settings


def test_it_listens_to_the_outside_on_the_usual_ports(settings):
    assert settings["--listen"] == f"0.0.0.0:{port(DEFAULTS.listen)}"
    assert settings["--http"] == f"0.0.0.0:{port(DEFAULTS.http)}"
    assert settings["--metrics"] == f"0.0.0.0:{port(DEFAULTS.metrics)}"


def test_a_server_that_anybody_may_use_is_published_to_this_machine_alone(service, settings):
    assert "--allow-unauthenticated" in settings
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_its_ports_are_declared(instructions, settings):
    ports = [port(settings[flag]) for flag in ("--listen", "--http", "--metrics")]
    assert dict(instructions)["EXPOSE"].split() == ports


def test_it_runs_as_nobody_special(instructions):
    [user] = [arguments for name, arguments in instructions if name == "USER"]
    assert int(user) > 0
    assert any(name == "RUN" and f"useradd --uid {user} " in arguments for name, arguments in instructions)


def test_images_have_tags(instructions, compose):
    stages = {
        arguments.split()[2] for name, arguments in instructions if name == "FROM" and " AS " in arguments
    }
    bases = {arguments.split()[0] for name, arguments in instructions if name == "FROM"}
    images = [*(bases - stages - {"${DEVICE}"}), compose["services"]["prometheus"]["image"]]
    assert images
    assert all(image.partition(":")[2] not in ("", "latest") for image in images)


def test_both_devices_are_stages(instructions):
    stages = {
        arguments.split()[2] for name, arguments in instructions if name == "FROM" and " AS " in arguments
    }
    assert {"cpu", "cuda"} <= stages
    assert ("ARG", "DEVICE=cpu") in instructions


def test_the_stage_for_gpus_has_what_triton_compiles_with_and_keeps_what_it_compiled(instructions, settings):
    after = instructions[instructions.index(("FROM", "base AS cuda")) + 1 :]
    stage = dict(takewhile(lambda instruction: instruction[0] != "FROM", after))
    assert {"gcc", "libc6-dev"} <= set(stage["RUN"].split())
    assert f"TRITON_CACHE_DIR={settings['--cache']}/triton" in stage["ENV"].split()


def test_the_wheel_finds_what_it_packs(instructions):
    copied = {
        source
        for name, arguments in instructions
        if name == "COPY"
        for source in arguments.split()[:-1]
        if not source.startswith("--")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {"pyproject.toml", project["project"]["readme"], *packages} <= copied
    assert all((ROOT / source).exists() for source in copied)


def test_dependencies_are_constrained(instructions):
    assert any(
        name == "RUN" and "source=deploy/constraints.txt" in arguments and "--constraint" in arguments
        for name, arguments in instructions
    )


def test_compose_builds_this_container(service):
    build = service["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]) == DEPLOY / "Containerfile"


def test_ports_are_open_to_this_machine_alone(compose):
    published = [entry for service in compose["services"].values() for entry in service["ports"]]
    assert all(entry.startswith("127.0.0.1:") for entry in published)
    assert len({entry.rpartition(":")[0] for entry in published}) == len(published)


def test_clients_find_the_server_at_their_default_address(service, settings):
    defaults = ((DEFAULT_ADDRESS, "--listen"), (DEFAULTS.http, "--http"))
    assert service["ports"] == [f"{address}:{port(settings[flag])}" for address, flag in defaults]
    assert DEFAULTS.listen == DEFAULT_ADDRESS


def test_folders_are_mounted_where_the_server_looks(service, settings):
    mounted = {volume.removesuffix(":ro").rpartition(":")[2] for volume in service["volumes"]}
    assert mounted == {settings["--model"], settings["--adapters"], settings["--cache"], settings["--store"]}


def test_the_cache_and_the_store_are_writable(instructions, settings):
    folders = f"--owner=turret --group=turret {settings['--cache']} {settings['--store']}"
    assert any(name == "RUN" and arguments.endswith(folders) for name, arguments in instructions)


def test_named_volumes_are_declared(compose):
    named = {
        volume.partition(":")[0]
        for service in compose["services"].values()
        for volume in service["volumes"]
        if volume[0].isalpha()
    }
    assert named == set(compose["volumes"])


def test_prometheus_scrapes_the_server(compose, settings):
    mounts = compose["services"]["prometheus"]["volumes"]
    source = next(mount.partition(":")[0] for mount in mounts if "/etc/prometheus/prometheus.yml" in mount)
    [job] = yaml.safe_load((DEPLOY / source).read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"turret:{port(settings['--metrics'])}"]}]
    assert job.get("metrics_path", "/metrics") == "/metrics"


def test_both_services_have_health_checks(instructions, compose):
    # Turret's is the image's, which compose takes over.
    command = dict(instructions)["HEALTHCHECK"].partition("CMD ")[2]
    assert (
        "COPY",
        f"--chmod=755 deploy/healthcheck.py /usr/local/bin/{json.loads(command)[0]}",
    ) in instructions
    assert "healthcheck" not in compose["services"]["turret"]
    assert "healthcheck" in compose["services"]["prometheus"]
