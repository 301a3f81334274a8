"""From where adapters may be fetched.

Everything is refused that is not allowed: a folder must really lie below a root, a URL must begin like an
allowed one, and the address behind a host's name must be a public one or in an allowed network. The address
is checked when it is connected to (`http_source`): a name may point elsewhere a moment after a look.
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
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What may be fetched; by default nothing.

    `roots` are folders below which adapters may lie. `urls` say how allowed URLs begin, up to a whole part of
    the path: `https://models.example.com/adapters`, `https://` for any host, `hf://owner`, `s3://bucket`;
    what a URL redirects to must be allowed as well. A host may be in `networks` besides the public internet.
    `max_bytes` is the most that the two files may hold, or an archive of them; `timeout` counts seconds from
    the first look to the last byte, and once more while the adapter is read from the store.
    """

    roots: tuple[Path, ...] = ()
    urls: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()
    max_bytes: int = MAX_CONFIG_BYTES + MAX_TENSORS_BYTES
    timeout: float = 600.0

    def folder(self, path: str) -> Path:
        """The real place of a folder that may be read.

        Raises:
            SourceForbiddenError: it does not lie below a root; what is there is not told.
            AdapterSourceError: there is no adapter.
        """
        try:
            real = Path(os.path.realpath(path))
        except ValueError as error:
            raise AdapterSourceError(f"{path!r}: expected a path that can exist, found {error}") from error
        if not any(real.is_relative_to(os.path.realpath(root)) for root in self.roots):
            raise SourceForbiddenError(
                f"{path!r}: expected a folder below {_list(self.roots)}, found one elsewhere"
            )
        if resolve(str(real)) != real:
            raise SourceForbiddenError(f"{path!r}: expected a folder that stays, found that it became a link")
        return real

    def url(self, url: str) -> SplitResult:
        """The parts of a URL that may be fetched.

        Raises:
            AdapterSourceError: it is none.
            SourceForbiddenError: it does not begin like an allowed one.
        """
        parts = split(url)
        if not parts.netloc or not any(_begins(parts, split(allowed)) for allowed in self.urls):
            raise SourceForbiddenError(
                f"{public(url)!r}: expected a URL that begins with {_list(self.urls)}, found another"
            )
        return parts

    def check_address(self, host: str, address: str) -> None:
        """Refuses to connect to an address that is neither public nor in an allowed network.

        Raises:
            SourceForbiddenError
        """
        found = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
            found = found.ipv4_mapped
        if not _is_public(found) and not any(found in network for network in self.networks):
            raise SourceForbiddenError(
                f"host {host!r}: expected a public address or one in {_list(self.networks)}, found {address}"
            )


class Deadline:
    """The end of a fetch's time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then.

        Raises:
            SourceUnavailableError: there are none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise SourceUnavailableError(f"expected the adapter within {self._seconds:g} s, found it slower")
        return left


def split(url: str) -> SplitResult:
    """The parts of a URL, of which host and path mean the same to whoever reads them.

    Raises:
        AdapterSourceError: it is none, or one that readers read differently.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AdapterSourceError(f"expected a URL, found {error}") from error
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
            f"{public(url)!r}: expected a URL of ASCII letters without user, password, fragment, chained "
            "protocols and dots for folders, found another"
        )
    return parts


def public(url: str) -> str:
    """A URL without what may be secret in it, for messages and records."""
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
    if isinstance(address, ipaddress.IPv6Address) and (
        address.sixtofour or address.teredo or address in _NAT64
    ):
        return False  # these lead to an address of version 4 that is not looked at
    return address.is_global and not address.is_multicast and not address.is_reserved


def _list(items: tuple[object, ...]) -> str:
    return ", ".join(str(item) for item in items) or "nowhere (nothing is allowed)"
