"""A device that computes with hashes, and a scheduler driven by hand on top of it.

A slot holds a hash of its token, of the adapter's rows as they lie in their pages, and of every slot before
it, read through the block table; a sampled token is a hash of all of them. So a wrong page, a missing copy,
a stale block or a wrong position changes the tokens, and `expected_tokens` says what they have to be.
"""

from __future__ import annotations

import itertools
import math
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from turret_adapters.spec import (
    AdapterSpec,
    HeadSpec,
    HeadTask,
    Method,
    Part,
    PrefixKind,
    PrefixSpec,
    RowGroup,
)
from turret_server.engine.kv.pages import PagePool
from turret_server.engine.kv.prefix_cache import PrefixCache, block_key
from turret_server.engine.pooling import PoolingParams, Rows
from turret_server.engine.recovery import Runner
from turret_server.engine.request import (
    DEFAULT_TENANT,
    AdapterUse,
    FinishReason,
    LogitAdjustment,
    Logprob,
    Output,
    PoolingRequest,
    PromptPin,
    Request,
    SamplingParams,
)
from turret_server.engine.residency.residency import Residency
from turret_server.engine.scheduler import Limits, Scheduler
from turret_server.engine.sequence import Sequence as EngineSequence
from turret_server.engine.step import VIRTUAL_TOKEN, PoolingStep, SequenceStep, Step, StepResult
from turret_server.errors import GenerationFailedError, RequestTooLargeError

PAGE_ELEMENTS = 8
_VOCABULARY = 1_000_003
_GARBAGE = -1

_request_ids = itertools.count(1)


Adapters = AdapterSpec | Sequence[AdapterUse] | None


def uses(adapter: Adapters) -> tuple[AdapterUse, ...]:
    if adapter is None:
        return ()
    return (AdapterUse(adapter),) if isinstance(adapter, AdapterSpec) else tuple(adapter)


def block_keys(parent: bytes, token_ids: Iterable[int], block_size: int) -> list[bytes]:
    """The chain of keys of the whole blocks of `token_ids`."""
    tokens, keys = list(token_ids), []
    for end in range(block_size, len(tokens) + 1, block_size):
        parent = block_key(parent, tokens[end - block_size : end])
        keys.append(parent)
    return keys


def make_spec(
    revision: str,
    *,
    slab_pages: int = 0,
    num_virtual: int = 0,
    kind: PrefixKind = PrefixKind.KEY_VALUE,
    invocation: tuple[int, ...] = (),
    per_request: bool = False,
    head: HeadTask | None = None,
) -> AdapterSpec:
    """An adapter of `slab_pages` pages of rows and `num_virtual` virtual tokens; see `AdapterSpec`."""
    rows = RowGroup("m", Part.LORA_A, count=slab_pages, width=PAGE_ELEMENTS)
    return AdapterSpec(
        revision=revision,
        method=Method.LORA if slab_pages else Method.PREFIX_TUNING,
        rows=(rows,) if slab_pages else (),
        max_rank=slab_pages,
        prefix=PrefixSpec(num_virtual_tokens=num_virtual, kind=kind, per_request=per_request)
        if num_virtual
        else None,
        num_parameters=1,
        file_bytes=1,
        invocation_tokens=invocation,
        head=head and HeadSpec(task=head, labels=("LABEL_0", "LABEL_1")),
    )


def _content(revision: str, what: str, index: int) -> int:
    return zlib.crc32(f"{revision}/{what}/{index}".encode())


def _rows(contents: Iterable[int]) -> int:
    return hash(tuple(contents))


def _value(history: Sequence[int], token: int, rows: int) -> int:
    return hash((*history, token, rows))


def _sample(
    history: Sequence[int],
    sampling: SamplingParams,
    num_generated: int,
    penalised: Iterable[int] | None,
    excluded: Iterable[int],
) -> int:
    """A token that is not `excluded`, and that depends on all that is given."""
    token = hash((*history, sampling.seed, num_generated, penalised and tuple(penalised))) % _VOCABULARY
    return token + _VOCABULARY * (token in excluded)


def _score(history: Sequence[int], token_id: int, num_top: int | None) -> Logprob:
    return Logprob(token_id, float(hash((*history, token_id))), num_top or 0, ())


def expected_tokens(request: Request) -> list[int]:
    """What a request has to answer, computed from its history without pages and without an engine."""
    return [found.token_id for found in _expected(request)[1]]


def _expected(request: Request) -> tuple[list[Logprob], list[Logprob]]:
    """The log probabilities of the tokens of the prompt but the first, and of the answer."""
    history = _prefix(request)
    rows = _rows((_own_rows(use.spec), use.weight) for use in request.adapters)
    inactive = _inactive(request)
    sampling, prompt_logprobs = request.sampling, []
    for index, token in enumerate(request.prompt_token_ids):
        if index:
            prompt_logprobs.append(_score(history, token, sampling.prompt_logprobs))
        history.append(_value(history, token, _rows(()) if index < inactive else rows))
    if inactive > len(request.prompt_token_ids):
        rows = _rows(())
    adjustment = sampling.adjustment or LogitAdjustment()
    tokens: list[int] = []
    logprobs: list[Logprob] = []
    while len(tokens) < sampling.max_tokens:
        penalised = [*request.prompt_token_ids, *tokens] if adjustment.has_penalties else None
        excluded = request.stop_token_ids if len(tokens) < adjustment.min_tokens else ()
        tokens.append(_sample(history, sampling, len(tokens), penalised, excluded))
        logprobs.append(_score(history, tokens[-1], sampling.logprobs))
        if tokens[-1] in request.stop_token_ids:
            break
        history.append(_value(history, tokens[-1], rows))
    return prompt_logprobs, logprobs


def expected_rows(job: PoolingRequest, *, bidirectional: bool) -> list[float]:
    """The numbers that a pooling request has to get, computed without pages and without an engine."""
    of_each = [_own_rows(use.spec) for use in job.adapters]
    rows = _rows(zip(of_each, (use.weight for use in job.adapters), strict=True))
    history, inactive = _prefix(job, rows), _inactive(job)
    num_virtual = len(history)
    for index, token in enumerate(job.prompt_token_ids):
        history.append(_value(history, token, _rows(()) if index < inactive else rows))
    hidden = [_hidden(history, position, bidirectional=bidirectional) for position in range(len(history))]
    own, params, count = hidden[num_virtual:], job.params, len(job.prompt_token_ids)
    if params.task is None:
        return [sum(params.pooling.weight(index, count) * each for index, each in enumerate(own))]
    heads = [found for use, found in zip(job.adapters, of_each, strict=True) if use.spec.head]
    head = heads[0] if heads else 0
    return [_logit(each, head) for each in (own if params.task.by_token else own[-1:])]


def _own_rows(spec: AdapterSpec) -> int:
    return _rows(_content(spec.revision, "row", index) for index in range(spec.max_rank))


def _hidden(history: Sequence[int], position: int, *, bidirectional: bool) -> float:
    """A token's state; it depends on the tokens before it, or on all."""
    found = hash((*history, position)) if bidirectional else history[position]
    return float(found % _VOCABULARY)


def _logit(hidden: float, head: int) -> float:
    return float(hash((hidden, head)) % _VOCABULARY)


def _prefix(request: Request | PromptPin | PoolingRequest, rows: int = 0) -> list[int]:
    """`rows` are those that apply to virtual tokens which the request itself computes."""
    history: list[int] = []
    for spec in (use.spec for use in request.adapters if use.spec.prefix):
        embedded = {position for run in spec.prefix.embedded for position in run}
        for index in range(spec.num_virtual_tokens):
            if spec.prefix.per_request:
                history.append(_value(history, _content(spec.revision, "embedding", index), rows))
            elif index not in embedded:
                history.append(_content(spec.revision, "key_value", index))
            else:
                history.append(_value(history, _content(spec.revision, "embedding", index), _rows(())))
    return history


def _inactive(request: Request | PoolingRequest) -> int:
    """How many tokens of the prompt stand before the last invocation; more than all where there is none."""
    [wanted] = {use.spec.invocation_tokens for use in request.adapters} or {()}
    prompt = request.prompt_token_ids
    found = [at for at in range(len(prompt)) if prompt[at : at + len(wanted)] == wanted]
    if not wanted:
        return 0
    return found[-1] if found else len(prompt) + 1


@dataclass
class Placement:
    spec: AdapterSpec
    slab_pages: tuple[int, ...]
    prefix_pages: tuple[int, ...]
    done: Callable[[str | None], None]


class FakeDevice:
    """`Runner` and `AdapterMemory`. Placements end when `complete` is called, or at once if `immediate`."""

    bidirectional = False

    def __init__(self, num_pages: int, block_size: int, *, immediate: bool = False) -> None:
        self.block_size = block_size
        self.immediate = immediate
        self.pages = [[_GARBAGE] * block_size for _ in range(num_pages)]
        self.placed: dict[str, Placement] = {}
        self.pending: list[Placement] = []

    def copy_to_device(
        self,
        spec: AdapterSpec,
        slab_pages: tuple[int, ...],
        prefix_pages: tuple[int, ...],
        done: Callable[[str | None], None],
    ) -> None:
        self.pending.append(Placement(spec, slab_pages, prefix_pages, done))
        if self.immediate:
            self.complete()

    def complete(self, index: int = 0, error: str | None = None) -> AdapterSpec:
        """End a placement that is under way. One that fails has written its pages all the same."""
        placement = self.pending.pop(index)
        revision, prefix = placement.spec.revision, placement.spec.prefix
        for row, page in enumerate(placement.slab_pages):
            self.pages[page] = [_content(revision, "row", row)] * self.block_size
        if prefix and not prefix.per_request:
            embedded = {position for run in prefix.embedded for position in run}
            for position in sorted({*range(prefix.num_virtual_tokens)} - embedded):
                page = placement.prefix_pages[position // self.block_size]
                self.pages[page][position % self.block_size] = _content(revision, "key_value", position)
        if error is None:
            self.placed[revision] = placement
        placement.done(error)
        return placement.spec

    def forget(self, revision: str) -> None:
        assert all(placement.spec.revision != revision for placement in self.pending), "its copy still runs"
        self.placed.pop(revision, None)

    def run(self, step: Step) -> StepResult:
        for copy in step.copies:
            self.pages[copy.target] = list(self.pages[copy.source])
        sampled, logprobs, prompt_logprobs, rows = {}, {}, {}, {}
        for part in step.sequences:
            history = self._compute(part)
            if part.targets:
                prompt_logprobs[part.sequence_id] = tuple(
                    _score(history[:end], target, part.num_top)
                    for end, target in enumerate(part.targets, part.start + 1)
                )
            if part.pooling:
                rows[part.sequence_id] = self._pool(part, part.pooling, history)
            if part.sampling:
                token = _sample(history, part.sampling, part.num_generated, part.history, part.excluded)
                sampled[part.sequence_id] = token
                if part.sampling.logprobs is not None:
                    logprobs[part.sequence_id] = _score(history, token, part.sampling.logprobs)
        return StepResult(token_ids=sampled, logprobs=logprobs, prompt_logprobs=prompt_logprobs, rows=rows)

    def _pool(self, part: SequenceStep, pooling: PoolingStep, history: list[int]) -> Rows:
        hidden = [
            _hidden(history, position, bidirectional=self.bidirectional)
            for position, token in enumerate(part.token_ids, part.start)
            if pooling.task is None or token != VIRTUAL_TOKEN
        ]
        if pooling.task is None:
            pairs = zip(pooling.weights, hidden, strict=True)
            return Rows(1, array("d", [sum(weight * each for weight, each in pairs)]))
        head = self._slab(pooling.head) if pooling.head else 0
        own = hidden if pooling.task.by_token else hidden[-1:]
        return Rows(1, array("d", [_logit(each, head) for each in own]))

    def _slab(self, revision: str) -> int:
        return _rows(self.pages[page][0] for page in self.placed[revision].slab_pages)

    def _compute(self, part: SequenceStep) -> list[int]:
        rows = _rows((self._slab(revision), weight) for revision, weight in part.adapters)
        history = [self._slots(part, position)[position % self.block_size] for position in range(part.start)]
        for position, token in enumerate(part.token_ids, part.start):
            if token == VIRTUAL_TOKEN:
                assert part.prompt is not None
                token = _content(part.prompt, "embedding", position)  # noqa: PLW2901
            value = _value(history, token, _rows(()) if position < part.active_from else rows)
            self._slots(part, position)[position % self.block_size] = value
            history.append(value)
        return history

    def _slots(self, part: SequenceStep, position: int) -> list[int]:
        return self.pages[part.block_table[position // self.block_size]]


@dataclass(eq=False)
class Run:
    """One job and what its sink was told."""

    job: Request | PromptPin | PoolingRequest = field(init=False)
    outputs: list[Output] = field(default_factory=list)
    bidirectional: bool = False

    @property
    def tokens(self) -> list[int]:
        return [output.token_id for output in self.outputs if output.token_id is not None]

    @property
    def end(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason if self.outputs else None

    @property
    def error(self) -> Exception | None:
        return self.outputs[-1].error if self.outputs else None

    def sink(self, output: Output) -> None:
        assert self.end is None, "nothing comes after the end"
        self.outputs.append(output)

    def check(self) -> None:
        """The tokens so far are the right ones, and the end fits them."""
        if isinstance(self.job, PromptPin):
            assert self.tokens == []
            assert self.end not in (FinishReason.STOP, FinishReason.LENGTH)
            return
        if isinstance(self.job, PoolingRequest):
            self._check_rows(self.job)
            return
        prompt_logprobs, logprobs = _expected(self.job)
        expected = [found.token_id for found in logprobs]
        assert self.tokens == expected[: len(self.tokens)]
        given = [output for output in self.outputs if output.token_id is not None]
        if self.job.sampling.logprobs is not None:
            assert [output.logprob for output in given] == logprobs[: len(given)]
        if given:
            wanted = self.job.sampling.prompt_logprobs is not None
            assert list(given[0].prompt_logprobs) == prompt_logprobs * wanted
            assert not any(output.prompt_logprobs for output in given[1:])
        if self.end is FinishReason.STOP and not self.job.grammar:
            assert self.tokens == expected
            assert expected[-1] in self.job.stop_token_ids
        elif self.end is FinishReason.LENGTH:
            assert len(self.tokens) == self.job.max_tokens
        assert self.end is not FinishReason.PINNED

    def _check_rows(self, job: PoolingRequest) -> None:
        assert len(self.outputs) <= 1
        assert self.end in (None, FinishReason.POOLED, FinishReason.CANCELLED, FinishReason.FAILED)
        if self.end is FinishReason.POOLED:
            expected = expected_rows(job, bidirectional=self.bidirectional)
            found = self.outputs[0].rows
            assert found
            assert len(found.values) == len(expected)
            assert all(map(math.isclose, found.values, expected))


def make_run(
    prompt: Sequence[int],
    adapter: Adapters = None,
    *,
    max_tokens: int = 4,
    seed: int = 0,
    stop_after: int | None = None,
    deadline: float | None = None,
    tenant: str = DEFAULT_TENANT,
    priority: int = 0,
    cache_salt: str = "",
    pinned: bool = False,
    leader: int | None = None,
    params: PoolingParams | None = None,
    bidirectional: bool = False,
    token_type_ids: tuple[int, ...] = (),
    **sampled: Any,
) -> Run:
    """A request whose sink is a `Run`, or if `pinned` a prompt pin, for which `max_tokens`, `seed` and
    `stop_after` mean nothing; with `stop_after`, the token of that index is one that stops it. `sampled` are
    other fields of `SamplingParams`. With `params` it is a pooling request.
    """
    run = Run(bidirectional=bidirectional)
    common = partial(
        PoolingRequest if params else PromptPin if pinned else Request,
        request_id=next(_request_ids),
        prompt_token_ids=tuple(prompt),
        adapters=uses(adapter),
        deadline=deadline,
        sink=run.sink,
        tenant=tenant,
        priority=priority,
        cache_salt=cache_salt,
    )
    if params:
        run.job = common(params=params, token_type_ids=token_type_ids)
        return run
    if pinned:
        run.job = common()
        return run
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed, **sampled)
    run.job = common(sampling=sampling, stop_token_ids=frozenset(), leader=leader)
    if stop_after is not None and stop_after < max_tokens:
        stops = frozenset([expected_tokens(run.job)[stop_after]])
        run.job = common(sampling=sampling, stop_token_ids=stops, leader=leader)
    return run


class Simulation:
    """A scheduler with everything around it, one step at a time, and every invariant checked after each."""

    def __init__(
        self,
        *,
        num_pages: int = 32,
        block_size: int = 4,
        max_batch_tokens: int = 64,
        max_batch_requests: int = 8,
        immediate: bool = True,
        weights: Mapping[str, float] | None = None,
        make_device: Callable[..., FakeDevice] = FakeDevice,
        bidirectional: bool = False,
    ) -> None:
        self.device = make_device(num_pages, block_size, immediate=immediate)
        self.device.bidirectional = bidirectional
        self.runner: Runner = self.device
        self.pool = PagePool(num_pages)
        self.cache = PrefixCache(self.pool)
        self.inbox: deque[Callable[[], None]] = deque()

        def weight(tenant: str) -> float:
            return (weights or {}).get(tenant, 1.0)

        self.residency = Residency(
            pool=self.pool,
            memory=self.device,
            page_elements=PAGE_ELEMENTS,
            block_size=block_size,
            post=self.inbox.append,
            weight=weight,
        )
        self.limits = Limits(
            max_batch_tokens=max_batch_tokens, max_batch_requests=max_batch_requests, max_step_seconds=1.0
        )
        self.started: list[int] = []
        self.scheduler = Scheduler(
            pool=self.pool,
            cache=self.cache,
            residency=self.residency,
            limits=self.limits,
            block_size=block_size,
            weight=weight,
            on_dequeue=lambda job: self.started.append(job.request_id),
            bidirectional=bidirectional,
        )
        # As if prompts took no time, so that steps are as large as the limits let them be.
        self.scheduler.pacing.record(0, 1, 0.0)
        self.now = 0.0
        self.runs: list[Run] = []

    def fits(self, run: Run) -> bool:
        allocation, sequence = self.scheduler.allocation, EngineSequence.of(run.job)
        try:
            if isinstance(run.job, PromptPin):
                allocation.check_pin_prompt(sequence)
            allocation.check_fits(sequence)
        except RequestTooLargeError:
            return False
        return True

    def submit(self, prompt: Sequence[int], adapter: Adapters = None, **options: Any) -> Run:
        """A request made by `make_run`, in the queue."""
        return self.add(make_run(prompt, adapter, bidirectional=self.device.bidirectional, **options))

    def add(self, run: Run) -> Run:
        assert self.fits(run), "the engine would have refused it"
        self.runs.append(run)
        self.scheduler.add(EngineSequence.of(run.job, self.now))
        return run

    def cancel(self, run: Run) -> None:
        self.scheduler.cancel(run.job.request_id)

    def step(self, faults: Callable[[Step], dict[int, str]] = lambda _: {}) -> Step | None:
        """Plan and run one step. `faults` are the sequences for which it fails, and why."""
        self.drain_inbox()
        step = self.scheduler.schedule(self.now)
        if step is not None:
            self._check_step(step)
            result = self.runner.run(step)
            faulty = {id_: GenerationFailedError(reason) for id_, reason in faults(step).items()}
            errors = {**result.errors, **faulty}
            tokens = {id_: token for id_, token in result.token_ids.items() if id_ not in errors}
            self.scheduler.update(step, replace(result, token_ids=tokens, errors=errors), 0.0)
        self.check()
        return step

    def drain_inbox(self) -> None:
        while self.inbox:
            self.inbox.popleft()()

    def finish(self, max_steps: int = 3000) -> None:
        """Let everything that was submitted run to its end."""
        for _ in range(max_steps):
            while self.device.pending:
                self.device.complete()
            self.step()
            if not self.scheduler.running and not self.scheduler.waiting:
                break
        assert [run for run in self.runs if run.end is None] == [], "somebody starves"

    def check(self) -> None:
        self.scheduler.check_integrity()
        assert len(self.started) == len(set(self.started)), "a request left the queue twice"
        for run in self.runs:
            run.check()

    def check_nothing_is_left(self) -> None:
        """With all ended and every adapter dropped, only the cache has pages, and gives them up."""
        while self.device.pending:
            self.device.complete()
        self.drain_inbox()
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        for sequence in list(self.scheduler.allocation.pinned_prompts):
            self.scheduler.allocation.unpin_prompt(sequence.job.request_id)
        for name in "ab":
            self.scheduler.pin_adapters(name, ())
        for resident in list(self.residency):
            self.scheduler.drop(resident.spec.revision)
        assert not list(self.residency)
        assert not self.device.placed
        assert self.pool.num_free + self.cache.num_idle == self.pool.num_pages
        assert len(self.cache.pages) == self.cache.num_idle
        while self.cache.num_idle:
            self.cache.evict()
        assert self.pool.num_free == self.pool.num_pages

    def _check_step(self, step: Step) -> None:
        assert 0 < step.num_tokens <= self.limits.max_batch_tokens
        ids = [part.sequence_id for part in step.sequences]
        assert len(ids) == len(set(ids)), "a sequence is in the step twice"
        assert sum(id_ > 0 for id_ in ids) <= self.limits.max_batch_requests
        assert len(self.scheduler.running) <= self.limits.max_batch_requests
        assert all(part.token_ids for part in step.sequences)
        self._check_writes(step)

    def _check_writes(self, step: Step) -> None:
        """Nobody writes where somebody else reads or writes."""
        written = Counter(copy.target for copy in step.copies)
        assert max(written.values(), default=1) == 1
        size = self.device.block_size
        for part in step.sequences:
            blocks = range(part.start // size, (part.start + len(part.token_ids) - 1) // size + 1)
            pages = [part.block_table[block] for block in blocks]
            for page in pages:
                assert self.pool.num_holders(page) == 1, f"page {page} is written while it is shared"
            written.update(set(pages) - {copy.target for copy in step.copies})
        assert max(written.values()) == 1, "two sequences write to one page"
        residents = {page for resident in self.residency for page in resident.pages}
        computed = {page for part in step.sequences if part.sequence_id < 0 for page in part.block_table}
        assert not residents & set(written) - computed, "an adapter's page is written"
        for copy in step.copies:
            # What another answer to the same prompt writes comes after what is read of the copy: repeating a
            # step in parts, of which the first may have written, changes nothing.
            [reader] = [part for part in step.sequences if copy.target in part.block_table]
            writers = [
                part for part in step.sequences if copy.source in part.block_table[part.start // size :]
            ]
            assert all(part.start >= reader.start for part in writers), "a page is copied while it is written"
