"""HTTP/2's own frames (RFC 9113), for what no client library sends."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def field(name: bytes, value: bytes) -> bytes:
    """A header as HPACK writes it without its table and codes; both are shorter than 127 bytes."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def call_headers(method: str, *more: bytes) -> bytes:
    """Those of a gRPC call."""
    return b"".join(
        (
            field(b":method", b"POST"),
            field(b":scheme", b"http"),
            field(b":path", method.encode()),
            field(b":authority", b"turret"),
            field(b"content-type", b"application/grpc"),
            field(b"te", b"trailers"),
            *more,
        )
    )


def frames(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Kind and payload of all that comes until the server closes."""
    with connection.makefile("rb") as stream:
        while head := stream.read(9):
            yield head[3], stream.read(int.from_bytes(head[:3], "big"))


@contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(PREFACE + frame(SETTINGS))
        yield connection
