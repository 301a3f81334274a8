"""Throughput of 32 concurrent streams over HTTP beside that over gRPC, in turns, on one server.

    PYTHONPATH=tests python -m service.measure_http [MODEL]

The model is a folder; without one it is the real model of the tests. Both clients do as little as they can:
they read every event, and take the number of tokens from the usage of the last one.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import grpc

from support.serving import ServerProcess, server_process
from turret.v1 import inference_pb2, inference_pb2_grpc
from turret_demo.real_model import real_model

_NUM_STREAMS = 32
_NUM_TOKENS = 50
_NUM_TURNS = 5
_PROMPT = "Chapter {}. It was a dark and stormy night, and the travellers began to tell a story:"


async def over_grpc(server: ServerProcess, number: int) -> int:
    async with grpc.aio.insecure_channel(server.address) as channel:
        request = inference_pb2.GenerateRequest(
            text=_PROMPT.format(number), max_tokens=_NUM_TOKENS, ignore_eos=True
        )
        num_tokens = 0
        async for chunk in inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(request):
            num_tokens = chunk.usage.generated_tokens
        return num_tokens


async def over_http(server: ServerProcess, number: int) -> int:
    url = urlsplit(server.http)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    body = json.dumps(
        {
            "prompt": _PROMPT.format(number),
            "max_tokens": _NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: turret\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )
    last = b""
    async for line in reader:
        if line.startswith(b"data: {"):
            last = line
    writer.close()
    return int(json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"])


async def turn(stream: Callable[[ServerProcess, int], Awaitable[int]], server: ServerProcess) -> float:
    """Tokens per second of all streams together."""
    began = time.monotonic()
    counts = await asyncio.gather(*(stream(server, number) for number in range(_NUM_STREAMS)))
    return sum(counts) / (time.monotonic() - began)


def measure(server: ServerProcess) -> None:
    doors = {"gRPC": over_grpc, "HTTP": over_http}
    rates: dict[str, list[float]] = {name: [] for name in doors}
    for number in range(_NUM_TURNS + 1):
        order = list(doors.items())
        for name, stream in order if number % 2 else order[::-1]:
            rate = asyncio.run(turn(stream, server))
            if number:  # the first warms up
                rates[name].append(rate)
                sys.stdout.write(f"{name} {rate:.1f}\n")
    medians = {name: statistics.median(found) for name, found in rates.items()}
    share = medians["HTTP"] / medians["gRPC"]
    sys.stdout.write(
        f"tokens per second of {_NUM_STREAMS} streams, median of {_NUM_TURNS}: "
        + ", ".join(f"{name} {rate:.1f}" for name, rate in medians.items())
        + f"; HTTP has {share:.1%} of gRPC\n"
    )


def main() -> None:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else real_model()
    with (
        TemporaryDirectory() as cache,
        server_process(
            model, Path(cache), "--memory", "1GiB", "--max-batch-requests", str(_NUM_STREAMS)
        ) as server,
    ):
        measure(server)


if __name__ == "__main__":
    main()
