"""What the policy does not name is refused, however it is written."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.adapter_files import write_folder
from turret_adapters.errors import (
    AdapterError,
    AdapterSourceError,
    SourceForbiddenError,
    SourceUnavailableError,
)
from turret_adapters.sources.policy import Deadline, Policy, public

ALLOWED = Policy(
    urls=("https://models.example.com/adapters", "https://any.example.com", "s3://bucket/a", "hf://")
)


@pytest.mark.parametrize(
    "url",
    [
        "https://models.example.com/adapters",
        "https://models.example.com/adapters/poet?token=1",
        "https://MODELS.example.com:443/adapters/poet.zip",
        "https://any.example.com/whatever",
        "s3://bucket/a/poet",
        "hf://owner/poet",
    ],
)
def test_urls_that_begin_like_an_allowed_one(url: str) -> None:
    assert ALLOWED.url(url).netloc


@pytest.mark.parametrize(
    "url",
    [
        "http://models.example.com/adapters/poet",
        "https://models.example.com/adapters-of-others/poet",
        "https://models.example.com/",
        "https://models.example.com:444/adapters/poet",
        "https://models.example.com.evil.com/adapters/poet",
        "https://evil.com/?https://models.example.com/adapters",
        "https://evil.com/https://models.example.com/adapters",
        "s3://bucket-of-others/a/poet",
        "s3://bucket/ab",
        "file:///etc",
        "file://etc/passwd",
        "simplecache://s3/bucket",
        "local:///etc",
        "https:///adapters",
    ],
)
def test_urls_that_do_not(url: str) -> None:
    with pytest.raises(SourceForbiddenError, match="expected a URL that begins with"):
        ALLOWED.url(url)
    with pytest.raises(SourceForbiddenError, match="no source of this kind is allowed"):
        Policy().url(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://models.example.com/adapters/../secret",
        "https://models.example.com/adapters/%2e%2E/secret",
        "https://models.example.com/adapters/..%2fsecret",
        "https://user:password@models.example.com/adapters/poet",
        "https://models.example.com\\@evil.com/adapters/poet",
        "https://models.example.com/adapters/poet#x",
        "https://models.example.com/adapters/ poet",
        "https://models.example.com/adapters/poet\n",
        "https://modèls.example.com/adapters/poet",
        "https://models.example.com:0/adapters",
        "https://models.example.com:99999/adapters",
        "https://[::1/adapters",
        "simplecache::s3://bucket/a",
        "s3://bucket/a::file:///etc",
        "s3://bucket/a?x::file:///etc",
        "://",
        "",
    ],
)
def test_urls_that_readers_read_differently(url: str) -> None:
    with pytest.raises(AdapterError, match=r"expected a (valid )?URL"):
        ALLOWED.url(url)


@settings(deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="https:/?#@[]%.\\ab", max_size=40))
def test_any_text_is_allowed_or_refused(text: str) -> None:
    try:
        parts = ALLOWED.url(text)
    except AdapterError:
        return
    assert parts.hostname


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0",  # noqa: S104 -- not to bind to
        "255.255.255.255", "224.0.0.1", "240.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
        "192.0.0.192", "192.0.0.9", "192.88.99.1", "168.63.129.16",
        "::", "::1", "fe80::1%eth0", "fd00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
        "::ffff:0:127.0.0.1", "64:ff9b::7f00:1",
        "fec0::1", "feff::1", "100::1", "64:ff9b:1::1", "5f00::1", "3fff::1", "4000::1", "2001:20::1",
        "::8.8.8.8", "::ffff:0:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::", "::ffff:192.0.0.192",
        "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "::127.0.0.1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    with pytest.raises(SourceForbiddenError, match=r"'host': expected a public address,.* found"):
        Policy().check_address("host", address)


@pytest.mark.parametrize("address", ["8.8.8.8", "::ffff:8.8.8.8", "2606:4700::1111"])
def test_addresses_that_are_public(address: str) -> None:
    Policy().check_address("host", address)


def test_addresses_of_allowed_networks() -> None:
    policy = Policy(networks=(ip_network("10.1.0.0/16"), ip_network("::1/128")))
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "::1"):
        policy.check_address("host", address)
    for address in ("10.2.0.0", "127.0.0.1", "169.254.169.254"):
        with pytest.raises(SourceForbiddenError):
            policy.check_address("host", address)


def test_folders_below_a_root(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "root" / "deep" / "poet")
    (tmp_path / "link").symlink_to("root")
    (tmp_path / "root" / "inside").symlink_to("deep")
    for root in (tmp_path / "root", tmp_path / "link"):
        policy = Policy(roots=(tmp_path / "unused", root))
        for path in ("root/deep/poet", "link/inside/poet", "root/deep/../deep/poet"):
            assert policy.folder(f"{tmp_path}/{path}") == folder


def test_folders_elsewhere(tmp_path: Path) -> None:
    write_folder(tmp_path / "root-of-others" / "poet")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "out").symlink_to("../root-of-others")
    policy = Policy(roots=(tmp_path / "root",))
    for path in ("root-of-others/poet", "root/out/poet", "root/../root-of-others/poet", "absent"):
        with pytest.raises(SourceForbiddenError, match="below"):
            policy.folder(f"{tmp_path}/{path}")
    with pytest.raises(AdapterSourceError, match="nothing there"):
        policy.folder(f"{tmp_path}/root/absent")
    with pytest.raises(AdapterError):
        policy.folder("zero\0")
    with pytest.raises(SourceForbiddenError, match="no source of this kind is allowed"):
        Policy().folder(str(tmp_path))


def test_what_is_secret_in_a_url_is_not_shown() -> None:
    assert public("https://user:pass@host/path@x?token=1#2") == "https://host/path@x"
    with pytest.raises(AdapterError) as refusal:
        ALLOWED.url("https://user:pass@host/?token=1")
    assert "pass" not in str(refusal.value).replace("password", "")
    assert "token" not in str(refusal.value)


def test_a_deadline_ends() -> None:
    assert 0 < Deadline(1000.0).left() <= 1000
    with pytest.raises(SourceUnavailableError, match="within 0 s"):
        Deadline(0.0).left()
