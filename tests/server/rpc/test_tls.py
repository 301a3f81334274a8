from __future__ import annotations

import logging

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from turret_server.errors import ConfigError
from turret_server.rpc.tls import TlsFiles


class Files:
    """The three files, as the operator writes them."""

    def __init__(self, folder):
        self.cert, self.key, self.client_ca = (folder / f"{name}.pem" for name in ("cert", "key", "ca"))
        self.authority, self.clients = trustme.CA(), trustme.CA()
        self.clients.cert_pem.write_to_path(self.client_ca)
        self.renew()

    def renew(self):
        made = self.authority.issue_cert("127.0.0.1")
        self.cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        self.key.write_bytes(made.private_key_pem.bytes())

    def opened(self, *, mutual=False):
        return TlsFiles(self.cert, self.key, self.client_ca if mutual else None)

    def client(self, certified_by=None):
        """Credentials of a client that trusts the server."""
        ca = self.authority.cert_pem.bytes()
        if certified_by is None:
            return grpc.ssl_channel_credentials(ca)
        made = certified_by.issue_cert("client.example.com")
        chain = b"".join(blob.bytes() for blob in made.cert_chain_pems)
        return grpc.ssl_channel_credentials(ca, made.private_key_pem.bytes(), chain)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


async def test_without_an_authority_a_client_needs_no_certificate(open_door, files):
    door = await open_door(credentials=files.opened().credentials())
    assert await door.is_reached_with(files.client())
    with pytest.raises(grpc.aio.AioRpcError) as refused:  # nor is anything answered unencrypted
        await door.status()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_with_an_authority_only_its_clients_reach_the_server(open_door, files):
    door = await open_door(credentials=files.opened(mutual=True).credentials())
    assert await door.is_reached_with(files.client(files.clients))
    for stranger in (None, files.authority):
        assert not await door.is_reached_with(files.client(stranger))


async def test_a_connection_has_the_certificates_of_its_time(open_door, files):
    door = await open_door(credentials=files.opened(mutual=True).credentials())
    trusts_the_former, former = files.client(files.clients), files.clients
    assert await door.is_reached_with(trusts_the_former)
    files.authority, files.clients = trustme.CA(), trustme.CA()
    files.renew()
    files.clients.cert_pem.write_to_path(files.client_ca)
    assert await door.is_reached_with(files.client(files.clients))
    assert not await door.is_reached_with(trusts_the_former)
    assert not await door.is_reached_with(files.client(former))


@pytest.mark.parametrize("which", ["cert", "key", "client_ca"])
def test_a_file_that_is_missing_is_named(files, which):
    path = getattr(files, which)
    path.unlink()
    with pytest.raises(ConfigError, match=f"{path}: expected a PEM file; No such file"):
        files.opened(mutual=True)


def with_password(files):
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )


BREAK = {
    "no certificate": lambda files: files.cert.write_text("hello"),
    "no authority": lambda files: files.client_ca.write_text("hello"),
    "key of another": lambda files: trustme.CA().issue_cert("x").private_key_pem.write_to_path(files.key),
    "key with a password": with_password,
}


@pytest.mark.parametrize("what", BREAK)
def test_files_that_do_not_go_together_are_refused(files, what):
    BREAK[what](files)
    with pytest.raises(ConfigError) as refused:
        files.opened(mutual=True)
    expected = (
        f"--tls-client-ca {files.client_ca}: expected a PEM file"
        if what == "no authority"
        else f"--tls-cert {files.cert}, --tls-key {files.key}: expected PEM files"
    )
    assert str(refused.value).startswith(expected)


def test_the_authority_is_checked_only_where_there_is_one(files):
    files.client_ca.write_text("hello")
    files.opened()
    files.cert.write_text("hello")
    with pytest.raises(ConfigError, match=f"{files.key}: expected PEM"):
        files.opened()


@pytest.mark.parametrize("which", ["cert", "client_ca"])
def test_new_files_are_taken_once(files, which, caplog):
    tls = files.opened(mutual=True)
    assert tls._renewed() is None
    if which == "cert":
        files.renew()
    else:
        trustme.CA().cert_pem.write_to_path(files.client_ca)
    with caplog.at_level(logging.INFO):
        assert tls._renewed() is not None
        assert tls._renewed() is None
    assert caplog.messages == ["reloaded the certificates"]


def test_broken_files_are_reported_once_for_each_error_and_again_after_valid_ones(files, caplog):
    tls = files.opened()
    for _ in range(2):
        files.key.write_text("hello")
        for _ in range(2):
            assert tls._renewed() is None
        files.key.unlink()
        for _ in range(2):
            assert tls._renewed() is None
        files.renew()
        assert tls._renewed() is not None
    assert len(caplog.messages) == 4
    assert all("the last valid certificates stay in use" in message for message in caplog.messages)


def test_files_that_change_while_they_are_checked_are_taken_by_the_next_connection(files, monkeypatch):
    """What was read and what was checked are the same files only if they are the same before and after."""
    tls = files.opened()
    files.renew()
    check = tls._check

    def check_slowly():
        check()
        files.renew()

    with monkeypatch.context() as patched:
        patched.setattr(tls, "_check", check_slowly)
        assert tls._renewed() is None
    assert tls._renewed() is not None
