"""The client for asyncio."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

import grpc
from grpc import aio

from turret.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    pooling_pb2,
    pooling_pb2_grpc,
    prompts_pb2,
    prompts_pb2_grpc,
)
from turret_client._channel import CHANNEL_OPTIONS, DEFAULT_ADDRESS, connection
from turret_client._chat import chat_of, chat_request
from turret_client._messages import (
    adapter_from,
    chunk_from,
    detokenize_request,
    download_from,
    generate_request,
    generation_from,
    message_of,
    model_from,
    pin_request,
    pinned_prompt_from,
    tokenize_request,
)
from turret_client._pooling import (
    batch_of,
    classifications_from,
    embed_request,
    embeddings_from,
    scores_from,
    tags_from,
)
from turret_client._status import call_scope
from turret_client._upload import AdapterFolder, num_bytes
from turret_client.errors import CancelledError, TurretError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from turret.v1 import inference_pb2
    from turret_client._channel import ConnectionOptions, Metadata
    from turret_client._chat import ChatGenerationOptions, ChatMessages, ChatOptions
    from turret_client._options import AdapterArgument, BatchOptions, GenerationOptions
    from turret_client._pooling import Input
    from turret_client._results import (
        Adapter,
        Chunk,
        Classifications,
        Download,
        Embeddings,
        Generation,
        Model,
        PinnedPrompt,
        Scores,
        Tags,
    )

_PAGE_SIZE = 1000  # the largest that servers allow
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncClient:
    """Calls a Turret server from an event loop.

    Tasks of one event loop may share a client. Cancelling a task cancels its call.

    Every method that calls the server raises a `turret_client.TurretError` if the call fails:
    `UnavailableError` if the server cannot be reached, `InvalidArgumentError` if an argument is not of its
    type, `CancelledError` if the client is closed, and the errors that the method lists.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, **options: Unpack[ConnectionOptions]) -> None:
        """Creates a client of the server at `address`; the first call connects.

        Args:
            address: HOST:PORT of the server.
            **options: Tenant, API key and TLS; see `ConnectionOptions`.

        Raises:
            InvalidArgumentError: The address is not HOST:PORT, the tenant or the API key contains characters
                that gRPC cannot send, or only one of `cert` and `key` is given.
            OSError: A certificate file cannot be read.
        """
        found = connection(address, **options)
        channel = (
            aio.secure_channel(address, found.credentials, options=CHANNEL_OPTIONS)
            if found.credentials
            else aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        )
        self._use(channel, address, found.metadata)

    def _use(self, channel: aio.Channel, address: str, metadata: Metadata) -> None:
        """Make all calls on a channel, to what messages call `address`."""
        self.address = address
        self._is_closed = False
        self._metadata = metadata
        self._channel = channel
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        self._prompts = prompts_pb2_grpc.PromptServiceStub(self._channel)
        self._model = model_pb2_grpc.ModelServiceStub(self._channel)
        self._pooling = pooling_pb2_grpc.PoolingServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels running calls and closes the connection."""
        self._is_closed = True
        await self._channel.close(None)

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 -- the call's gRPC deadline
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """Returns the whole generation when it has finished.

        Args:
            prompt: Text, or token ids that are used unchanged.
            timeout: Deadline of the call in seconds; None is none.
            **options: Adapter, sampling and the rest; see `GenerationOptions`.

        Raises:
            InvalidArgumentError: A field is out of its range, or prompt and answer exceed the context.
            NotFoundError: The adapter does not exist.
            FailedPreconditionError: The request and its adapters do not fit into the server's memory.
            ResourceExhaustedError: The tenant's queue is full or a quota is used up; see `retry_after`.
            DeadlineExceededError: `timeout` passed.
        """
        request = generate_request(prompt, **options)
        return generation_from(await self._answer(self._inference.Generate, request, timeout=timeout))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[Chunk]:
        """Yields the generation in chunks as they arrive.

        The call and its `timeout` start with the first chunk that is read.
        Closing the generator cancels the call; use `contextlib.aclosing` to close it in time.

        Arguments and errors are those of `generate`; the iteration raises the errors.
        """
        request = generate_request(prompt, **options)
        return self._chunks(request, timeout)

    async def chat(
        self,
        messages: ChatMessages,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 -- the call's gRPC deadline
        **options: Unpack[ChatGenerationOptions],
    ) -> Generation:
        """Returns the answer to a chat when it has finished; `Generation.message` is the next message.

        The chat template of the model makes the prompt, or that of the first adapter that has its own.

        Args:
            messages: In OpenAI's form: mappings with `role` ("system", "developer", "user", "assistant" or
                "tool") and `content` (a text, or a list of text parts); those of assistants may have
                `tool_calls` and `reasoning`, those of tools have `tool_call_id`; all may have `name`.
            timeout: Deadline of the call in seconds; None is none.
            **options: Those of a chat, see `ChatOptions`, and of a generation, see `GenerationOptions`.

        Raises:
            InvalidArgumentError: A field is invalid, the chat template refuses the messages, or prompt and
                answer exceed the context.
            NotFoundError: The adapter does not exist.
            FailedPreconditionError: There is no chat template, or the request and its adapters do not fit
                into the server's memory.
            ResourceExhaustedError: The tenant's queue is full or a quota is used up; see `retry_after`.
            DeadlineExceededError: `timeout` passed.
        """
        request = chat_request(messages, options)
        return generation_from(await self._answer(self._inference.Generate, request, timeout=timeout))

    def stream_chat(
        self,
        messages: ChatMessages,
        *,
        timeout: float | None = None,
        **options: Unpack[ChatGenerationOptions],
    ) -> AsyncGenerator[Chunk]:
        """Yields the answer to a chat in chunks as they arrive.

        The call and its `timeout` start with the first chunk that is read.
        Closing the generator cancels the call; use `contextlib.aclosing` to close it in time.

        Arguments and errors are those of `chat`; the iteration raises the errors.
        """
        return self._chunks(chat_request(messages, options), timeout)

    async def embed(
        self,
        inputs: Sequence[Input],
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 -- the call's gRPC deadline
        **options: Unpack[BatchOptions],
    ) -> Embeddings:
        """Returns a vector of each input.

        Args:
            inputs: Each is a text, a pair of texts, or token ids that are used unchanged.
            pooling: How the states of tokens become a vector, one of `Pooling`. None is as the model's files
                for sentence-transformers say; else the mean on encoders, the last token on decoders.
            normalize: Scale vectors to length 1. None is as those files say, else True.
            dimensions: Numbers of each vector, for models that were trained to be cut; None is all.
            timeout: Deadline of the call in seconds; None is none.
            **options: Adapter and the rest; see `BatchOptions`.

        Raises:
            InvalidArgumentError: A field is out of its range, or an input exceeds the context; see
                `truncate`.
            NotFoundError: The adapter does not exist.
            FailedPreconditionError: The model cannot do it, or the request does not fit into its memory.
            ResourceExhaustedError: The tenant's queue is full or a quota is used up; see `retry_after`.
            DeadlineExceededError: `timeout` passed.
        """
        batch = batch_of(inputs, options)
        request = embed_request(batch, pooling, normalize=normalize, dimensions=dimensions)
        return embeddings_from(await self._answer(self._pooling.Embed, request, timeout=timeout))

    async def classify(
        self,
        inputs: Sequence[Input],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 -- the call's gRPC deadline
        **options: Unpack[BatchOptions],
    ) -> Classifications:
        """Returns the class of each input, by the head of the adapter or of the model.

        Arguments and errors are those of `embed`. FailedPreconditionError also: there is no head for it.
        """
        request = pooling_pb2.ClassifyRequest(batch=batch_of(inputs, options))
        return classifications_from(await self._answer(self._pooling.Classify, request, timeout=timeout))

    async def tag(
        self,
        inputs: Sequence[Input],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 -- the call's gRPC deadline
        **options: Unpack[BatchOptions],
    ) -> Tags:
        """Returns the label of each token of the inputs, and spans of tokens with the same label.

        Arguments and errors are those of `embed`. FailedPreconditionError also: there is no head for it.
        """
        request = pooling_pb2.TagRequest(batch=batch_of(inputs, options))
        return tags_from(await self._answer(self._pooling.Tag, request, timeout=timeout))

    async def score(
        self,
        inputs: Sequence[Input],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 -- the call's gRPC deadline
        **options: Unpack[BatchOptions],
    ) -> Scores:
        """Returns the score of each pair of texts, by a head with one label, as rerankers have.

        Arguments and errors are those of `embed`. FailedPreconditionError also: there is no head for it.
        """
        request = pooling_pb2.ScoreRequest(batch=batch_of(inputs, options))
        return scores_from(await self._answer(self._pooling.Score, request, timeout=timeout))

    async def model(self) -> Model:
        """Returns what the server serves, and the limits of the tenant's requests."""
        response = await self._answer(self._model.GetModel, model_pb2.GetModelRequest())
        return model_from(response.model)

    async def tokenize(
        self,
        prompt: str | ChatMessages,
        *,
        adapter: AdapterArgument = None,
        add_special_tokens: bool | None = None,
        **options: Unpack[ChatOptions],
    ) -> tuple[int, ...]:
        """Returns the tokens of a prompt, as a generation has them.

        Args:
            prompt: Text, or the messages of a chat as in `chat`.
            adapter: As in `generate`: an adapter may have tokens and a chat template of its own.
            add_special_tokens: As in `generate`; for text only.
            **options: For chats, see `ChatOptions`.

        Raises:
            InvalidArgumentError: A field is invalid, the chat template refuses the messages, or the prompt
                exceeds the context.
            NotFoundError: The adapter does not exist.
            FailedPreconditionError: There is no chat template.
        """
        text = prompt if isinstance(prompt, str) else chat_of(prompt, **options)
        request = tokenize_request(text, adapter=adapter, add_special_tokens=add_special_tokens)
        response = await self._answer(self._model.Tokenize, request)
        return tuple(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, adapter: AdapterArgument = None) -> str:
        """Returns the text of tokens, with special tokens.

        Args:
            token_ids: The tokens.
            adapter: As in `generate`: an adapter may have tokens of its own.

        Raises:
            InvalidArgumentError: There are none, more than the context has, or one is not in the vocabulary.
            NotFoundError: The adapter does not exist.
        """
        request = detokenize_request(token_ids, adapter=adapter)
        return (await self._answer(self._model.Detokenize, request)).text

    async def load_adapter(self, name: str, path: str) -> Adapter:
        """Serves the peft adapter at `path` under `name`.

        If the name is in use, new requests use the new revision at once; in-flight requests finish on theirs.

        Args:
            name: Name of the adapter.
            path: A folder on the server, "owner/name" or "hf://owner/name@revision" of the Hugging Face hub,
                or the URL of a folder or archive. The server must allow the source.

        Raises:
            InvalidArgumentError: The name or the adapter's files are invalid.
            NotFoundError: The source does not exist.
            FailedPreconditionError: The adapter does not match the server's model or memory.
        """
        request = message_of(adapters_pb2.LoadAdapterRequest, name=name, path=path)
        response = await self._answer(self._adapters.LoadAdapter, request)
        return adapter_from(response.adapter)

    async def upload_adapter(
        self, name: str, folder: str | Path, *, progress: Callable[[int, int], None] | None = None
    ) -> Adapter:
        """Uploads the adapter in a local folder and serves it under `name`, as `load_adapter` does.

        An interrupted upload of the same files is continued.

        Args:
            name: Name of the adapter.
            folder: Contains `adapter_config.json` and `adapter_model.safetensors`, as peft saves them. The
                tokenizer's files are sent too, if there are any.
            progress: Called on another thread with the bytes sent so far and the total.

        Raises:
            InvalidArgumentError: The name or the adapter's files are invalid.
            FailedPreconditionError: The adapter does not match the server's model or memory.
            ResourceExhaustedError: The server's store is full.
            UnavailableError: The server cannot be reached, or another call uploads the same files.
            OSError: A file is missing or unreadable, or changes while it is sent.
        """
        files = AdapterFolder(name, Path(folder), progress)
        start = await asyncio.to_thread(files.start)
        # The server's first answer: the offset to send from. None if the call ends before.
        offsets: asyncio.Queue[int | None] = asyncio.Queue()
        unread: list[OSError] = []

        async def requests() -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
            yield start
            offset = await offsets.get()
            if offset is None:
                return
            chunks = files.chunks(offset, start.start)
            try:
                while chunk := await asyncio.to_thread(next, chunks, None):
                    yield chunk
            except OSError as error:  # gRPC would hide it
                unread.append(error)

        self._check_open()
        call = self._adapters.UploadAdapter(requests(), metadata=self._metadata)
        try:
            with call_scope(call, self.address):
                responses = aiter(call)
                offsets.put_nowait((await anext(responses)).offset)
                adapter = adapter_from((await anext(responses)).adapter)
        except TurretError as error:
            if unread:
                raise unread[0] from error
            raise
        finally:
            offsets.put_nowait(None)
        size = num_bytes(start.start)
        files.report(size, size)
        return adapter

    async def unload_adapter(self, name: str) -> Adapter:
        """Removes the name; in-flight requests finish.

        Raises:
            NotFoundError: The adapter does not exist.
        """
        request = message_of(adapters_pb2.UnloadAdapterRequest, name=name)
        response = await self._answer(self._adapters.UnloadAdapter, request)
        return adapter_from(response.adapter)

    async def rollback_adapter(self, name: str, revision: str | None = None) -> Adapter:
        """Makes an earlier revision current again and removes the later ones from the history.

        Args:
            name: Name of the adapter.
            revision: The first 8 or more digits of the revision; None is the one before the current.

        Raises:
            NotFoundError: The adapter does not exist, or its history has no such earlier revision.
        """
        request = message_of(adapters_pb2.RollbackAdapterRequest, name=name, revision=revision)
        response = await self._answer(self._adapters.RollbackAdapter, request)
        return adapter_from(response.adapter)

    async def set_traffic_split(self, name: str, revision: str, percent: int) -> Adapter:
        """Sends a percentage of the adapter's requests to another revision of its history.

        Requests with the same `routing_key` use the same revision.

        Args:
            name: Name of the adapter.
            revision: The first 8 or more digits of a revision that is not current; "" if `percent` is 0.
            percent: Percentage of the requests, from 0 to 100; 0 ends the split.

        Raises:
            InvalidArgumentError: `percent` is out of its range, or `revision` is not a revision's beginning.
            NotFoundError: The adapter does not exist, or its history has no such other revision.
        """
        request = message_of(
            adapters_pb2.SetTrafficSplitRequest, name=name, revision=revision, percent=percent
        )
        response = await self._answer(self._adapters.SetTrafficSplit, request)
        return adapter_from(response.adapter)

    async def get_adapter(self, name: str) -> Adapter:
        """Returns the adapter that the server has under the name.

        Raises:
            NotFoundError: The adapter does not exist.
        """
        request = message_of(adapters_pb2.GetAdapterRequest, name=name)
        response = await self._answer(self._adapters.GetAdapter, request)
        return adapter_from(response.adapter)

    async def list_adapters(self) -> list[Adapter]:
        """Returns all adapters, sorted by name."""
        adapters: list[Adapter] = []
        request = message_of(adapters_pb2.ListAdaptersRequest, page_size=_PAGE_SIZE)
        while True:
            page = await self._answer(self._adapters.ListAdapters, request)
            adapters.extend(map(adapter_from, page.adapters))
            if not page.next_page_token:
                return adapters
            request.page_token = page.next_page_token

    async def list_downloads(self) -> list[Download]:
        """Returns the running downloads of the adapters that the tenant may load, sorted by name."""
        response = await self._answer(self._adapters.ListDownloads, adapters_pb2.ListDownloadsRequest())
        return [download_from(download) for download in response.downloads]

    async def watch_adapters(self) -> AsyncGenerator[Adapter]:
        """Yields every adapter once, then each adapter after every change; without histories.

        The call starts with the first adapter that is read.
        Closing the generator cancels the call; use `contextlib.aclosing` to close it in time.
        A removed adapter is yielded a last time with the state UNLOADED.

        Raises:
            ResourceExhaustedError: Changes arrived faster than they were read; watch again.
        """
        self._check_open()
        call = self._adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(), metadata=self._metadata)
        with call_scope(call, self.address):
            async for response in call:
                yield adapter_from(response.adapter)

    async def pin_prompt(
        self,
        name: str,
        prompt: str | Sequence[int],
        *,
        adapter: AdapterArgument = None,
        cache_salt: str = "",
        add_special_tokens: bool | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 -- the call's gRPC deadline
    ) -> PinnedPrompt:
        """Computes a prompt and keeps it in memory: requests that begin with it compute only the rest.

        It is kept until it is unpinned, or its adapter is replaced or unloaded. A prompt that is already
        pinned under the name is replaced.

        Args:
            name: Name of the pinned prompt.
            prompt: Text, or token ids that are used unchanged; its whole blocks are kept.
            adapter: As in `generate`; only requests with the same adapters and weights use the prompt.
            cache_salt: As in `generate`; only requests with the same salt use the prompt.
            add_special_tokens: As in `generate`.
            timeout: Deadline of the call in seconds; None is none.

        Raises:
            InvalidArgumentError: The name is invalid, or the prompt is shorter than a block or exceeds the
                context.
            NotFoundError: The adapter does not exist.
            FailedPreconditionError: The server's limit for pinned memory is reached.
            ResourceExhaustedError: The tenant's queue is full or a quota is used up; see `retry_after`.
            DeadlineExceededError: `timeout` passed.
        """
        request = pin_request(
            name,
            prompt,
            adapter=adapter,
            cache_salt=cache_salt,
            add_special_tokens=add_special_tokens,
        )
        response = await self._answer(self._prompts.PinPrompt, request, timeout=timeout)
        return pinned_prompt_from(response.prompt)

    async def unpin_prompt(self, name: str) -> None:
        """Removes a pinned prompt; its blocks stay in the prefix cache until their memory is needed.

        Raises:
            NotFoundError: No prompt is pinned under the name; it may have been removed with its adapter.
        """
        await self._answer(self._prompts.UnpinPrompt, message_of(prompts_pb2.UnpinPromptRequest, name=name))

    async def list_pinned_prompts(self) -> list[PinnedPrompt]:
        """Returns the tenant's pinned prompts, sorted by name."""
        request = prompts_pb2.ListPinnedPromptsRequest()
        response = await self._answer(self._prompts.ListPinnedPrompts, request)
        return [pinned_prompt_from(prompt) for prompt in response.prompts]

    def _check_open(self) -> None:
        if self._is_closed:
            raise CancelledError("the client is closed; make another", code=grpc.StatusCode.CANCELLED)

    async def _answer(
        self,
        method: aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None = None,  # noqa: ASYNC109 -- the call's gRPC deadline
    ) -> _Response:
        self._check_open()
        call = method(request, timeout=timeout, metadata=self._metadata)
        with call_scope(call, self.address):
            return await call

    async def _chunks(
        self,
        request: inference_pb2.GenerateRequest,
        timeout: float | None,  # noqa: ASYNC109 -- the call's gRPC deadline
    ) -> AsyncGenerator[Chunk]:
        self._check_open()
        call = self._inference.GenerateStream(request, timeout=timeout, metadata=self._metadata)
        with call_scope(call, self.address):
            async for response in call:
                yield chunk_from(response)
