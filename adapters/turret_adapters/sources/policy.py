"""The policy of sources: from where adapters may be fetched.

Only allowed sources may be fetched: the real path of a folder must be below a root, a URL must begin with an
allowed one, and the address of a host must be public or in an allowed network. `http` checks the address when
it connects, since a host name may resolve to another address a moment later.
"""

from __future__ import annotations

import ipaddress
import os
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from turret_adapters.errors import AdapterSourceError, SourceForbiddenError, SourceUnavailableError
from turret_adapters.formats.files import MAX_CONFIG_BYTES, MAX_TENSORS_BYTES, resolve

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PORTS = {"http": 80, "https": 443}
_IPV6_UNICAST = ipaddress.ip_network("2000::/3")
# Global by their number, at least for some versions of Python, and nowhere a public host.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # for protocols; a cloud's metadata service is in it
            "192.88.99.0/24",  # relays of 6to4
            "168.63.129.16/32",  # a cloud's metadata service
            "2001::/23",  # for protocols; Teredo contains an IPv4 address
            "2002::/16",  # 6to4 contains an IPv4 address
            "3fff::/20",  # for documentation
        ),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What may be fetched; by default nothing.

    `roots` are folders that may contain adapters. `urls` are the beginnings of allowed URLs, up to a whole
    part
    of the path: `https://models.example.com/adapters`, `https://` for any host, `hf://owner`, `s3://bucket`;
    the target of a redirect must be allowed too. Addresses in `networks` are allowed besides public ones.
    `max_bytes` limits the two files together, or an archive of them. `timeout` is in seconds, for fetching an
    adapter, and again for reading it from the store.
    """

    roots: tuple[Path, ...] = ()
    urls: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()
    max_bytes: int = MAX_CONFIG_BYTES + MAX_TENSORS_BYTES
    timeout: float = 600.0

    def folder(self, path: str) -> Path:
        """The path, without symbolic links, of a folder that is allowed.

        Raises:
            SourceForbiddenError: it is not below a root; the message does not reveal whether it exists.
            AdapterSourceError: it is not a folder with an adapter.
        """
        try:
            real = Path(os.path.realpath(path))
        except ValueError as error:
            raise AdapterSourceError(f"{path!r}: expected a valid path, found {error}") from error
        if not any(real.is_relative_to(os.path.realpath(root)) for root in self.roots):
            raise SourceForbiddenError(
                f"{path!r}: {_expected('a folder below', self.roots)}; the server's --allow-source adds one"
            )
        if resolve(str(real)) != real:
            raise SourceForbiddenError(
                f"{path!r}: expected a folder that does not change, found that it became a symbolic link"
            )
        return real

    def url(self, url: str) -> SplitResult:
        """The parts of a URL that is allowed.

        Raises:
            AdapterSourceError: it is not a valid URL.
            SourceForbiddenError: it does not begin with an allowed one.
        """
        parts = split(url)
        if not parts.netloc or not any(_begins(parts, split(allowed)) for allowed in self.urls):
            raise SourceForbiddenError(
                f"{public(url)!r}: {_expected('a URL that begins with', self.urls)}; the server's "
                "--allow-source adds one"
            )
        return parts

    def check_address(self, host: str, address: str) -> None:
        """Checks an address before a connection to it.

        Raises:
            SourceForbiddenError: it is neither public nor in an allowed network.
        """
        found = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
            found = found.ipv4_mapped
        if not _is_public(found) and not any(found in network for network in self.networks):
            allowed = ", ".join(["a public address", *map(str, self.networks)])
            raise SourceForbiddenError(f"host {host!r}: expected {allowed}, found {address}")


class Deadline:
    """The time at which a fetch must be complete."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left.

        Raises:
            SourceUnavailableError: none are.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise SourceUnavailableError(
                f"expected the adapter within {self._seconds:g} s, found it slower (try again later)"
            )
        return left


def split(url: str) -> SplitResult:
    """The parts of a URL whose host and path every parser reads alike.

    Raises:
        AdapterSourceError: it is not a valid URL, or parsers could differ.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AdapterSourceError(f"expected a valid URL, found {error}") from error
    sound = (
        parts.scheme
        and url.isascii()
        and url.isprintable()
        and not set(" \\#") & set(url)
        and "@" not in parts.netloc
        and port != 0
        and not {".", ".."} & set(unquote(parts.path).split("/"))
        # fsspec chains protocols with two colons.
        and "::" not in f"{parts.path}?{parts.query}"
        and ("::" not in parts.netloc or parts.netloc.startswith("["))
    )
    if not sound:
        raise AdapterSourceError(
            f"{public(url)!r}: expected a URL in printable ASCII, without spaces, user, password, fragment, "
            "chained protocols, and the folders . and .."
        )
    return parts


def public(url: str) -> str:
    """A URL without user, password and query, which may be secret, for messages and records."""
    beginning, _, _ = url.partition("?")
    scheme, mark, rest = beginning.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{mark}{authority.rpartition('@')[2] if mark == '://' else authority}{slash}{path}"


def _begins(url: SplitResult, allowed: SplitResult) -> bool:
    if url.scheme != allowed.scheme:
        return False
    if not allowed.netloc:
        return True
    if (url.hostname, url.port or _PORTS.get(url.scheme)) != (
        allowed.hostname,
        allowed.port or _PORTS.get(allowed.scheme),
    ):
        return False
    return f"{url.path}/".startswith(f"{allowed.path.rstrip('/')}/")


def _is_public(address: Address) -> bool:
    if address.version == 6 and address not in _IPV6_UNICAST:
        return False
    listed = any(address in network for network in _NOT_PUBLIC)
    return address.is_global and not address.is_multicast and not address.is_reserved and not listed


def _expected(what: str, allowed: tuple[object, ...]) -> str:
    return (
        f"expected {what} {', '.join(map(str, allowed))}" if allowed else "no source of this kind is allowed"
    )
