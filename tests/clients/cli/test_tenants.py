from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from turret_cli.main import main
from turret_server.engine.admission import TenantLimits
from turret_server.tenancy.tenants import parse_tenants


def test_the_printed_lines_let_the_printed_key_in():
    result = CliRunner().invoke(main, ["tenants", "key", "acme.de"])
    assert result.exit_code == 0
    about_key, _, about_file = result.stdout.partition("\n\n")
    key = about_key.splitlines()[-1]
    table = parse_tenants("FILE", "\n".join(about_file.splitlines()[1:]).encode(), TenantLimits())
    found = table.by_key(key)
    assert found
    assert found.name == "acme.de"


def test_json():
    result = CliRunner().invoke(main, ["tenants", "key", "acme", "--json"])
    found = json.loads(result.stdout)
    content = f'[tenants.acme]\nkeys = ["{found["digest"]}"]'
    assert parse_tenants("FILE", content.encode(), TenantLimits()).by_key(found["key"])


@pytest.mark.parametrize(
    "command",
    [
        ("adapters", "list"),
        ("adapters", "show", "pirate"),
        ("adapters", "load", "pirate", "/srv/pirate"),
        ("adapters", "unload", "pirate"),
        ("prompts", "list"),
        ("prompts", "pin", "rules", "Be brief."),
        ("prompts", "unpin", "rules"),
        ("generate", "Hello"),
        ("bench", "--requests", "1", "--warm-up", "0"),
    ],
    ids=" ".join,
)
def test_every_command_sends_the_key(server, command):
    for arguments, env in ((["--api-key", "k"], {}), ([], {"TURRET_API_KEY": "k"})):
        server.authorizations.clear()
        CliRunner(env=env).invoke(main, [*command, "--server", server.address, *arguments])
        assert server.authorizations
        assert set(server.authorizations) == {"Bearer k"}


def test_an_encrypted_server_is_not_spoken_to_in_the_clear(server):
    result = CliRunner().invoke(main, ["adapters", "list", "--server", server.address, "--tls"])
    assert (result.exit_code, server.requests) == (1, [])
