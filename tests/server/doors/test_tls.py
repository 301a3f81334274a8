from __future__ import annotations

import logging

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from support.certificates import Files
from turret_server.errors import ConfigError


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


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
    before = tls.current()
    assert tls.current() is before
    if which == "cert":
        files.renew()
    else:
        trustme.CA().cert_pem.write_to_path(files.client_ca)
    with caplog.at_level(logging.INFO):
        renewed = tls.current()
        assert renewed is not before
        assert tls.current() is renewed
    assert caplog.messages == ["reloaded the certificates"]


def test_broken_files_are_reported_once_for_each_error_and_again_after_valid_ones(files, caplog):
    tls = files.opened()
    for _ in range(2):
        before = tls.current()
        files.key.write_text("hello")
        for _ in range(2):
            assert tls.current() is before
        files.key.unlink()
        for _ in range(2):
            assert tls.current() is before
        files.renew()
        assert tls.current() is not before
    assert len(caplog.messages) == 4
    assert all("the last valid certificates stay in use" in message for message in caplog.messages)


def test_files_that_change_while_they_are_checked_are_taken_by_the_next_connection(files, monkeypatch):
    """What was read and what was checked are the same files only if they are the same before and after."""
    tls = files.opened()
    before, read = tls.current(), tls._read
    files.renew()

    def read_slowly(contents):
        found = read(contents)
        files.renew()
        return found

    with monkeypatch.context() as patched:
        patched.setattr(tls, "_read", read_slowly)
        assert tls.current() is before
    assert tls.current() is not before
