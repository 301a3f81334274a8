"""The client for asyncio."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self, TypeVar

from grpc import StatusCode, aio

from turret.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc
from turret_client._channel import CHANNEL_OPTIONS, DEFAULT_ADDRESS
from turret_client._messages import adapter_from, chunk_from, generate_request, generation_from
from turret_client._status import raising_turret_errors
from turret_client.errors import CancelledError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence

    from turret.v1 import inference_pb2
    from turret_client._messages import AdapterArgument
    from turret_client._results import Adapter, Chunk, Generation

_Response = TypeVar("_Response")


class AsyncClient:
    """Calls a Turret server from an event loop.

    Tasks of one loop may share one client; make it inside that loop. Cancelling a task cancels its call.
    Every method that calls the server raises a `turret_client.TurretError` where the call does not
    succeed: `UnavailableError` where no server answers, and what each method names beside it.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """Makes a client of the server at `address`, HOST:PORT. The first call connects."""
        self.address = address
        self._channel = aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels the calls that still run and closes the connection."""
        await self._channel.close(None)

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: AdapterArgument = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        timeout: float | None = None,  # noqa: ASYNC109 -- the call's gRPC deadline
    ) -> Generation:
        """Generates to the end, then answers.

        Args:
            prompt: Text, or token ids that are used as they are.
            adapter: Name of the adapter, or an `AdapterRef`; several are composed; None is the base model.
            max_tokens: Most tokens to generate; None is 256, or what the context leaves if less.
            temperature: 0 is greedy.
            top_p: Nucleus sampling, 0 < top_p <= 1; None is 1.
            top_k: Sample among the k likeliest tokens; 0 is all.
            seed: Same seed, prompt, adapter revision and parameters: same tokens. None: the server's choice.
            stop: Generation ends before the first of these strings; at most 16.
            timeout: Seconds until the call is given up; None is never.

        Raises:
            InvalidArgumentError: A field has a value that it cannot have, or the prompt is too long.
            NotFoundError: No adapter has that name.
            FailedPreconditionError: Request and adapter do not fit into the server's memory.
            ResourceExhaustedError: Too many requests wait.
            DeadlineExceededError: `timeout` passed.
        """
        request = generate_request(
            prompt,
            adapter=adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
        )
        return generation_from(await self._answer(self._inference.Generate(request, timeout=timeout)))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: AdapterArgument = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        timeout: float | None = None,
    ) -> AsyncGenerator[Chunk]:
        """Generates and yields what is new as it comes.

        The call begins with the first chunk that is asked for; `timeout` runs from there. Closing the
        generator cancels it at once, and so does leaving the loop where nothing else holds the generator.
        `contextlib.aclosing` around it makes sure.

        The arguments and errors are those of `generate`; the errors come from the iteration.
        """
        request = generate_request(
            prompt,
            adapter=adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
        )
        return self._chunks(request, timeout)

    async def load_adapter(self, name: str, path: str) -> Adapter:
        """Serves the peft adapter in the folder `path` of the server's machine under `name`.

        A name in use flips to the new revision at once; requests that began on the old one end on it.

        Raises:
            InvalidArgumentError: The name or the folder cannot be an adapter's; the message says why.
            NotFoundError: There is no adapter in the folder.
            FailedPreconditionError: The adapter does not go with this server's model or memory.
        """
        request = adapters_pb2.LoadAdapterRequest(name=name, path=path)
        return adapter_from((await self._answer(self._adapters.LoadAdapter(request))).adapter)

    async def unload_adapter(self, name: str) -> Adapter:
        """Takes the name away. Requests that run on the adapter end on it.

        Raises:
            NotFoundError: No adapter has that name.
        """
        request = adapters_pb2.UnloadAdapterRequest(name=name)
        return adapter_from((await self._answer(self._adapters.UnloadAdapter(request))).adapter)

    async def get_adapter(self, name: str) -> Adapter:
        """What the server has under the name.

        Raises:
            NotFoundError: No adapter has that name.
        """
        request = adapters_pb2.GetAdapterRequest(name=name)
        return adapter_from((await self._answer(self._adapters.GetAdapter(request))).adapter)

    async def list_adapters(self) -> list[Adapter]:
        """All adapters in the order of their names."""
        adapters: list[Adapter] = []
        request = adapters_pb2.ListAdaptersRequest()
        while True:
            page = await self._answer(self._adapters.ListAdapters(request))
            adapters.extend(map(adapter_from, page.adapters))
            if not page.next_page_token:
                return adapters
            request.page_token = page.next_page_token

    async def _answer(self, call: Awaitable[_Response]) -> _Response:
        with self._raising_turret_errors():
            return await call

    async def _chunks(
        self,
        request: inference_pb2.GenerateRequest,
        timeout: float | None,  # noqa: ASYNC109 -- the call's gRPC deadline
    ) -> AsyncGenerator[Chunk]:
        call = self._inference.GenerateStream(request, timeout=timeout)
        try:
            with self._raising_turret_errors():
                async for response in call:
                    yield chunk_from(response)
        finally:
            call.cancel()

    @contextmanager
    def _raising_turret_errors(self) -> Iterator[None]:
        try:
            with raising_turret_errors(self.address):
                yield
        except asyncio.CancelledError as error:
            # gRPC raises this also where `close` ended the call. To the task that waited it is no
            # cancellation: nobody asked that task to end.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise CancelledError("the client was closed", code=StatusCode.CANCELLED) from error
