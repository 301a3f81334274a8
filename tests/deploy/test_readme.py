from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from turret_server.config import SETTINGS
from turret_server.engine.admission import TenantLimits
from turret_server.tenancy.tenants import parse_tenants

DEPLOY = Path(__file__).parents[2] / "deploy"
README = (DEPLOY / "README.md").read_text()
OTHER_FLAGS = {"--config", "--help", "--build-arg"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_settings", DEPLOY / "settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_settings_is_current(script):
    assert script.with_table(README) == README, "run `make settings`"


def test_every_setting_is_in_the_table(script):
    assert re.findall(r"^\| `(--[a-z-]+)`", script.table(), re.MULTILINE) == [each.flag for each in SETTINGS]


def test_a_stale_table_is_replaced_and_the_rest_stays(script):
    text = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    assert script.with_table(text) == f"before\n{script.BEGIN}{script.table()}{script.END}\nafter\n"


def test_every_flag_that_the_text_names_exists():
    flags = {each.flag for each in SETTINGS} | OTHER_FLAGS
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= flags


def toml_blocks() -> list[str]:
    return re.findall(r"```toml\n(.*?)```", README, re.DOTALL)


def test_the_example_files_are_valid():
    server, tenants = toml_blocks()
    assert tomllib.loads(server).keys() <= {each.name for each in SETTINGS}
    example = tenants.replace("sha256:…", "sha256:" + "0" * 64, 1).replace("sha256:…", "sha256:" + "1" * 64)
    assert not parse_tenants("FILE", example.encode(), TenantLimits()).is_open


def test_every_metric_exists():
    sources = Path(__file__).parents[2] / "server" / "turret_server" / "observability"
    text = "".join(file.read_text() for file in sources.glob("*.py"))
    endings = {"Counter": "_total", "CounterMetricFamily": "_total", "Info": "_info"}
    known = {
        name.removesuffix("_total") + endings.get(kind, "")
        for kind, name in re.findall(r'(\w+)\(\s*"turret_([a-z_]+)"', text)
    }
    [section] = re.findall(r"## Metrics\n(.*?)\n## ", README, re.DOTALL)
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)", row)}
    assert named == known


def test_links_to_files_of_this_folder_lead_somewhere():
    for link in re.findall(r"\]\(([^)#.][^)#]*)\)", README):
        assert (DEPLOY / link).exists(), link
