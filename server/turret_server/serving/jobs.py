"""The way of a request into the engine, the same for generations and for prompt pins: adapters are leased,
the prompt is tokenised, the quota is charged, the job is submitted. Leaving the blocks gives all of it back,
however the request ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypedDict, TypeVar

from turret_adapters.registry import AdapterRegistry, Lease, Named
from turret_server import logs
from turret_server.engine.loop import Engine
from turret_server.engine.request import AdapterUse, Job, Output
from turret_server.lifecycle.lazy import LazyAdapters
from turret_server.lifecycle.revisions import Revisions
from turret_server.lifecycle.threads import run_to_completion
from turret_server.observability.request_log import RequestRecord
from turret_server.observability.usage_metrics import UsageMetrics
from turret_server.serving.chat import Chat
from turret_server.serving.chat_templates import ChatTemplates
from turret_server.serving.codec import PIECE_CHARACTERS
from turret_server.serving.model_info import ModelInfo
from turret_server.serving.request import GenerationRequest, PinRequest
from turret_server.serving.tools import AnswerFormat
from turret_server.serving.vocabulary import Vocabularies, Vocabulary
from turret_server.tenancy.access import check_use, errors_visible_to
from turret_server.tenancy.auth import Caller
from turret_server.tenancy.quotas import Quotas

# Earlier revisions that are read from the store at once for requests that name them.
_MAX_READERS = 2
# Long texts that are tokenised at once; each may take much memory and a core.
_MAX_TOKENISERS = 2

_POSITION_BYTES = 6

_Job = TypeVar("_Job", bound=Job)
_Item = TypeVar("_Item")


class JobFields(TypedDict):
    """The fields of an engine job that a request determines."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    adapters: tuple[AdapterUse, ...]
    deadline: float | None
    tenant: str
    cache_salt: str


class Outputs(Generic[_Item]):
    """Outputs of a request's jobs on their way from the engine's thread to the event loop, where an item is
    made of each as it comes, whether or not a reader waits for it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[_Item | Exception] = asyncio.Queue()

    def sink(self, receive: Callable[[Output, float], _Item | None]) -> Callable[[Output], None]:
        """The sink of a job. `receive` gets an output and the time of `time.monotonic` at which the engine
        emitted it. None is no item, and what it raises is raised to the reader.
        """

        def put(output: Output) -> None:
            # A loop that is closed has no reader.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._arrive, receive, output, time.monotonic())

        return put

    def _arrive(
        self, receive: Callable[[Output, float], _Item | None], output: Output, emitted: float
    ) -> None:
        try:
            item: _Item | Exception | None = receive(output, emitted)
        except Exception as error:  # noqa: BLE001 -- the reader gets it
            # Its traceback would refer to the frame that refers to it: a cycle keeps a request for long.
            item = error.with_traceback(None)
        if item is not None:
            self._queue.put_nowait(item)

    async def get(self) -> _Item:
        """The next item; raises what `receive` has raised instead of one."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            try:
                raise item
            finally:
                del item  # see `_arrive`
        return item


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """A request whose adapters are leased, and the vocabulary that it has with them."""

    caller: Caller
    lease: Lease
    vocabulary: Vocabulary

    @property
    def num_virtual_tokens(self) -> int:
        return sum(spec.num_virtual_tokens for spec, _ in self.lease.uses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Leased):
    """A request whose prompt is tokenised as well. `fields` are those of its job, besides its sink; `answers`
    says how the answers to a chat are read, if they are more than text.
    """

    fields: JobFields
    answers: AnswerFormat | None = None

    @property
    def num_context(self) -> int:
        """Tokens of the prompt, and virtual tokens of the adapters."""
        return len(self.fields["prompt_token_ids"]) + self.num_virtual_tokens


class Jobs:
    """Prepares and submits jobs. Used on one event loop."""

    def __init__(
        self,
        *,
        engine: Engine,
        registry: AdapterRegistry,
        revisions: Revisions,
        vocabularies: Vocabularies,
        chats: ChatTemplates,
        model: ModelInfo,
        usage: UsageMetrics,
        lazy: LazyAdapters | None = None,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._revisions = revisions
        self._lazy = lazy
        self._vocabularies = vocabularies
        self._chats = chats
        self._model = model
        self._quotas = Quotas()
        self._usage = usage
        self._readers = ThreadPoolExecutor(_MAX_READERS, "turret-revision")
        self._tokenisers = ThreadPoolExecutor(_MAX_TOKENISERS, "turret-tokenise")
        self._request_ids = itertools.count(1)

    @asynccontextmanager
    async def lease(
        self, adapters: Sequence[Named], caller: Caller, routing_key: str | None = None
    ) -> AsyncIterator[Leased]:
        """Lease adapters. Requests with the same `routing_key` use the same revision of an adapter whose
        traffic is split, those with "" a random one, and with None the current one.

        Raises:
            AdapterError: an adapter does not exist, or its use is invalid.
        """
        tenant, named = caller.tenant, list(adapters)
        if routing_key is not None:
            named = [_positioned(each, routing_key) for each in named]
        check_use(tenant, [each.name for each in named])
        with errors_visible_to(tenant):
            lease = await self._lease(named)
        try:
            if named:
                logs.bind(adapter="+".join(each.name for each in named), revision=lease.revision)
            vocabulary = await self._vocabularies.of([spec for _, spec in lease.pins])
            yield Leased(caller=caller, lease=lease, vocabulary=vocabulary)
        finally:
            self._registry.release(lease)

    @asynccontextmanager
    async def prepare(
        self,
        request: GenerationRequest | PinRequest,
        adapters: Sequence[Named],
        caller: Caller,
        routing_key: str | None = None,
    ) -> AsyncIterator[Prepared]:
        """Lease the adapters, see `lease`, and tokenise the prompt.

        Raises:
            InvalidRequestError: a token is not in the vocabulary.
            ChatTemplateError: the chat template refuses the chat.
            NoChatTemplateError: there is none.
            PromptTooLongError: the prompt does not fit into the context.
            AdapterError: an adapter does not exist, or its use is invalid.
        """
        async with self.lease(adapters, caller, routing_key) as leased:
            lease, vocabulary = leased.lease, leased.vocabulary
            prompt, adds_special_tokens, answers = request.prompt, request.add_special_tokens, None
            if isinstance(prompt, Chat):
                specs = [spec for _, spec in lease.pins]
                rendered = await self._chats.render(prompt, specs, vocabulary.special_tokens)
                # The template has written those that belong there.
                prompt, adds_special_tokens, answers = rendered.prompt, False, rendered.answers
            token_ids = await self._tokenise(prompt, vocabulary, add_special_tokens=adds_special_tokens)
            fields = self.fields(leased, token_ids, request.deadline, request.cache_salt)
            yield Prepared(caller=caller, lease=lease, vocabulary=vocabulary, fields=fields, answers=answers)

    def fields(
        self, leased: Leased, token_ids: tuple[int, ...], deadline: float | None, cache_salt: str
    ) -> JobFields:
        """Of a job with this prompt."""
        tenant = leased.caller.tenant
        return JobFields(
            request_id=self.next_id(),
            prompt_token_ids=token_ids,
            adapters=tuple(AdapterUse(spec, weight) for spec, weight in leased.lease.uses),
            deadline=deadline,
            tenant=tenant.name,
            # The domain keeps tenants apart whatever salt they choose: no tenant's name has a slash.
            cache_salt=f"{tenant.cache_domain}/{cache_salt}",
        )

    def next_id(self) -> int:
        """The id of another job, besides that of a prepared request's first."""
        return next(self._request_ids)

    @contextmanager
    def submit(
        self,
        leased: Leased,
        jobs: Sequence[_Job],
        record: RequestRecord,
        begin: Callable[[_Job], None],
    ) -> Iterator[None]:
        """Charge the quota and hand the jobs to the engine with `begin`; those that have not ended at the end
        of the block are cancelled.

        Raises:
            QuotaExceededError: the tenant has used its quota.
            TurretError: the engine refuses a job.
        """
        tenant, pins = leased.caller.tenant, leased.lease.pins
        max_tokens = sum(job.max_tokens for job in jobs)
        num_prompt = sum(job.num_tokens for job in jobs) - max_tokens
        with self._quotas.charge(tenant, num_prompt, max_tokens) as charge, self._begun(jobs, begin):
            charge.begin()
            record.begin(jobs[0], pins, num_prompt)
            try:
                yield
            finally:
                charge.num_generated = record.generated_tokens
                names = [name for name, _ in pins]
                self._usage.add(tenant.name, names, prompt=charge.num_prompt, generated=charge.num_generated)

    @contextmanager
    def _begun(self, jobs: Sequence[_Job], begin: Callable[[_Job], None]) -> Iterator[None]:
        begun: list[_Job] = []
        try:
            for job in jobs:
                begin(job)
                begun.append(job)
            yield
        finally:
            for job in begun:
                self._engine.cancel(job.request_id)

    async def tokenising(self, encode: Callable[[], _Item], num_characters: int) -> _Item:
        """Run `encode` in a thread: a long text takes a while, and streams go on meanwhile. Short ones do not
        wait for long ones.
        """
        executor = self._tokenisers if num_characters > PIECE_CHARACTERS else None
        return await asyncio.get_running_loop().run_in_executor(executor, encode)

    async def _lease(self, named: list[Named]) -> Lease:
        if self._lazy:
            await self._lazy.ensure_loaded(each.name for each in named)
        if all(each.revision is None for each in named):
            return self._registry.acquire(named)
        acquire = partial(self._revisions.acquire, named)
        return await run_to_completion(acquire, undo=self._registry.release, executor=self._readers)

    async def _tokenise(
        self, prompt: str | Sequence[int] | None, vocabulary: Vocabulary, *, add_special_tokens: bool
    ) -> tuple[int, ...]:
        assert prompt is not None, "validated"
        if isinstance(prompt, str):
            encode = partial(
                vocabulary.codec.encode,
                prompt,
                self._model.max_context,
                add_special_tokens=add_special_tokens,
                context_note=self._model.context_note,
            )
            token_ids = tuple(await self.tokenising(encode, len(prompt)))
        else:
            self._model.check_room(len(prompt))
            token_ids = tuple(prompt)
        vocabulary.check_token_ids(token_ids)
        return token_ids


def _positioned(named: Named, routing_key: str) -> Named:
    """With its position among the requests for the adapter, from 0 to 1, which decides in a traffic split."""
    if not routing_key:
        return replace(named, place=random.random())  # noqa: S311 (no secret)
    key = f"{named.name}\0{routing_key}".encode()
    digest = hashlib.blake2b(key, digest_size=_POSITION_BYTES).digest()
    return replace(named, place=int.from_bytes(digest, "big") / 256**_POSITION_BYTES)
