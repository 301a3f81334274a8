"""Adapters that clients send: first what will come, then the tensors from where an earlier upload stopped."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO, TypeVar

from turret_adapters.errors import SourceTooLargeError, UploadError
from turret_adapters.formats.files import write_whole
from turret_adapters.store.disk import errors_of_the_store
from turret_adapters.store.store import AdapterStore
from turret_adapters.store.uploads import Upload
from turret_server.errors import DeadlineError, InvalidRequestError, QuotaExceededError, TooManyCallsError
from turret_server.lifecycle.publishing import AdapterLifecycle
from turret_server.lifecycle.threads import LoadQueue, run_to_completion, wait_to_completion
from turret_server.tenancy.access import check_change
from turret_server.tenancy.tenants import Tenant, check_name

IDLE_SECONDS = 60.0
MIN_BYTES_PER_SECOND = 16 << 10
MAX_UPLOADS_PER_TENANT = 16
# Unlike other uploads, nobody announces how much of the disk they will take.
MAX_ARCHIVES = 4

_NUM_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadStart:
    """What will come: `digest` as `digest_of_folder` computes it, the whole `adapter_config.json`, and the
    bytes of `adapter_model.safetensors` and of each file of a tokenizer, which follow it in this order.
    """

    name: str
    digest: str
    config: bytes
    size: int
    tokenizer: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadChunk:
    """Bytes from `offset` on, counted from the start of the tensors."""

    offset: int
    data: bytes


UploadParts = AsyncIterator[UploadStart | UploadChunk]
_Part = TypeVar("_Part")


class AdapterUploads:
    """Receives uploads. Used on one event loop."""

    def __init__(
        self,
        lifecycle: AdapterLifecycle,
        store: AdapterStore,
        loads: LoadQueue,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lifecycle = lifecycle
        self._store = store
        self._loads = loads
        self._clock = clock
        self._num_open: Counter[str] = Counter()
        self._num_archives = 0
        # A slow disk delays uploads alone, and not the default executor's other users.
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "turret-upload")

    async def receive(self, parts: UploadParts, tenant: Tenant) -> AsyncGenerator[int | str]:
        """Receive an adapter and serve it. Yields the offset from which the tensors are wanted, and when
        the adapter is served, its name.

        Raises:
            InvalidRequestError: a part is missing or out of order, or the name is invalid.
            PermissionDeniedError: the tenant may not load under that name.
            AdapterError: the bytes differ from those that were announced, or are no adapter that can be
            served. DeadlineError: too few bytes came.
            QuotaExceededError: the adapter is larger than the tenant's limit, or too many of its loads run.
            TooManyCallsError: too many uploads of the tenant run.
        """
        with self._counted(tenant.name):
            start = await _next(parts, IDLE_SECONDS)
            if not isinstance(start, UploadStart):
                raise InvalidRequestError("the first message of an upload must be its start", field="start")
            check_change(tenant, check_name(start.name))
            _check_size(start, tenant)
            with self._loads.slot(tenant):
                upload = await run_to_completion(
                    partial(
                        self._store.receive,
                        start.digest,
                        start.config,
                        start.size,
                        tenant.name,
                        start.tokenizer,
                    ),
                    undo=Upload.close,
                    executor=self._threads,
                )
                with upload:
                    yield upload.offset
                    await self._receive_chunks(parts, upload)
                    load = partial(self._lifecycle.load_upload, start.name, upload, tenant.ownership)
                    await wait_to_completion(self._loads.submit(load))
                yield start.name

    async def receive_archive(
        self, name: str, chunks: AsyncIterator[bytes], max_bytes: int, tenant: Tenant
    ) -> None:
        """Receive an archive of an adapter, .zip or .tar.gz of at most `max_bytes`, and serve it.

        Raises:
            InvalidRequestError: the name is invalid.
            PermissionDeniedError: the tenant may not load under that name.
            AdapterError: it is too large, or no archive of an adapter that can be served.
            DeadlineError: too few bytes came.
            QuotaExceededError: a limit of the tenant is reached.
            TooManyCallsError: too many uploads run.
        """
        check_change(tenant, check_name(name))
        with self._counted(tenant.name), self._archive_counted(), self._loads.slot(tenant):
            archive = await run_to_completion(
                self._store.spool, undo=lambda file: file.close(), executor=self._threads
            )
            with archive:
                await self._spool(chunks, archive, max_bytes)
                load = partial(self._lifecycle.load_archive, name, archive, tenant.ownership)
                await wait_to_completion(self._loads.submit(load))

    async def _spool(self, chunks: AsyncIterator[bytes], archive: IO[bytes], max_bytes: int) -> None:
        size, pace = 0, _Pace(self._clock)
        while (chunk := await _next(chunks, pace.seconds(size))) is not None:
            size += len(chunk)
            if size > max_bytes:
                raise SourceTooLargeError(f"the archive has at most {max_bytes} bytes; found more")
            with errors_of_the_store(self._store.root):
                await run_to_completion(partial(write_whole, archive.fileno(), chunk), executor=self._threads)

    async def _receive_chunks(self, parts: UploadParts, upload: Upload) -> None:
        begin, pace = upload.offset, _Pace(self._clock)
        while upload.offset < upload.size:
            chunk = await _next(parts, pace.seconds(upload.offset - begin))
            if chunk is None:
                raise UploadError(
                    f"expected {upload.size} bytes, found {upload.offset} (upload again to continue there)"
                )
            if not isinstance(chunk, UploadChunk) or not chunk.data:
                raise InvalidRequestError(
                    "after its start, an upload consists of chunks with data; found another message",
                    field="chunk",
                )
            await run_to_completion(partial(upload.write, chunk.offset, chunk.data), executor=self._threads)

    @contextmanager
    def _archive_counted(self) -> Iterator[None]:
        if self._num_archives >= MAX_ARCHIVES:
            raise TooManyCallsError(
                f"{MAX_ARCHIVES} archives are being uploaded, which is the limit; try again later",
                limit=MAX_ARCHIVES,
            )
        self._num_archives += 1
        try:
            yield
        finally:
            self._num_archives -= 1

    @contextmanager
    def _counted(self, tenant: str) -> Iterator[None]:
        if self._num_open[tenant] >= MAX_UPLOADS_PER_TENANT:
            raise TooManyCallsError(
                f"{MAX_UPLOADS_PER_TENANT} uploads of tenant {tenant!r} are running, which is the "
                "limit; try again when one has ended",
                limit=MAX_UPLOADS_PER_TENANT,
            )
        self._num_open[tenant] += 1
        try:
            yield
        finally:
            self._num_open[tenant] -= 1
            if not self._num_open[tenant]:
                del self._num_open[tenant]


class _Pace:
    """A client has `IDLE_SECONDS` for each chunk, and on the whole must send `MIN_BYTES_PER_SECOND`: a byte
    now and then does not keep an upload open.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deadline = clock() + IDLE_SECONDS

    def seconds(self, num_bytes: int) -> float:
        """How long the next chunk may take after so many bytes."""
        return min(IDLE_SECONDS, self._deadline + num_bytes / MIN_BYTES_PER_SECOND - self._clock())


def _check_size(start: UploadStart, tenant: Tenant) -> None:
    """Refuse what exceeds the tenant's limit by itself before its bytes are sent."""
    # Of a tokenizer only the changes are kept, which count when they are known.
    size, limit = len(start.config) + start.size, tenant.max_adapter_bytes
    if limit is not None and size > limit:
        raise QuotaExceededError(
            f"the adapter has {size} bytes, and the adapters of tenant {tenant.name!r} may have {limit} "
            "(max_adapter_bytes); send a smaller one",
            tenant=tenant.name,
            quota="max_adapter_bytes",
        )


async def _next(parts: AsyncIterator[_Part], seconds: float) -> _Part | None:
    late = DeadlineError(
        f"no bytes came for {IDLE_SECONDS:g} s, or fewer than {MIN_BYTES_PER_SECOND} a second; "
        "upload again to continue where it stopped"
    )
    if seconds <= 0:
        raise late
    try:
        # Not `wait_for`, which on Python 3.11 loses a cancellation that comes with the part.
        async with asyncio.timeout(seconds):
            return await anext(parts, None)
    except TimeoutError as error:
        raise late from error
