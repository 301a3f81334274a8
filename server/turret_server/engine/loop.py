"""The engine's thread: take in what arrived, plan a step, run it, hand out what came of it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from turret_adapters.spec import AdapterSpec
from turret_server import logs
from turret_server.engine.admission import Admission, TenantLimits
from turret_server.engine.kv.pages import PagePool
from turret_server.engine.kv.prefix_cache import PrefixCache
from turret_server.engine.recovery import RecoveringRunner, Runner
from turret_server.engine.request import DEFAULT_TENANT, FinishReason, Output, PromptPin, Request
from turret_server.engine.residency.residency import AdapterMemory, Residency
from turret_server.engine.scheduler import Limits, Scheduler
from turret_server.engine.sequence import Sequence
from turret_server.engine.step import Step
from turret_server.errors import (
    AdapterTooLargeError,
    GenerationFailedError,
    QuotaExceededError,
    ShuttingDownError,
    TurretError,
)

log = logging.getLogger(__name__)

# How long the thread sleeps at most while requests wait for their adapters: deadlines are looked at then.
_IDLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """How the engine stands after a step, and what the step was; None where nothing was computed."""

    step: Step | None
    seconds: float
    num_running: int
    num_waiting: int
    num_preempted: int
    num_evicted: int
    num_filling: int
    num_failures: int
    pages: dict[str, int]


class Engine:
    """Owns scheduler and pages. Every public method may be called from any thread.

    A step that fails ends the requests at fault (see `recovery`), and the engine goes on. If the engine
    itself fails, its books may be wrong, and a wrong answer is worse than none; if the device does, there is
    no answer. Then it ends every request, computes no more, sets `failed` and calls `on_failure`.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        memory: AdapterMemory,
        num_pages: int,
        page_elements: int,
        block_size: int,
        limits: Limits,
        tenants: Callable[[str], TenantLimits],
        max_adapter_pages: Callable[[str], int | None] = lambda _: None,
        on_stats: Callable[[EngineStats], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        def weight(tenant: str) -> float:
            return tenants(tenant).weight

        pool = PagePool(num_pages)
        cache = PrefixCache(pool)
        residency = Residency(
            pool=pool,
            memory=memory,
            page_elements=page_elements,
            block_size=block_size,
            post=self._post,
            weight=weight,
            max_pages=max_adapter_pages,
        )
        self._admission = Admission(tenants)
        self._scheduler = Scheduler(
            pool=pool,
            cache=cache,
            residency=residency,
            limits=limits,
            block_size=block_size,
            weight=weight,
            on_start=self._admission.leave,
        )
        self._runner = RecoveringRunner(runner)
        self._on_stats = on_stats
        self._clock = clock
        self._inbox: deque[Callable[[], None]] = deque()
        self._arriving: deque[Sequence] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self.failed = False
        self.on_failure: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._loop, name="turret-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the requests that are left with UNAVAILABLE, then the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: Request) -> None:
        """Queue a request; its sink gets every token and exactly one end.

        Raises:
            QueueFullError: its tenant has as much waiting as may.
            QuotaExceededError: its adapters take more pages than its tenant may have for them.
            RequestTooLargeError: it could never fit, even alone.
            ShuttingDownError: the engine stops.
        """
        self._enqueue(Sequence.of(request, self._clock()))

    def pin_prompt(self, pin: PromptPin) -> None:
        """Queue a prompt that is to be computed and kept; its sink gets exactly one output.

        Raises:
            QueueFullError: its tenant has as much waiting as may.
            QuotaExceededError: its adapters take more pages than its tenant may have for them.
            RequestTooLargeError: it would leave too little for requests.
            ShuttingDownError: the engine stops.
        """
        sequence = Sequence.of(pin, self._clock())
        self._scheduler.allocation.check_pin_prompt(sequence)
        self._enqueue(sequence)

    def unpin_prompt(self, request_id: int) -> None:
        """Let a pinned prompt be evicted like any other; one that is not pinned is left alone."""
        self._post(lambda: self._scheduler.allocation.unpin_prompt(request_id))

    def is_prompt_pinned(self, request_id: int) -> bool:
        """Whether the prompt is pinned; False again once the revision of one of its adapters is dropped."""
        return self._scheduler.allocation.is_prompt_pinned(request_id)

    def cancel(self, request_id: int) -> None:
        """End a request or a pin before the next step; its sink gets CANCELLED unless it has ended."""
        self._post(lambda: self._scheduler.cancel(request_id))

    def check_adapter(self, spec: AdapterSpec, tenant: str = DEFAULT_TENANT) -> None:
        """See that an adapter can be resident for a tenant.

        Raises:
            AdapterTooLargeError: it takes as many pages as there are, or more.
            QuotaExceededError: it takes more than the tenant may have.
        """
        needed, pool = self.num_pages(spec), self._scheduler.pool
        if needed >= pool.num_pages:
            raise AdapterTooLargeError(
                f"the adapter takes {needed} pages and leaves none of the arena's {pool.num_pages} "
                "for requests; start the server with more --memory",
                adapter_pages=needed,
                arena_pages=pool.num_pages,
            )
        most = self._scheduler.residency.max_pages(tenant)
        if most is not None and needed > most:
            raise QuotaExceededError(
                f"the adapter takes {needed} pages of the arena, and those of tenant {tenant!r} may have "
                f"{most}; load one of a lower rank",
                tenant=tenant,
                quota="max_device_bytes",
            )

    def prefetch(self, spec: AdapterSpec, tenant: str = DEFAULT_TENANT) -> None:
        """Make an adapter resident if there is free room, before a request of the tenant asks for it."""
        self._post(lambda: self._scheduler.residency.prefetch(spec, tenant))

    def check_pin_adapters(self, name: str, specs: tuple[AdapterSpec, ...]) -> None:
        """See that adapters can be pinned under a name, in place of what is now.

        Raises:
            AdapterTooLargeError: they would leave too little for requests.
        """
        self._scheduler.allocation.check_pin_adapters(name, specs)

    def pin_adapters(self, name: str, specs: tuple[AdapterSpec, ...]) -> None:
        """Make adapters resident and keep them so, in place of what is pinned under the name; none of them
        ends that.
        """
        self._post(lambda: self._scheduler.pin_adapters(name, specs))

    def drop(self, revision: str) -> None:
        """Free a revision that no request will name again, and unpin its prompts."""
        self._post(lambda: self._scheduler.drop(revision))

    def is_resident(self, revision: str) -> bool:
        resident = self._scheduler.residency.get(revision)
        return resident is not None and resident.ready

    def num_pages(self, spec: AdapterSpec) -> int:
        """Pages that an adapter takes when resident."""
        return self._scheduler.residency.num_pages(spec)

    def check_integrity(self) -> None:
        """Prove between two steps that no page is lost.

        Raises:
            AssertionError: the books do not add up.
        """
        failures: list[AssertionError] = []
        done = threading.Event()

        def check() -> None:
            try:
                self._scheduler.check_integrity()
            except AssertionError as error:
                failures.append(error)
            finally:
                done.set()

        self._post(check)
        while self._thread.is_alive() and not done.wait(_IDLE_SECONDS):
            pass
        if not done.is_set():
            check()
        if failures:
            raise failures[0]

    def _enqueue(self, sequence: Sequence) -> None:
        self._scheduler.allocation.check_fits(sequence)
        with self._wake:
            if self._stopping:
                raise ShuttingDownError("the server is shutting down; send the request to another")
            self._admission.enter(sequence.job)
            self._arriving.append(sequence)
            self._wake.notify()

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _loop(self) -> None:
        try:
            while not self._stopping:
                if not self.turn():
                    self._sleep()
            error: TurretError = ShuttingDownError("the server stopped before the request finished")
        except Exception as failure:
            log.critical("the engine failed, and serves no more", exc_info=True)
            error = GenerationFailedError(f"the engine failed: {type(failure).__name__}: {failure}")
            self.failed = True
        self._end_all(error)
        if self.failed:
            self.on_failure()

    def turn(self) -> bool:
        """Take in what was asked, compute one step, hand out what came of it; False where there was none.

        The engine's thread does nothing else, and whoever has not started it may call it instead.
        """
        self._take_in()
        step = self._scheduler.schedule(self._clock())
        seconds = self._run(step) if step is not None else 0.0
        self._on_stats(self._stats(step, seconds))
        return step is not None

    def _take_in(self) -> None:
        # At one moment: a request that is cancelled at once must be there before its cancellation.
        with self._wake:
            while self._arriving:
                self._scheduler.add(self._arriving.popleft())
            commands, self._inbox = self._inbox, deque()
        for command in commands:
            command()

    def _end_all(self, error: TurretError) -> None:
        with self._wake:
            self._stopping = True
        for sequence in (*self._arriving, *self._scheduler.sequences):
            sequence.job.tell(Output(finish_reason=FinishReason.FAILED, error=error))

    def _run(self, step: Step) -> float:
        started = self._clock()
        self._runner.num_failures = 0
        result = self._runner.run(step)
        for sequence_id, error in result.errors.items():
            with logs.about(self._scheduler.about(sequence_id)):
                log.warning("request %d failed: %s (%s)", sequence_id, error, error.reason)
        seconds = self._clock() - started
        self._admission.computed(step.num_tokens, seconds)
        self._scheduler.update(step, result, seconds)
        return seconds

    def _sleep(self) -> None:
        with self._wake:
            if not self._arriving and not self._inbox and not self._stopping:
                busy = self._scheduler.waiting or self._scheduler.running
                self._wake.wait(timeout=_IDLE_SECONDS if busy else None)

    def _stats(self, step: Step | None, seconds: float) -> EngineStats:
        scheduler = self._scheduler
        pages = {
            "lora": scheduler.residency.num_slab_pages,
            "prefix": scheduler.residency.num_prefix_pages,
            "cache": scheduler.cache.num_idle,
            "free": scheduler.pool.num_free,
            "pinned": scheduler.allocation.num_pinned,
        }
        pages["sequence"] = scheduler.pool.num_pages - sum(pages.values())
        return EngineStats(
            step=step,
            seconds=seconds,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_preempted=scheduler.num_preempted,
            num_evicted=scheduler.residency.num_evicted,
            num_filling=scheduler.residency.num_filling,
            num_failures=self._runner.num_failures if step is not None else 0,
            pages=pages,
        )
