"""Encrypted connections, certificates that are renewed, and tenants who are known by theirs."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
import trustme

from support.prompts import PROMPT
from support.serving import serving
from turret_client import AsyncClient, Client, InvalidArgumentError, UnauthenticatedError, UnavailableError
from turret_server.config import ServerConfig
from turret_server.doors.tls import TlsFiles
from turret_server.errors import ConfigError
from turret_server.tenancy.keys import digest_of

IDENTITY = "acme.example.com"


class Authority:
    """Signs certificates, and writes them where they are wanted."""

    def __init__(self, folder: Path, name: str) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self.pem = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(self.pem)

    def issue(self, name: str, *identities: str, common_name: str | None = None) -> tuple[Path, Path]:
        """The files of a certificate and its key; each is replaced at once."""
        made = self._ca.issue_cert(*identities, common_name=common_name)
        cert, key = self._folder / f"{name}-cert.pem", self._folder / f"{name}-key.pem"
        for place, content in (
            (cert, b"".join(blob.bytes() for blob in made.cert_chain_pems)),
            (key, made.private_key_pem.bytes()),
        ):
            new = place.with_suffix(".new")
            new.write_bytes(content)
            new.replace(place)
        return cert, key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder):
    return Authority(folder, "authority")


@pytest.fixture(scope="module")
def other(folder):
    return Authority(folder, "other")


@pytest.fixture(scope="module")
def config_of(base_of, quantised_cache, authority):
    def make(**settings: object) -> ServerConfig:
        cert, key = authority.issue("server", "127.0.0.1", "localhost")
        return ServerConfig(
            model=str(base_of("llama")),
            dtype="float32",
            device="cpu",
            memory="2MiB",
            cache=quantised_cache,
            tls_cert=cert,
            tls_key=key,
            **settings,
        )

    return make


@pytest.fixture(scope="module")
def encrypted(config_of):
    with serving(config_of()) as served:
        yield served


@pytest.fixture(scope="module")
def mutual(config_of, folder, authority):
    """A server that knows tenants by their certificates, and one of them by a key as well."""
    tenants = folder / "tenants.toml"
    tenants.write_text(
        f"""
        [tenants.acme]
        identities = ["{IDENTITY}", "common acme"]
        [tenants.bolt]
        keys = ["{digest_of("bolt")}"]
        """
    )
    with serving(config_of(tenants=tenants, tls_client_ca=authority.pem)) as served:
        yield served


def generate(address: str, **options: object) -> tuple[int, ...]:
    with Client(address, **options) as client:
        return client.generate(PROMPT, max_tokens=2, timeout=30).token_ids


def test_both_clients_speak_to_an_encrypted_server(encrypted, authority):
    async def ask() -> tuple[int, ...]:
        async with AsyncClient(encrypted.address, ca=authority.pem) as client:
            return (await client.generate(PROMPT, max_tokens=2)).token_ids

    assert generate(encrypted.address, ca=authority.pem) == asyncio.run(ask())


def test_a_server_whose_certificate_nobody_trusts_is_not_spoken_to(encrypted, other):
    for options in ({"tls": True}, {"ca": other.pem}, {}):
        with pytest.raises(UnavailableError):
            generate(encrypted.address, **options)


def test_a_renewed_certificate_holds_for_new_connections(encrypted, authority, other):
    try:
        other.issue("new", "127.0.0.1")
        for name in ("cert", "key"):
            (other.pem.parent / f"new-{name}.pem").replace(other.pem.parent / f"server-{name}.pem")
        assert generate(encrypted.address, ca=other.pem)
        with pytest.raises(UnavailableError):
            generate(encrypted.address, ca=authority.pem)
    finally:
        authority.issue("server", "127.0.0.1", "localhost")
    assert generate(encrypted.address, ca=authority.pem)


def test_a_key_that_does_not_match_its_certificate_changes_nothing_and_is_logged_once(
    encrypted, authority, folder, caplog
):
    cert = (folder / "server-cert.pem").read_bytes()
    authority.issue("half", "127.0.0.1")
    with caplog.at_level(logging.ERROR, "turret_server.doors.tls"):
        try:
            (folder / "half-cert.pem").replace(folder / "server-cert.pem")
            assert generate(encrypted.address, ca=authority.pem)
            assert generate(encrypted.address, ca=authority.pem)
        finally:
            (folder / "server-cert.pem").write_bytes(cert)
    [told] = caplog.messages
    assert "the last valid certificates stay in use" in told


def test_a_certificate_names_its_tenant(mutual, authority):
    by_name = authority.issue("by-name", IDENTITY)
    by_common_name = authority.issue("by-common-name", "x.example.com", common_name="common acme")
    for cert, key in (by_name, by_common_name):
        with Client(mutual.address, ca=authority.pem, cert=cert, key=key) as client:
            assert client.list_adapters() == []
    cert, key = by_name
    with (
        Client(mutual.address, ca=authority.pem, cert=cert, key=key, tenant="bolt") as client,
        pytest.raises(UnauthenticatedError, match="different tenants"),
    ):
        client.list_adapters()


def test_a_certificate_that_is_no_tenants_lets_nobody_in_without_a_key(mutual, authority):
    cert, key = authority.issue("nobody", "nobody.example.com")
    with pytest.raises(UnauthenticatedError):
        generate(mutual.address, ca=authority.pem, cert=cert, key=key)
    assert generate(mutual.address, ca=authority.pem, cert=cert, key=key, api_key="bolt")


def test_without_a_certificate_of_the_authority_nobody_comes_to_the_server(mutual, authority, other):
    cert, key = other.issue("foreign", IDENTITY)
    for options in ({}, {"cert": cert, "key": key}):
        with pytest.raises(UnavailableError):
            generate(mutual.address, ca=authority.pem, api_key="bolt", **options)


def test_identities_need_an_authority(config_of, folder):
    tenants = folder / "identities.toml"
    tenants.write_text(f'[tenants.acme]\nidentities = ["{IDENTITY}"]')
    with pytest.raises(ConfigError, match="--tls-client-ca"), serving(config_of(tenants=tenants)):
        pass


@pytest.mark.parametrize("broken", ["missing", "empty", "other key"])
def test_files_that_cannot_be_used_are_named_at_the_start(authority, tmp_path, broken):
    cert, key = authority.issue("start", "127.0.0.1")
    bad = tmp_path / "bad.pem"
    if broken == "empty":
        bad.touch()
    elif broken == "other key":
        bad = authority.issue("start-other", "127.0.0.1")[1]
    with pytest.raises(ConfigError, match=bad.name):
        TlsFiles(cert, bad, None)
    TlsFiles(cert, key, authority.pem)


def test_a_client_needs_certificate_and_key(authority):
    cert, _ = authority.issue("client", "x")
    with pytest.raises(InvalidArgumentError, match="key is missing"):
        Client("127.0.0.1:1", cert=cert)
