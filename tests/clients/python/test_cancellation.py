from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import grpc
import pytest

from support import scripted_server as script
from support.prompts import until
from turret_client import AsyncClient, CancelledError, Client, UnavailableError

HANG_S = 60
"""Ends a failing test."""


@pytest.fixture(autouse=True)
def holding(server):
    server.hold = True


def ended(server) -> bool:
    return server.ended.wait(HANG_S)


async def async_ended(server) -> bool:
    return await asyncio.to_thread(ended, server)


def test_leaving_the_loop_cancels(server):
    with Client(server.address) as client:
        for chunk in client.stream("Hello"):
            assert chunk.text == "Ahoy, "
            break
        assert ended(server)


def test_closing_the_stream_cancels(server):
    with Client(server.address) as client:
        stream = client.stream("Hello")
        next(stream)
        stream.close()
        assert ended(server)


def test_a_stream_that_nobody_reads_makes_no_call(server):
    with Client(server.address) as client:
        client.stream("Hello").close()
        server.hold = False
        client.generate("Another")
        assert [request.text for request in server.requests] == ["Another"]


INTERRUPTED = """
import faulthandler, signal, sys
from turret_client import Client

faulthandler.register(signal.SIGUSR1, file=open(sys.argv[1], "w"))
signal.signal(signal.SIGINT, signal.default_int_handler)
client = Client(sys.argv[2])
try:
    result = getattr(client, sys.argv[3])(*sys.argv[4:])
    for chunk in [] if sys.argv[3] == "generate" else result:
        pass
except KeyboardInterrupt as interrupt:
    kept = interrupt  # and with it the frames, so that no destructor cancels the call
    print("interrupted", flush=True)
    sys.stdin.read()
"""


def waits_for_the_server(process, stacks) -> bool:
    """Whether one of the stacks that SIGUSR1 writes is in the client's wait for a response. An interrupt
    before it, between the start of a call and the wait, would find nothing that cancels the call.
    """
    process.send_signal(signal.SIGUSR1)
    return any("_sync.py" in each and "_waiting.py" in each for each in stacks.read_text().split("\n\n"))


@pytest.mark.parametrize(
    "call",
    [("generate", "Hello"), ("stream", "Hello"), ("watch_adapters",), ("upload_adapter", "pirate")],
    ids=lambda call: call[0],
)
def test_ctrl_c_cancels_while_the_process_goes_on(server, tmp_path, call):
    if call[0] == "upload_adapter":
        (tmp_path / "adapter_config.json").write_bytes(b"{}")
        (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors")
        call = (*call, str(tmp_path))
    stacks = tmp_path / "stacks"
    with subprocess.Popen(  # noqa: S603 (our own code)
        [sys.executable, "-c", INTERRUPTED, str(stacks), server.address, *call],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert server.began.wait(HANG_S)
        until(lambda: waits_for_the_server(process, stacks))
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert ended(server)
        process.communicate("")


INTERRUPTED_OFTEN = """
import contextlib, signal, sys
from turret_client import Client

signal.signal(signal.SIGALRM, signal.default_int_handler)
with Client(sys.argv[1]) as client:
    for round in range(60):
        with contextlib.suppress(KeyboardInterrupt):
            for number, _ in enumerate(client.stream("Hello")):
                if number == 3:
                    signal.setitimer(signal.ITIMER_REAL, 0.001 + round * 1e-4)
        print(len(client.list_adapters()), flush=True)
"""


def test_ctrl_c_in_the_middle_of_a_response_leaves_the_client_as_it_was(server):
    """gRPC alone keeps a lock for ever in one of ten or twenty."""
    server.hold, server.endless = False, True
    client = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", INTERRUPTED_OFTEN, server.address],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=HANG_S,
    )
    assert client.stdout.split() == ["1"] * 60


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_leaving_the_clients_block_cancels(server, method):
    with ThreadPoolExecutor() as pool:
        with Client(server.address) as client:
            call = pool.submit(
                lambda: list(client.stream("Hello")) if method == "stream" else client.generate("Hello")
            )
            assert server.began.wait(HANG_S)
        with pytest.raises(CancelledError):
            call.result()
    assert ended(server)


async def test_async_leaving_the_clients_block_cancels(server):
    async with AsyncClient(server.address) as client:
        call = asyncio.create_task(client.generate("Hello"))
        await asyncio.to_thread(server.began.wait, HANG_S)
    with pytest.raises(CancelledError):
        await call
    assert await async_ended(server)


def test_an_upload_that_fails_leaves_no_thread(call_at, server, tmp_path):
    """The thread or task that sends waits for the offset to send from, which never arrives."""
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors")
    server.hold = False
    server.failure = script.failure(grpc.StatusCode.UNAVAILABLE, "stopping", reason="SHUTTING_DOWN")

    def upload() -> None:
        with pytest.raises(UnavailableError):
            call_at(server.address, "upload_adapter", "pirate", tmp_path)

    def threads() -> set[threading.Thread]:
        pools = ("ThreadPoolExecutor", "asyncio")
        return {thread for thread in threading.enumerate() if not thread.name.startswith(pools)}

    upload()
    before = threads()
    for _ in range(3):
        upload()
    until(lambda: threads() <= before)


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_closing_the_client_cancels(server, method):
    client = Client(server.address)
    closer = threading.Thread(target=lambda: (server.began.wait(HANG_S), client.close()))
    closer.start()
    with pytest.raises(CancelledError):
        for _ in [client.generate("Hello")] if method == "generate" else client.stream("Hello"):
            pass
    closer.join()
    assert ended(server)


async def test_async_leaving_the_loop_cancels(server):
    async with AsyncClient(server.address) as client:
        async for chunk in client.stream("Hello"):
            assert chunk.text == "Ahoy, "
            break
        assert await async_ended(server)


async def test_async_closing_the_stream_cancels(server):
    async with AsyncClient(server.address) as client:
        async with aclosing(client.stream("Hello")) as stream:
            await anext(stream)
        assert await async_ended(server)


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_cancelling_the_task_cancels(server, method):
    async with AsyncClient(server.address) as client:

        async def consume() -> None:
            if method == "generate":
                await client.generate("Hello")
            async for _ in client.stream("Hello"):
                pass

        task = asyncio.create_task(consume())
        await asyncio.to_thread(server.began.wait, HANG_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await async_ended(server)


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_async_closing_the_client_cancels(server, method):
    client = AsyncClient(server.address)

    async def consume() -> None:
        if method == "generate":
            await client.generate("Hello")
        async for _ in client.stream("Hello"):
            pass

    task = asyncio.create_task(consume())
    await asyncio.to_thread(server.began.wait, HANG_S)
    await client.close()
    with pytest.raises(CancelledError):
        await task
    assert await async_ended(server)
