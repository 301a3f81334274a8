"""The real services over a scripted engine: jobs, quotas, registry, tokenizer and request log are real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from support.fake_device import make_spec
from support.tokenizers import VOCAB_SIZE, make_tokenizer
from turret_adapters.formats.tokenizer import OwnTokenizer
from turret_adapters.host import HostAdapter
from turret_adapters.registry import AdapterRegistry
from turret_adapters.spec import BaseSpec, HeadTask
from turret_server.engine.admission import TenantLimits
from turret_server.engine.pooling import Pooling
from turret_server.engine.request import FinishReason, Job, Output, PromptPin
from turret_server.errors import TurretError
from turret_server.observability.metrics import RequestMetrics
from turret_server.observability.request_log import RequestLog
from turret_server.observability.usage_metrics import UsageMetrics
from turret_server.serving.chat_templates import ChatTemplates
from turret_server.serving.codec import TextCodec
from turret_server.serving.generation import GenerationService
from turret_server.serving.jobs import Jobs
from turret_server.serving.model_info import ModelInfo
from turret_server.serving.pooling import PoolingModel, PoolingService
from turret_server.serving.prompts import PromptService
from turret_server.serving.request import Chunk, GenerationRequest
from turret_server.serving.structured import Grammars
from turret_server.serving.tokens import TokenService
from turret_server.serving.vocabulary import Vocabularies, Vocabulary
from turret_server.tenancy.auth import Caller
from turret_server.tenancy.quotas import Quotas
from turret_server.tenancy.tenants import Tenant

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MODEL = ModelInfo(max_context=64, block_size=4)
BASE = BaseSpec(
    name_or_path="",
    modules={},
    hidden_size=2,
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    heads={HeadTask.SEQ_CLS: {"score.weight": (0, 2)}},
)


@pytest.fixture(scope="package")
def codec() -> TextCodec:
    return TextCodec(make_tokenizer())


@pytest.fixture(scope="package")
def own_tokenizer() -> Callable[[str], OwnTokenizer]:
    """Reads the tokenizer of a revision that was trained with `<|new|>` as the end of its answers."""

    def read(_revision: str) -> OwnTokenizer:
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"eos_token": "<|new|>"})
        backend = tokenizer.backend_tokenizer
        return OwnTokenizer(backend_tokenizer=backend, bos_token=None, eos_token="<|new|>")

    return read


class ScriptedEngine:
    """Notes in `calls` what is asked of it, and answers each job with `outputs`, or refuses it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.jobs: list[Any] = []
        self.arrivals: asyncio.Queue[Job] = asyncio.Queue()
        self.outputs: list[Output] = []
        self.refusal: TurretError | None = None
        self.pinned: set[int] = set()

    def submit(self, job: Job) -> None:
        if self.refusal:
            raise self.refusal
        self.jobs.append(job)
        self.arrivals.put_nowait(job)
        self.calls.append(("submit", job.request_id))
        for output in self.outputs:
            job.sink(output)

    def pin_prompt(self, pin: PromptPin) -> None:
        self.pinned.add(pin.request_id)
        self.submit(pin)

    def cancel(self, request_id: int) -> None:
        self.calls.append(("cancel", request_id))

    def unpin_prompt(self, request_id: int) -> None:
        self.calls.append(("unpin", request_id))
        self.pinned.discard(request_id)

    def is_prompt_pinned(self, request_id: int) -> bool:
        return request_id in self.pinned

    def answer(self, token_ids: Iterable[int], end: FinishReason = FinishReason.LENGTH) -> None:
        """Answer with these tokens from now on."""
        *first, last = token_ids
        self.outputs = [Output(token_id=each, cached_tokens=2) for each in first]
        self.outputs.append(Output(token_id=last, finish_reason=end, cached_tokens=2))


class EarlierRevisions:
    """Acquires like the registry, and notes it."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry
        self.asked: list[Any] = []

    def acquire(self, named: Any) -> Any:
        self.asked.append(named)
        return self._registry.acquire(named)


@dataclass
class UsageEntries:
    """A usage log in memory."""

    entries: list[Mapping[str, object]] = field(default_factory=list)

    def check(self) -> None:
        pass

    def append(self, entry: Mapping[str, object]) -> Future[None]:
        self.entries.append(entry)
        written: Future[None] = Future()
        written.set_result(None)
        return written


@dataclass(frozen=True)
class Services:
    engine: ScriptedEngine
    registry: AdapterRegistry
    revisions: EarlierRevisions
    jobs: Jobs
    generation: GenerationService
    prompts: PromptService
    tokens: TokenService
    pooling: PoolingService
    usage: UsageEntries
    metrics: CollectorRegistry

    async def generate(self, request: GenerationRequest, caller: Caller) -> list[Chunk]:
        async with aclosing(self.generation.generate(request, caller)) as chunks:
            return [chunk async for chunk in chunks]

    def count(self, outcome: str) -> float:
        return self.metrics.get_sample_value("turret_requests_total", {"outcome": outcome}) or 0.0

    def used(self, tenant: str, adapter: str, kind: str) -> float | None:
        labels = {"tenant": tenant, "adapter": adapter, "kind": kind}
        return self.metrics.get_sample_value("turret_usage_tokens_total", labels)


@pytest.fixture
def services(codec: TextCodec, own_tokenizer: Callable[[str], OwnTokenizer]) -> Iterator[Services]:
    """With the LoRAs `poet`, `bard` and `judge`, which has a head, and the prefixes `first` and `second` of
    two virtual tokens.
    """
    engine, registry, metrics, usage = (
        ScriptedEngine(),
        AdapterRegistry(),
        CollectorRegistry(),
        UsageEntries(),
    )
    for name, revision in (("poet", "1" * 32), ("bard", "2" * 32)):
        registry.publish(name, HostAdapter(spec=make_spec(revision, slab_pages=1), deltas={}))
    for name, revision in (("first", "3" * 32), ("second", "4" * 32)):
        spec = make_spec(revision, num_virtual=2)
        prefix = torch.zeros(2, 1, 2, 1, 1)
        registry.publish(name, HostAdapter(spec=spec, deltas={}, prefix_kv=prefix))
    judge = make_spec("5" * 32, slab_pages=1, head=HeadTask.SEQ_CLS)
    registry.publish("judge", HostAdapter(spec=judge, deltas={}))
    revisions = EarlierRevisions(registry)
    base = Vocabulary(codec=codec, size=VOCAB_SIZE, stop_token_ids=frozenset({1}))
    vocabularies = Vocabularies(base, own_tokenizer)
    chats = ChatTemplates(TEMPLATE, lambda revision: {"default": f"{revision}: {TEMPLATE}"})
    jobs = Jobs(
        engine=engine,
        registry=registry,
        revisions=revisions,
        vocabularies=vocabularies,
        chats=chats,
        model=MODEL,
        usage=UsageMetrics(metrics),
    )
    jobs._quotas = Quotas(clock=lambda: 0.0)
    log = RequestLog(RequestMetrics(metrics), usage)
    generation = GenerationService(
        engine=engine, jobs=jobs, model=MODEL, grammars=Grammars(base), request_log=log
    )
    prompts = PromptService(engine=engine, registry=registry, jobs=jobs, model=MODEL, request_log=log)
    model = PoolingModel(base=BASE, takes_pairs=False, pad_token_id=2, pooling=Pooling.MEAN, normalize=True)
    pooling = PoolingService(engine=engine, jobs=jobs, model=MODEL, pooling=model, request_log=log)
    yield Services(
        engine, registry, revisions, jobs, generation, prompts, TokenService(jobs), pooling, usage, metrics
    )
    chats.close()


@pytest.fixture
def caller_of() -> Callable[..., Caller]:
    """An administrator's call, unless the settings of its tenant say otherwise."""

    def caller_of(name: str = "acme", **settings: Any) -> Caller:
        tenant = Tenant(**{"name": name, "limits": TenantLimits(), "admin": True} | settings)
        return Caller(tenant=tenant, request_id="request-1")

    return caller_of


@pytest.fixture
def admin(caller_of: Callable[..., Caller]) -> Caller:
    return caller_of()
