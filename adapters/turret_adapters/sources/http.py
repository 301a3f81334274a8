"""Files over HTTP, with the address check on the connection that is used.

httpcore takes a network backend: it resolves the host name once, checks the address and connects to it, and
limits each wait to the time that is left, so a host that sends a byte now and then does not extend it.
Certificates are still checked against the name.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import SplitResult, urljoin

import httpcore2

from turret_adapters.errors import AdapterSourceError, SourceUnavailableError
from turret_adapters.sources.policy import Deadline, Policy, public

MAX_REDIRECTS = 5
# A host that sends nothing for this long has failed, even if time is left.
SILENCE_SECONDS = 30.0

_MOVED = {
    HTTPStatus.MOVED_PERMANENTLY,
    HTTPStatus.FOUND,
    HTTPStatus.SEE_OTHER,
    HTTPStatus.TEMPORARY_REDIRECT,
    HTTPStatus.PERMANENT_REDIRECT,
}
_LATER = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}


@dataclass(frozen=True, slots=True)
class Body:
    """The body of a response; `size` is None if the host does not announce it."""

    size: int | None
    chunks: Iterator[bytes]


class HttpSource:
    """Reads files from hosts that a policy allows, and reuses connections."""

    def __init__(self, policy: Policy, deadline: Deadline) -> None:
        self._policy = policy
        self._pool = httpcore2.ConnectionPool(network_backend=_CheckedBackend(policy, deadline))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    @contextmanager
    def get(self, url: str) -> Iterator[Body]:
        """Opens a file.

        Raises:
            AdapterSourceError: it does not exist, or the host denies access.
            SourceForbiddenError: the policy does not allow it, or the target of a redirect.
            SourceUnavailableError: the host fails, or does not answer in time.
        """
        with _translated(url), ExitStack() as stack:
            target = url
            for _ in range(MAX_REDIRECTS + 1):
                response = stack.enter_context(self._request(self._policy.url(target)))
                if response.status not in _MOVED:
                    break
                target = urljoin(target, _header(response, b"location"))
                stack.close()
            yield _body(response, url)

    def _request(self, parts: SplitResult) -> Any:
        path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        assert parts.hostname, "the policy allows no URL without a host"
        url = httpcore2.URL(
            scheme=parts.scheme.encode(), host=parts.hostname.encode(), port=parts.port, target=path.encode()
        )
        headers: dict[str | bytes, str | bytes] = {
            "host": parts.netloc,
            "accept": "*/*",
            "accept-encoding": "identity",
            "user-agent": "turret",
        }
        return self._pool.stream("GET", url, headers=headers)


def _body(response: httpcore2.Response, url: str) -> Body:
    status = response.status
    if status != HTTPStatus.OK:
        found = f"{public(url)!r}: expected a file, found HTTP status {status}"
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _LATER:
            raise SourceUnavailableError(f"{found} (try again later)")
        raise AdapterSourceError(found)
    encoding = _header(response, b"content-encoding") or "identity"
    if encoding != "identity":
        raise AdapterSourceError(
            f"{public(url)!r}: expected a file without content encoding, found {encoding!r}"
        )
    length = _header(response, b"content-length")
    return Body(int(length) if length.isdecimal() else None, response.iter_stream())


def _header(response: httpcore2.Response, wanted: bytes) -> str:
    return next(
        (value.decode("latin-1").strip() for name, value in response.headers if name.lower() == wanted), ""
    )


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turns the network's errors into AdapterErrors."""
    try:
        yield
    except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
        found = str(error) or type(error).__name__
        raise SourceUnavailableError(
            f"{public(url)!r}: expected an answer, found: {found} (try again later)"
        ) from error
    except httpcore2.UnsupportedProtocol as error:
        raise AdapterSourceError(f"{public(url)!r}: expected http or https, found {error}") from error


class _CheckedBackend(httpcore2.NetworkBackend):
    """Connects only to addresses that the policy allows."""

    def __init__(self, policy: Policy, deadline: Deadline) -> None:
        self._policy = policy
        self._deadline = deadline
        self._backend = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 -- the deadline counts
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore2.ConnectError(f"host {host!r} does not resolve ({error.strerror})") from error
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        for address in addresses:
            self._policy.check_address(host, address)
        for address in addresses:
            try:
                stream = self._backend.connect_tcp(
                    address, port, _wait(self._deadline), local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if address == addresses[-1]:
                    raise
            else:
                return _TimedStream(stream, self._deadline)
        raise httpcore2.ConnectError(f"host {host!r} does not resolve")


class _TimedStream(httpcore2.NetworkStream):
    """A connection on which no wait exceeds the deadline."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        return self._stream.read(max_bytes, _wait(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        self._stream.write(buffer, _wait(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore2.NetworkStream:
        secure = self._stream.start_tls(ssl_context, server_hostname, _wait(self._deadline))
        return _TimedStream(secure, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _wait(deadline: Deadline) -> float:
    return min(SILENCE_SECONDS, deadline.left())
