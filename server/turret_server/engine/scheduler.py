"""Which tokens of which sequences the next step computes.

There is no prefill phase and no decode phase: a sequence has tokens that are not computed yet, many at its
start and one later, and a step computes some tokens of some sequences within a budget (the scheduler of vLLM
V1; chunked prefill as in Sarathi-Serve, arXiv 2403.02310). Sequences with one token left, the running
streams, come first, so that a long prompt does not delay them; the rest of the budget goes to prompts in the
order of `fairness`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from turret_adapters.spec import AdapterSpec
from turret_server.engine.fairness import GENERATED_COST, PROMPT_COST, YIELD_COST, FairQueue
from turret_server.engine.kv.allocation import Allocation
from turret_server.engine.kv.pages import PagePool
from turret_server.engine.kv.prefix_cache import PrefixCache
from turret_server.engine.pooling import combine
from turret_server.engine.request import (
    FinishReason,
    Job,
    Matcher,
    Output,
    PoolingRequest,
    PromptPin,
    Request,
)
from turret_server.engine.residency.residency import Absence, Residency
from turret_server.engine.residency.resident import Resident
from turret_server.engine.sequence import Sequence
from turret_server.engine.step import VIRTUAL_TOKEN, PageCopy, SequenceStep, Step, StepResult
from turret_server.errors import (
    AdapterUnavailableError,
    DeadlineError,
    QuotaExceededError,
    RequestTooLargeError,
    TurretError,
)

# When no sequence can start, the adapters of so many that come next are loaded ahead.
_MAX_PREFETCHED = 8

# To find waiting sequences whose adapters are resident, so many are examined for each that may run.
_EXAMINED_PER_SLOT = 4

# Every so many steps, tenants without a job are forgotten.
_FORGET_EVERY = 1000

# Prompt tokens in a step until the first prompt was timed, and at least beside streams that take all of the
# step's time: prompts must advance.
_PROBE_TOKENS = 16

# Logits of so many prompt tokens are computed in a step, besides those of sampled tokens: each takes as much
# memory as the vocabulary is large.
_MAX_SCORED_TOKENS = 128

# The weight of the last step in the moving averages of step times.
_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a step: tokens, the time that it should take, and requests that run at once. These are no
    more than the tokens, so that every stream advances in every step.
    """

    max_batch_tokens: int
    max_batch_requests: int
    max_step_seconds: float


@dataclass(slots=True)
class Pacing:
    """How many tokens the next step computes so that it takes about `max_seconds`, and `max_tokens` at most.

    How long a token takes depends on model and device, and is measured.
    """

    max_tokens: int
    max_seconds: float
    _stream_seconds: float = 0.0
    _prompt_token_seconds: float | None = None

    def budget(self, num_streams: int) -> int:
        """Tokens of the next step, including one for each stream."""
        if self._prompt_token_seconds is None:
            prompt = _PROBE_TOKENS
        else:
            left = self.max_seconds - self._stream_seconds * bool(num_streams)
            prompt = int(left / max(self._prompt_token_seconds, 1e-9))
        return min(self.max_tokens, num_streams + max(prompt, num_streams, _PROBE_TOKENS))

    def record(self, num_streams: int, num_prompt_tokens: int, seconds: float) -> None:
        """Take a step into the averages, unless its prompt is so short that its time says little."""
        if not num_prompt_tokens:
            self._stream_seconds += _SMOOTHING * (seconds - self._stream_seconds)
        elif num_prompt_tokens >= _PROBE_TOKENS or self._prompt_token_seconds is None:
            measured = max(seconds - self._stream_seconds * bool(num_streams), 0.0) / num_prompt_tokens
            known = measured if self._prompt_token_seconds is None else self._prompt_token_seconds
            self._prompt_token_seconds = known + _SMOOTHING * (measured - known)


@dataclass(slots=True)
class _Plan:
    """A step that is being planned. `prompts` are the residents whose virtual tokens it computes: these get
    negative sequence ids, jobs their own. `num_scored` counts tokens of prompts whose log probabilities are
    wanted.
    """

    budget: int
    now: float
    num_streams: int
    num_scored: int = 0
    sequences: list[SequenceStep] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    prompts: dict[int, Resident] = field(default_factory=dict)

    def add(self, sequence: SequenceStep) -> None:
        self.sequences.append(sequence)
        self.budget = max(self.budget - len(sequence.token_ids), 0)
        self.num_scored += len(sequence.targets)


class Scheduler:
    """Plans steps and applies their results. `weight` is a tenant's share; `on_dequeue` is called once with
    each job that leaves the queue, because it starts or ends. If attention is `bidirectional`, a step
    computes the whole prompt of a sequence or nothing of it, and `limits` have room for the longest.
    """

    def __init__(
        self,
        *,
        pool: PagePool,
        cache: PrefixCache,
        residency: Residency,
        limits: Limits,
        block_size: int,
        weight: Callable[[str], float] = lambda _: 1.0,
        on_dequeue: Callable[[Job], None] = lambda _: None,
        bidirectional: bool = False,
    ) -> None:
        self.pool = pool
        self.cache = cache
        self.residency = residency
        self.limits = limits
        self.waiting = FairQueue(weight)
        self.running: list[Sequence] = []
        self.allocation = Allocation(pool, cache, residency, block_size, bidirectional=bidirectional)
        self.pacing = Pacing(limits.max_batch_tokens, limits.max_step_seconds)
        self.num_preempted = 0
        # A sequence could not start for want of pages in the last step.
        self._short_of_pages = False
        self._on_dequeue = on_dequeue
        self._by_id: dict[int, Sequence] = {}
        self._plan: _Plan  # of the last step

    @property
    def sequences(self) -> Iterator[Sequence]:
        yield from self._by_id.values()

    def about(self, request_id: int) -> Mapping[str, object]:
        """The log fields of a job; none if it has ended or there is none with this id."""
        sequence = self._by_id.get(request_id)
        return sequence.job.about if sequence else {}

    def add(self, sequence: Sequence) -> None:
        self._by_id[sequence.job.request_id] = sequence
        self.waiting.add(sequence)
        # Checked again: since the job was submitted, pages may have been pinned.
        self._fail_where_too_large(sequence)

    def schedule(self, now: float) -> Step | None:
        """Plan the next step; None if nothing can be computed. `now` is compared with deadlines."""
        self.pool.tick()
        self.num_preempted = self.residency.num_evicted = 0
        if not self._by_id:
            self.waiting.reset()
        elif self.pool.clock % _FORGET_EVERY == 0:
            self.waiting.forget_idle({sequence.tenant for sequence in self._by_id.values()})
        self._fail_overdue(now)
        self._make_way()
        self._grow()
        streams = [sequence for sequence in self.running if sequence.num_remaining == 1]
        self._plan = plan = _Plan(self.pacing.budget(len(streams)), now, len(streams))
        for sequence in streams:
            self._compute(sequence, plan)
        has_room = self.residency.load_pinned()
        self._compute_virtual_tokens(plan)
        self._compute_or_start(plan, may_start=has_room)
        if not plan.sequences:
            return None
        return Step(sequences=tuple(plan.sequences), copies=tuple(plan.copies))

    def update(self, step: Step, result: StepResult, seconds: float) -> None:
        """Apply the result of a step, which took `seconds`: cache whole blocks, emit tokens, end what has
        ended.
        """
        plan = self._plan
        self.pacing.record(plan.num_streams, step.num_tokens - plan.num_streams, seconds)
        for part in step.sequences:
            if part.sequence_id in plan.prompts:
                self._update_virtual_tokens(plan.prompts[part.sequence_id], part, result)
            else:
                self._update_sequence(self._by_id[part.sequence_id], part, result)

    def cancel(self, request_id: int) -> None:
        """End a job with CANCELLED; nothing happens if it has ended."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._end(sequence, Output(finish_reason=FinishReason.CANCELLED))

    def drop(self, revision: str) -> None:
        """Free a revision that no new request names, and unpin its prompts."""
        self.allocation.drop(revision)
        self.residency.drop(revision)

    def pin_adapters(self, name: str, specs: tuple[AdapterSpec, ...]) -> None:
        """Keep adapters in the arena, see `Residency.pin`. Jobs that no longer fit beside them fail."""
        self.residency.pin(name, specs)
        for sequence in list(self._by_id.values()):
            self._fail_where_too_large(sequence)

    def fail(self, sequence: Sequence, error: TurretError) -> None:
        self._end(sequence, Output(finish_reason=FinishReason.FAILED, error=error))

    def check_integrity(self) -> None:
        """Check the page counts, see `PagePool.check_integrity`, and who uses which adapter."""
        holders = [*self.running, *self.allocation.pinned_prompts]
        held = [page for sequence in holders for page in sequence.block_table]
        held += [page for resident in self.residency for page in resident.pages]
        held += self.cache.pages
        self.pool.check_integrity(held)
        self.cache.check_integrity()
        waiting = list(self.waiting)
        assert not any(sequence.block_table or sequence.residents for sequence in waiting)
        assert {*waiting, *self.running} == set(self._by_id.values())
        for resident in self.residency:
            users = sum(resident in sequence.residents for sequence in holders)
            assert resident.num_users == users, f"{resident.spec.revision}: {users} use it"

    def _fail_where_too_large(self, sequence: Sequence) -> None:
        try:
            self.allocation.check_fits(sequence)
        except (QuotaExceededError, RequestTooLargeError) as error:
            self.fail(sequence, error)

    def _fail_overdue(self, now: float) -> None:
        for sequence in list(self._by_id.values()):
            deadline = sequence.job.deadline
            if deadline is not None and now >= deadline:
                self.fail(sequence, DeadlineError("the deadline passed before the request finished"))

    def _grow(self) -> None:
        """Allocate the page of every running sequence's next token, and preempt others if pages run out."""
        for sequence in list(self.running):
            while self.allocation.needs_page(sequence) and not self.allocation.grow(sequence):
                self._preempt(self._victim(self.running))

    def _make_way(self) -> None:
        """Preempt a sequence for a tenant of which nothing runs, if others take all slots or pages."""
        if len(self.running) < self.limits.max_batch_requests and not self._short_of_pages:
            return
        short_of_pages, self._short_of_pages = self._short_of_pages, False
        generating = [sequence for sequence in self.running if sequence.num_remaining == 1]
        if not generating:
            return
        tenants = {sequence.tenant for sequence in self.running}
        ahead = max((sequence.tenant for sequence in generating), key=self.waiting.counter)
        candidates = [sequence for sequence in generating if sequence.tenant == ahead]
        victim = self._victim(candidates, keeps_blocks=not short_of_pages)
        recomputed = self.waiting.cost_of_recomputing(victim) if short_of_pages else 0.0
        if self.waiting.lead(ahead, tenants) >= YIELD_COST + recomputed:
            self._preempt(victim)

    def _victim(self, sequences: list[Sequence], *, keeps_blocks: bool = False) -> Sequence:
        """The sequence to preempt: of those that were preempted least often, of the tenant with the highest
        counter, the one with the fewest tokens to compute again. Every preemption pays for a token that is
        generated, so sequences do not preempt each other for ever. If nobody wants its pages, a sequence
        `keeps_blocks` that are whole in the prefix cache.
        """
        block_size = self.allocation.block_size
        return min(
            sequences,
            key=lambda sequence: (
                sequence.num_preempted,
                -self.waiting.counter(sequence.tenant),
                sequence.num_computed % block_size if keeps_blocks else sequence.num_computed,
                -sequence.job.request_id,
            ),
        )

    def _compute(self, sequence: Sequence, plan: _Plan) -> None:
        """Add as many of the sequence's tokens as the budget allows, and charge its tenant for those that it
        was not charged for before.
        """
        most = sequence.num_remaining
        if not self.allocation.bidirectional:
            most = min(most, plan.budget)
        if sequence.scores_prompt:
            most = min(most, max(_MAX_SCORED_TOKENS - plan.num_scored, 1))
        part = sequence.step(most)
        plan.add(part)
        end = part.start + len(part.token_ids)
        prompt = min(end, sequence.num_prompt) - max(part.start, sequence.num_charged)
        cost = PROMPT_COST * max(prompt, 0) + (GENERATED_COST if part.sampling else 0.0)
        sequence.num_charged = max(sequence.num_charged, end)
        self.waiting.charge(sequence.tenant, cost)

    def _compute_virtual_tokens(self, plan: _Plan) -> None:
        """Add virtual tokens that are embeddings: their keys and values go to the adapter's own pages."""
        for resident in self.residency.to_compute():
            virtual = resident.uncomputed
            count = min(len(virtual), plan.budget)
            if not count:
                break
            resident.last_requested = resident.last_used = self.pool.clock
            sequence_id = -1 - len(plan.prompts)
            plan.prompts[sequence_id] = resident
            plan.add(
                SequenceStep(
                    sequence_id=sequence_id,
                    token_ids=(VIRTUAL_TOKEN,) * count,
                    start=virtual.start,
                    block_table=tuple(resident.prefix_pages),
                    prompt=resident.spec.revision,
                )
            )

    def _compute_or_start(self, plan: _Plan, *, may_start: bool) -> None:
        """Continue prompts and start waiting sequences, in the fair order of both. `may_start` becomes False
        at a sequence that others must not overtake. If none can start because the step or the batch is full,
        load the adapters of the next ones.
        """
        prompts = [sequence for sequence in self.running if sequence.num_remaining > 1]
        num_prompts, num_seen, num_ahead = len(prompts), 0, 0
        for sequence in self.waiting.in_order(prompts):
            if sequence.block_table:
                num_prompts -= 1
                if plan.budget:
                    self._compute(sequence, plan)
            elif may_start and not self._waits_for_leader(sequence):
                full = not self._has_room(sequence, plan)
                may_start = self._start(sequence, plan, first=not num_seen, full=full)
                num_seen, num_ahead = num_seen + 1, num_ahead + full
                may_start &= num_ahead < _MAX_PREFETCHED
                may_start &= num_seen < _EXAMINED_PER_SLOT * self.limits.max_batch_requests
            if not may_start and not num_prompts:
                break

    def _has_room(self, sequence: Sequence, plan: _Plan) -> bool:
        """Whether the step can compute some of the sequence's tokens, or all of them if it must. The longest
        prompt is computed alone, however long that takes.
        """
        if len(self.running) >= self.limits.max_batch_requests or not plan.budget:
            return False
        num_tokens = len(sequence.tokens) - sequence.num_prefix
        return not self.allocation.bidirectional or not plan.sequences or num_tokens <= plan.budget

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        """Whether the prompt that it shares is not computed yet. One whose leader has ended starts alone."""
        leader = self._leader(sequence)
        return leader is not None and not leader.num_generated

    def _leader(self, sequence: Sequence) -> Sequence | None:
        return None if sequence.leader is None else self._by_id.get(sequence.leader)

    def _start(self, sequence: Sequence, plan: _Plan, *, first: bool, full: bool) -> bool:
        """Start a sequence, or load its adapters. False if no other sequence may overtake it.

        That is so if there are too few pages for it, or long prompts would starve; and if the `first` of all
        lost its adapters again while it waited, or it would starve for the same reason.
        """
        lost = next((resident.error for resident in sequence.awaited if resident.error), None)
        if lost:
            self.fail(sequence, AdapterUnavailableError(f"the adapter failed to load: {lost}"))
            return True
        specs = [use.spec for use in sequence.job.adapters]
        residents = self.residency.ensure_all(specs, sequence.tenant)
        if isinstance(residents, Absence):
            if residents is Absence.QUOTA:
                # The quota may have been lowered since the request was checked.
                self._fail_where_too_large(sequence)
            return residents is not Absence.NO_ROOM
        times = sequence.job.times
        if not all(resident.ready for resident in residents):
            again = sequence.awaited not in ((), residents)
            sequence.awaited = residents
            times.await_adapters(plan.now)
            return not (first and again)
        times.found_adapters(plan.now)
        if full:
            return True
        copies = self.allocation.allocate(sequence, residents, self._leader(sequence))
        if copies is None:
            self._short_of_pages = True
            return False
        plan.copies += copies
        self.waiting.remove(sequence)
        self.running.append(sequence)
        times.start(plan.now)
        self._leave_queue(sequence)
        self._compute(sequence, plan)
        return True

    def _leave_queue(self, sequence: Sequence) -> None:
        if not sequence.dequeued:
            sequence.dequeued = True
            self._on_dequeue(sequence.job)

    def _update_virtual_tokens(self, resident: Resident, part: SequenceStep, result: StepResult) -> None:
        error = result.errors.get(part.sequence_id)
        if error is not None:
            self.residency.fail(resident, str(error))
        else:
            resident.num_virtual_computed = part.start + len(part.token_ids)

    def _update_sequence(self, sequence: Sequence, part: SequenceStep, result: StepResult) -> None:
        error = result.errors.get(part.sequence_id)
        if error is not None:
            self.allocation.invalidate(sequence)
            self.fail(sequence, error)
            return
        self.allocation.commit(sequence, len(part.token_ids))
        if part.targets:
            # A sequence that was preempted computes its prompt again.
            del sequence.prompt_logprobs[part.start - sequence.num_virtual :]
            sequence.prompt_logprobs += result.prompt_logprobs[part.sequence_id]
        if part.pooling:
            sequence.rows.append(result.rows[part.sequence_id])
        if sequence.num_remaining:
            return
        match sequence.job:
            case PromptPin():
                self._pin_prompt(sequence)
            case Request() as request:
                self._generate(sequence, request, result)
            case PoolingRequest() as request:
                self._end_pooling(sequence, request)

    def _generate(self, sequence: Sequence, request: Request, result: StepResult) -> None:
        token_id = result.token_ids[request.request_id]
        sequence.append(token_id)
        reason = None
        if token_id in request.stop_token_ids:
            reason = FinishReason.STOP
        elif sequence.matcher and not self._accept(sequence, sequence.matcher, token_id):
            return
        elif sequence.matcher and sequence.matcher.is_complete:
            reason = FinishReason.STOP
        elif sequence.num_generated == request.max_tokens:
            reason = FinishReason.LENGTH
        output = Output(
            token_id=token_id,
            finish_reason=reason,
            cached_tokens=sequence.num_cached or 0,
            logprob=result.logprobs.get(request.request_id),
            prompt_logprobs=tuple(sequence.prompt_logprobs),
        )
        sequence.prompt_logprobs.clear()
        if reason:
            self._end(sequence, output)
        elif not request.emit(output):
            self._remove(sequence)

    def _end_pooling(self, sequence: Sequence, request: PoolingRequest) -> None:
        output = Output(
            finish_reason=FinishReason.POOLED,
            cached_tokens=sequence.num_cached or 0,
            rows=combine(request.params, sequence.rows),
        )
        self._end(sequence, output)

    def _accept(self, sequence: Sequence, matcher: Matcher, token_id: int) -> bool:
        try:
            matcher.accept(token_id)
        except TurretError as error:
            self.fail(sequence, error)
            return False
        return True

    def _pin_prompt(self, sequence: Sequence) -> None:
        try:
            self.allocation.pin_prompt(sequence, beside=self._by_id.values())
        except (QuotaExceededError, RequestTooLargeError) as error:
            self.fail(sequence, error)
            return
        del self._by_id[sequence.job.request_id]
        self.running.remove(sequence)
        sequence.job.emit(Output(finish_reason=FinishReason.PINNED, cached_tokens=sequence.num_cached or 0))

    def _preempt(self, sequence: Sequence) -> None:
        """Release a running sequence's pages. Its tokens are computed again when there is room."""
        self.num_preempted += 1
        sequence.num_preempted += 1
        sequence.rows.clear()
        self.allocation.release(sequence)
        self.running.remove(sequence)
        self.waiting.add(sequence)

    def _end(self, sequence: Sequence, output: Output) -> None:
        """Release what the sequence holds, then emit its last output, also where the release raises: the
        engine fails then, and ends only those requests that it still knows.
        """
        try:
            self._remove(sequence)
        finally:
            sequence.job.emit(output)

    def _remove(self, sequence: Sequence) -> None:
        del self._by_id[sequence.job.request_id]
        if sequence.block_table:
            self.running.remove(sequence)
            self.allocation.release(sequence)
        else:
            self.waiting.remove(sequence)
        self._leave_queue(sequence)
