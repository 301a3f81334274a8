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


def test_a_name_that_no_tenant_may_have_gets_no_key():
    result = CliRunner().invoke(main, ["tenants", "key", 'a"b'])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "expected 1 to 128 of the characters a-z A-Z 0-9 . _ -" in result.stderr


COMMANDS = pytest.mark.parametrize(
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


@COMMANDS
def test_every_command_sends_the_tenant(server, command):
    CliRunner().invoke(main, [*command, "--server", server.address, "--tenant", "acme"])
    assert server.tenants
    assert set(server.tenants) == {"acme"}


@pytest.mark.parametrize(("option", "file"), [("--tls-cert", "c.pem"), ("--tls-key", "k.pem")])
@COMMANDS
def test_a_certificate_without_its_key_is_wrong_usage(server, command, option, file, tmp_path):
    (tmp_path / file).touch()
    arguments = [*command, "--server", server.address, option, str(tmp_path / file)]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, server.requests) == (2, [])
    assert "Give --tls-cert and --tls-key together." in result.stderr


@COMMANDS
def test_every_command_sends_the_key(server, command):
    for arguments, env in ((["--api-key", "k"], {}), ([], {"TURRET_API_KEY": "k"})):
        server.authorizations.clear()
        CliRunner(env=env).invoke(main, [*command, "--server", server.address, *arguments])
        assert server.authorizations
        assert set(server.authorizations) == {"Bearer k"}


def test_an_encrypted_server_is_not_spoken_to_in_the_clear(server):
    result = CliRunner().invoke(main, ["adapters", "list", "--server", server.address, "--tls"])
    assert (result.exit_code, server.requests) == (1, [])
