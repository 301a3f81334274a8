"""Which tokens of which sequences the next step computes.

There is no prefill phase and no decode phase: a sequence has tokens that are not computed yet, many at
its start and one later, and a step gives some sequences some tokens within a budget (the scheduler of
vLLM V1; chunked prefill as in Sarathi-Serve, arXiv 2403.02310). Sequences that wait for one token come
first, so that a long prompt does not hold up a running stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from turret_server.engine.pages import PagePool
from turret_server.engine.prefix_cache import PrefixCache
from turret_server.engine.request import FinishReason, Output
from turret_server.engine.residency import Residency, Resident
from turret_server.engine.sequence import Sequence
from turret_server.engine.step import VIRTUAL_TOKEN, PageCopy, SequenceStep, Step, StepResult
from turret_server.errors import DeadlineError, GenerationFailedError, TurretError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Most tokens in one step, and most requests that run at once: no more than tokens, so that all go on."""

    max_batch_tokens: int
    max_batch_requests: int


@dataclass(slots=True)
class _Plan:
    """A step in the making. Virtual tokens to compute get negative ids, the others their request's."""

    budget: int
    sequences: list[SequenceStep] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    prompts: dict[int, Resident] = field(default_factory=dict)

    def add(self, sequence: SequenceStep) -> None:
        self.sequences.append(sequence)
        self.budget -= len(sequence.token_ids)


@dataclass(slots=True)
class Scheduler:
    pool: PagePool
    cache: PrefixCache
    residency: Residency
    limits: Limits
    block_size: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    num_preempted: int = 0
    _prompts: dict[int, Resident] = field(default_factory=dict)

    @property
    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def num_pages(self, sequence: Sequence) -> int:
        """Pages that the sequence and its adapter take when its last token is generated.

        That token is computed no more, and whole pages of the adapter's prefix are the sequence's as well.
        """
        num_tokens = len(sequence.tokens) + sequence.request.sampling.max_tokens - 1
        num_pages = -(-num_tokens // self.block_size) - sequence.num_virtual // self.block_size
        return num_pages + sum(self.residency.num_pages(use.spec) for use in sequence.request.adapters)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self, now: float) -> Step | None:
        """Plan the next step; None when nothing can be computed now. `now` is compared with deadlines."""
        self.residency.tick()
        self.num_preempted = 0
        self._fail_overdue(now)
        self._fail_unplaceable()
        self._grow()
        plan = _Plan(budget=self.limits.max_batch_tokens)
        self._continue(plan)
        self._compute_prompts(plan)
        self._admit(plan)
        self._prompts = plan.prompts
        if not plan.sequences:
            return None
        return Step(sequences=tuple(plan.sequences), copies=tuple(plan.copies))

    def update(self, step: Step, result: StepResult) -> None:
        """Take in what a step computed: keep whole blocks, hand tokens on, end what has ended."""
        running = {sequence.request.request_id: sequence for sequence in self.running}
        for part in step.sequences:
            if part.sequence_id in self._prompts:
                self._update_prompt(self._prompts[part.sequence_id], part, result)
            else:
                self._update_sequence(running[part.sequence_id], part, result)

    def cancel(self, request_id: int) -> None:
        """End a request without another word; one that has ended already is left alone."""
        for sequence in list(self.sequences):
            if sequence.request.request_id == request_id:
                self._end(sequence, FinishReason.CANCELLED)

    def fail(self, sequence: Sequence, error: TurretError) -> None:
        self._end(sequence, FinishReason.FAILED, error)

    def check_integrity(self) -> None:
        """Prove that every page is where the books say; see `PagePool.check_integrity`."""
        held = [page for sequence in self.sequences for page in sequence.block_table]
        held += [page for resident in self.residency for page in resident.pages]
        held += self.cache.pages
        self.pool.check_integrity(held)
        self.cache.check_integrity()
        assert not any(sequence.block_table or sequence.residents for sequence in self.waiting)
        for resident in self.residency:
            users = sum(resident in sequence.residents for sequence in self.running)
            assert resident.num_users == users, f"{resident.spec.revision}: {users} use it"

    def _fail_overdue(self, now: float) -> None:
        for sequence in list(self.sequences):
            deadline = sequence.request.deadline
            if deadline is not None and now >= deadline:
                self.fail(sequence, DeadlineError("the deadline passed before the request finished"))

    def _fail_unplaceable(self) -> None:
        for sequence in list(self.waiting):
            errors = [resident.error for resident in sequence.awaited if resident.error]
            if errors:
                reason = f"the adapter could not be made resident: {errors[0]}"
                self.fail(sequence, GenerationFailedError(reason))

    def _grow(self) -> None:
        """Give every running sequence the page of its next token, at the cost of the youngest ones."""
        for sequence in list(self.running):
            while sequence.block_table and len(sequence.block_table) * self.block_size < len(sequence.tokens):
                pages = self.pool.allocate(1)
                if pages is None:
                    self._preempt(self.running[-1])
                else:
                    sequence.block_table += pages

    def _continue(self, plan: _Plan) -> None:
        """Let running sequences go on, those that wait for a single token first."""
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_remaining > 1):
            if plan.budget:
                plan.add(sequence.step(min(sequence.num_remaining, plan.budget)))

    def _compute_prompts(self, plan: _Plan) -> None:
        """Compute the virtual tokens of adapters that bring embeddings, into the adapter's own pages."""
        for resident in self.residency.to_compute():
            count = min(resident.spec.num_virtual_tokens - resident.num_virtual_computed, plan.budget)
            if not count:
                break
            resident.last_used = self.residency.clock
            sequence_id = -1 - len(plan.prompts)
            plan.prompts[sequence_id] = resident
            plan.add(
                SequenceStep(
                    sequence_id=sequence_id,
                    token_ids=(VIRTUAL_TOKEN,) * count,
                    start=resident.num_virtual_computed,
                    block_table=tuple(resident.prefix_pages),
                    prompt=resident.spec.revision,
                )
            )

    def _admit(self, plan: _Plan) -> None:
        """Start waiting sequences in order. One whose adapter is on its way lets others pass, once: if the
        adapter came and had to go again, it does not. Nor does one for which there are no pages, or a long
        prompt would wait for ever.
        """
        for sequence in list(self.waiting):
            if not plan.budget or len(self.running) >= self.limits.max_batch_requests:
                break
            residents = self.residency.ensure_all([use.spec for use in sequence.request.adapters])
            if residents is None:
                break
            if not all(resident.ready for resident in residents):
                if sequence.awaited not in ((), residents):
                    break
                sequence.awaited = residents
                continue
            if not self._take_pages(sequence, residents, plan):
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            plan.add(sequence.step(min(sequence.num_remaining, plan.budget)))

    def _take_pages(self, sequence: Sequence, residents: tuple[Resident, ...], plan: _Plan) -> bool:
        """Share the adapter's prefix and cached blocks, and take pages for the rest of the prompt."""
        num_virtual = sequence.num_virtual
        whole = num_virtual // self.block_size
        # The last token is always computed, for its logits.
        keys = sequence.keys((len(sequence.tokens) - 1) // self.block_size, self.block_size)
        cached = self.cache.match(keys[whole:])
        prefix = [page for resident in residents for page in resident.prefix_pages]
        shared = prefix[:whole]
        missing = -(-len(sequence.tokens) // self.block_size) - len(shared) - len(cached)
        pages = self.pool.allocate(missing)
        if pages is None:
            self.pool.release(cached)
            self.cache.given_back(keys[whole : whole + len(cached)])
            return False
        self.pool.share(shared)
        sequence.block_table = [*shared, *cached, *pages]
        sequence.num_computed = max(num_virtual, (whole + len(cached)) * self.block_size)
        for resident in residents:
            self.residency.acquire(resident)
        sequence.residents = residents
        if num_virtual % self.block_size and not cached:
            plan.copies.append(PageCopy(source=prefix[whole], target=pages[0]))
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        return True

    def _update_prompt(self, resident: Resident, part: SequenceStep, result: StepResult) -> None:
        error = result.errors.get(part.sequence_id)
        if error is not None:
            self.residency.fail(resident, error)
        else:
            resident.num_virtual_computed += len(part.token_ids)

    def _update_sequence(self, sequence: Sequence, part: SequenceStep, result: StepResult) -> None:
        error = result.errors.get(part.sequence_id)
        if error is not None:
            self.fail(sequence, GenerationFailedError(f"the step failed for this request: {error}"))
            return
        self._keep_blocks(sequence, len(part.token_ids))
        if part.sampling is None:
            return
        token_id = result.token_ids[part.sequence_id]
        sequence.tokens.append(token_id)
        reason = self._finish_reason(sequence, token_id)
        if reason:
            self._remove(sequence)
        output = Output(token_id=token_id, finish_reason=reason, cached_tokens=sequence.num_cached or 0)
        if not sequence.request.tell(output) and not reason:
            self._remove(sequence)

    def _keep_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        """Count `num_tokens` as computed and offer the blocks that became whole to the cache."""
        before = max(sequence.num_computed, sequence.num_virtual) // self.block_size
        sequence.num_computed += num_tokens
        after = sequence.num_computed // self.block_size
        keys = sequence.keys(after, self.block_size)
        for index in range(before, after):
            self.cache.insert(keys[index], sequence.block_table[index])

    @staticmethod
    def _finish_reason(sequence: Sequence, token_id: int) -> FinishReason | None:
        if token_id in sequence.request.stop_token_ids:
            return FinishReason.STOP
        if sequence.num_generated == sequence.request.sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; its tokens stay, and are computed again when there is room."""
        self.num_preempted += 1
        self._release(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def _end(self, sequence: Sequence, reason: FinishReason, error: TurretError | None = None) -> None:
        self._remove(sequence)
        sequence.request.tell(Output(finish_reason=reason, error=error))

    def _remove(self, sequence: Sequence) -> None:
        self._release(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Give pages and adapter back; what the prefix cache keeps of them can be found again."""
        self.pool.release(sequence.block_table)
        self.cache.given_back(sequence.keys(sequence.num_computed // self.block_size, self.block_size))
        sequence.block_table = []
        sequence.num_computed = 0
        for resident in sequence.residents:
            self.residency.release(resident)
        sequence.residents = ()
