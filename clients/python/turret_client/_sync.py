"""The blocking client."""

from __future__ import annotations

from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

import grpc

from turret.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2_grpc,
    prompts_pb2,
    prompts_pb2_grpc,
)
from turret_client._channel import CHANNEL_OPTIONS, DEFAULT_ADDRESS, connection
from turret_client._messages import (
    adapter_from,
    chunk_from,
    download_from,
    generate_request,
    generation_from,
    pin_request,
    pinned_prompt_from,
)
from turret_client._status import raising_turret_errors
from turret_client._upload import AdapterFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from turret.v1 import inference_pb2
    from turret_client._channel import ConnectionOptions
    from turret_client._options import AdapterArgument, GenerationOptions
    from turret_client._results import Adapter, Chunk, Download, Generation, PinnedPrompt

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Client:
    """Calls a Turret server and blocks until it answers.

    Threads may share one client. Every method that calls the server raises a
    `turret_client.TurretError` where the call does not succeed: `UnavailableError` where no server
    answers, and what each method names beside it.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, **options: Unpack[ConnectionOptions]) -> None:
        """Makes a client of the server at `address`, HOST:PORT. The first call connects.

        See `ConnectionOptions` for tenants, keys and encryption. What cannot be sent is refused here.
        """
        found = connection(**options)
        self.address = address
        self._metadata = found.metadata
        self._channel = (
            grpc.secure_channel(address, found.credentials, options=CHANNEL_OPTIONS)
            if found.credentials
            else grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        )
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        self._prompts = prompts_pb2_grpc.PromptServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the calls that still run and closes the connection."""
        self._channel.close()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """Generates to the end, then answers.

        Args:
            prompt: Text, or token ids that are used as they are.
            timeout: Seconds until the call is given up; None is never.
            **options: See `GenerationOptions`.

        Raises:
            InvalidArgumentError: A field has a value that it cannot have, or the prompt is too long.
            NotFoundError: No adapter has that name.
            FailedPreconditionError: Request and adapter do not fit into the server's memory.
            ResourceExhaustedError: Too much of the tenant waits; `retry_after` says when to try again.
            DeadlineExceededError: `timeout` passed.
        """
        request = generate_request(prompt, **options)
        return generation_from(self._answer(self._inference.Generate, request, timeout=timeout))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generator[Chunk]:
        """Generates and yields what is new as it comes.

        The call begins with the first chunk that is asked for; `timeout` runs from there. Leaving the
        loop early, or closing the generator, cancels it at once.

        The arguments and errors are those of `generate`; the errors come from the iteration.
        """
        request = generate_request(prompt, **options)
        return self._chunks(request, timeout)

    def load_adapter(self, name: str, path: str) -> Adapter:
        """Serves the peft adapter at `path` under `name`.

        `path` is a folder of the server's machine, "owner/name" or "hf://owner/name@revision" of the Hugging
        Face hub, or the URL of a folder or archive, as far as the server allows it. A name in use flips to
        the new revision at once; requests that began on the old one end on it.

        Raises:
            InvalidArgumentError: The name or the folder cannot be an adapter's; the message says why.
            NotFoundError: There is no adapter at that place.
            FailedPreconditionError: The adapter does not go with this server's model or memory.
        """
        request = adapters_pb2.LoadAdapterRequest(name=name, path=path)
        return adapter_from(self._answer(self._adapters.LoadAdapter, request).adapter)

    def upload_adapter(
        self, name: str, folder: str | Path, *, progress: Callable[[int, int], None] | None = None
    ) -> Adapter:
        """Sends the adapter in a folder of this machine to the server and serves it under `name`.

        Where an upload of the same files stopped early, it goes on there. Otherwise as `load_adapter`.

        Args:
            name: The name that requests give.
            folder: With `adapter_config.json` and `adapter_model.safetensors`, as peft saves them.
            progress: Is told the bytes of tensors that are sent and those in all, on another thread.

        Raises:
            InvalidArgumentError: The name or the files cannot be an adapter's; the message says why.
            FailedPreconditionError: The adapter does not go with this server's model or memory.
            ResourceExhaustedError: The server has no room for it.
            UnavailableError: No server answers, or another call uploads the same.
            OSError: A file is missing or cannot be read.
        """
        files = AdapterFolder(name, Path(folder), progress)
        start = files.start()
        wanted: Queue[int | None] = Queue()

        def requests() -> Iterator[adapters_pb2.UploadAdapterRequest]:
            yield start
            offset = wanted.get()
            if offset is not None:
                yield from files.chunks(offset, start.start.size)

        call = self._adapters.UploadAdapter(requests(), metadata=self._metadata)
        try:
            with raising_turret_errors(self.address):
                responses = iter(call)
                wanted.put(next(responses).offset)
                adapter = adapter_from(next(responses).adapter)
        finally:
            wanted.put(None)
            call.cancel()  # type: ignore[no-untyped-call]
        files.tell(start.start.size, start.start.size)
        return adapter

    def unload_adapter(self, name: str) -> Adapter:
        """Takes the name away. Requests that run on the adapter end on it.

        Raises:
            NotFoundError: No adapter has that name.
        """
        request = adapters_pb2.UnloadAdapterRequest(name=name)
        return adapter_from(self._answer(self._adapters.UnloadAdapter, request).adapter)

    def rollback_adapter(self, name: str, revision: str | None = None) -> Adapter:
        """Serves an earlier revision under the name again and forgets those after it.

        Args:
            name: The adapter's name.
            revision: The first 8 or more digits of the one to go back to; None is that before the current.

        Raises:
            NotFoundError: No adapter has that name, or none such is before its current revision.
        """
        request = adapters_pb2.RollbackAdapterRequest(name=name, revision=revision or "")
        return adapter_from(self._answer(self._adapters.RollbackAdapter, request).adapter)

    def set_traffic_split(self, name: str, revision: str, percent: int) -> Adapter:
        """Makes `percent` of the name's requests, from 0 to 100, go to another revision of its history.

        Requests with the same `routing_key` go to the same revision.

        Args:
            name: The adapter's name.
            revision: The first 8 or more digits of one that is not the current one; "" where percent is 0.
            percent: How many of a hundred requests go to it; 0 ends the split.

        Raises:
            InvalidArgumentError: The percent or the revision cannot be.
            NotFoundError: No adapter has that name, or it has no such other revision.
        """
        request = adapters_pb2.SetTrafficSplitRequest(name=name, revision=revision, percent=percent)
        return adapter_from(self._answer(self._adapters.SetTrafficSplit, request).adapter)

    def get_adapter(self, name: str) -> Adapter:
        """What the server has under the name.

        Raises:
            NotFoundError: No adapter has that name.
        """
        request = adapters_pb2.GetAdapterRequest(name=name)
        return adapter_from(self._answer(self._adapters.GetAdapter, request).adapter)

    def list_adapters(self) -> list[Adapter]:
        """All adapters in the order of their names."""
        adapters: list[Adapter] = []
        request = adapters_pb2.ListAdaptersRequest()
        while True:
            page = self._answer(self._adapters.ListAdapters, request)
            adapters.extend(map(adapter_from, page.adapters))
            if not page.next_page_token:
                return adapters
            request.page_token = page.next_page_token

    def list_downloads(self) -> list[Download]:
        """What the server is bringing from its source now, of the names that the tenant may load."""
        response = self._answer(self._adapters.ListDownloads, adapters_pb2.ListDownloadsRequest())
        return [download_from(download) for download in response.downloads]

    def watch_adapters(self) -> Generator[Adapter]:
        """Yields every adapter as it is, then each as it is after every change of it, without its history.

        The call begins with the first that is asked for. Leaving the loop early, or closing the generator,
        ends it. An adapter that is gone comes a last time, UNLOADED.

        Raises:
            ResourceExhaustedError: Changes came faster than they were taken; watch again.
        """
        call = self._adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(), metadata=self._metadata)
        try:
            with raising_turret_errors(self.address):
                for response in call:
                    yield adapter_from(response.adapter)
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    def pin_prompt(
        self,
        name: str,
        prompt: str | Sequence[int],
        *,
        adapter: AdapterArgument = None,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> PinnedPrompt:
        """Computes a prompt and keeps it in memory: requests that begin with it compute only the rest.

        It stays until it is unpinned, or its adapter is replaced or unloaded. A name in use is pinned anew.

        Args:
            name: What to unpin it by.
            prompt: Text, or token ids that are used as they are; whole blocks of it are kept.
            adapter: As in `generate`; only requests with the same adapters and weights find the prompt.
            cache_salt: As in `generate`; only requests with the same salt find the prompt.
            timeout: Seconds until the call is given up; None is never.

        Raises:
            InvalidArgumentError: The name cannot be one, or the prompt is shorter than a block, or too long.
            NotFoundError: No adapter has that name.
            FailedPreconditionError: Pinned prompts would take more of the server's memory than they may.
            ResourceExhaustedError: Too much of the tenant waits; `retry_after` says when to try again.
            DeadlineExceededError: `timeout` passed.
        """
        request = pin_request(name, prompt, adapter=adapter, cache_salt=cache_salt)
        response = self._answer(self._prompts.PinPrompt, request, timeout=timeout)
        return pinned_prompt_from(response.prompt)

    def unpin_prompt(self, name: str) -> None:
        """Lets a pinned prompt go when its memory is needed, like any other.

        Raises:
            NotFoundError: No prompt is pinned under that name; it may have gone with its adapter.
        """
        self._answer(self._prompts.UnpinPrompt, prompts_pb2.UnpinPromptRequest(name=name))

    def list_pinned_prompts(self) -> list[PinnedPrompt]:
        """Pinned prompts in the order of their names."""
        request = prompts_pb2.ListPinnedPromptsRequest()
        response = self._answer(self._prompts.ListPinnedPrompts, request)
        return [pinned_prompt_from(prompt) for prompt in response.prompts]

    def _answer(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None = None,
    ) -> _Response:
        call = method.future(request, timeout=timeout, metadata=self._metadata)
        try:
            with raising_turret_errors(self.address):
                return call.result()
        finally:
            # An exception that ends the wait, such as KeyboardInterrupt, ends the call too.
            call.cancel()  # type: ignore[no-untyped-call]

    def _chunks(self, request: inference_pb2.GenerateRequest, timeout: float | None) -> Generator[Chunk]:
        call = self._inference.GenerateStream(request, timeout=timeout, metadata=self._metadata)
        try:
            with raising_turret_errors(self.address):
                yield from map(chunk_from, call)
        finally:
            call.cancel()  # type: ignore[no-untyped-call]
