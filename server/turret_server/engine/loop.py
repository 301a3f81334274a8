"""The engine's thread: drain the inbox, schedule a step, run it, emit the outputs."""

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
from turret_server.engine.request import (
    DEFAULT_TENANT,
    FinishReason,
    Output,
    PoolingRequest,
    PromptPin,
    Request,
)
from turret_server.engine.residency.residency import AdapterMemory, Residency
from turret_server.engine.scheduler import Limits, Scheduler
from turret_server.engine.sequence import Sequence
from turret_server.engine.step import Step
from turret_server.engine.watchdog import Progress
from turret_server.errors import (
    AdapterTooLargeError,
    GenerationFailedError,
    QuotaExceededError,
    ShuttingDownError,
    TurretError,
    UnsupportedTaskError,
)

log = logging.getLogger(__name__)

# The longest sleep while jobs wait for their adapters: their deadlines are checked after it.
_IDLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's state after a step. `step` is None, and `seconds` 0, if nothing was computed. `pages` are
    the arena's by owner.
    """

    step: Step | None
    seconds: float
    num_running: int
    num_waiting: int
    num_preempted: int
    num_evicted: int
    num_loading: int
    num_failures: int
    pages: dict[str, int]


class Engine:
    """Owns the scheduler and the pages. All public methods but `step` are thread-safe.

    A step that fails ends the requests at fault (see `recovery`), and the engine continues. If the engine
    itself fails, its state may be wrong, and a wrong answer is worse than none; if the device is lost,
    nothing can be computed. Then it fails every request, stops, sets `failed` and calls `on_failure`.

    The engine of an encoder is `bidirectional`, and computes only pooling requests.
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
        bidirectional: bool = False,
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
            on_dequeue=self._admission.leave,
            bidirectional=bidirectional,
        )
        self.progress = Progress()
        self._runner = RecoveringRunner(runner, self.progress.begin)
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

    def stop(self, timeout: float | None = None) -> bool:
        """Fail the remaining requests with UNAVAILABLE, and end the thread after its step. Returns whether it
        has ended within `timeout` seconds.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Fail the remaining requests with UNAVAILABLE although the thread hangs in a step. Afterwards the
        engine is of no more use.
        """
        self._end_all(_stopped())

    def submit(self, request: Request | PoolingRequest) -> None:
        """Queue a request. Its sink gets every token and exactly one end.

        Raises:
            UnsupportedTaskError: the model is an encoder, and generates no text.
            QueueFullError: the tenant's queue is full.
            QuotaExceededError: its adapters need more pages than its tenant may have.
            RequestTooLargeError: it needs more pages than the arena has for requests.
            ShuttingDownError: the engine stops.
        """
        if isinstance(request, Request):
            self._check_generates()
        self._enqueue(Sequence.of(request, self._clock()))

    def pin_prompt(self, pin: PromptPin) -> None:
        """Queue a prompt to be computed and kept in the prefix cache. Its sink gets exactly one output.

        Raises:
            UnsupportedTaskError: the model is an encoder, whose prompts are not kept.
            QueueFullError: the tenant's queue is full.
            QuotaExceededError: its adapters need more pages than its tenant may have.
            RequestTooLargeError: pinned prompts and adapters would take more than their share of the arena.
            ShuttingDownError: the engine stops.
        """
        self._check_generates()
        sequence = Sequence.of(pin, self._clock())
        self._scheduler.allocation.check_pin_prompt(sequence)
        self._enqueue(sequence)

    def unpin_prompt(self, request_id: int) -> None:
        """Make a pinned prompt evictable; nothing happens if it is not pinned."""
        self._post(lambda: self._scheduler.allocation.unpin_prompt(request_id))

    def is_prompt_pinned(self, request_id: int) -> bool:
        """Whether the prompt is pinned. Dropping the revision of one of its adapters unpins it."""
        return self._scheduler.allocation.is_prompt_pinned(request_id)

    def cancel(self, request_id: int) -> None:
        """End a request or a pin before the next step. Its sink gets CANCELLED unless it has ended."""
        self._post(lambda: self._scheduler.cancel(request_id))

    def check_adapter(self, spec: AdapterSpec, tenant: str = DEFAULT_TENANT) -> None:
        """Check that an adapter can be resident for a tenant.

        Raises:
            AdapterTooLargeError: it leaves no page of the arena for requests.
            QuotaExceededError: it needs more pages than the tenant's adapters may take.
        """
        needed, pool = self.num_pages(spec), self._scheduler.pool
        if needed >= pool.num_pages:
            raise AdapterTooLargeError(
                f"the adapter needs {needed} pages and leaves none of the arena's {pool.num_pages} for "
                "requests; load one of a lower rank or start the server with more --memory",
                adapter_pages=needed,
                arena_pages=pool.num_pages,
            )
        most = self._scheduler.residency.max_pages(tenant)
        if most is not None and needed > most:
            raise QuotaExceededError(
                f"the adapters of tenant {tenant!r} may take {most} pages of the arena, and this one needs "
                f"{needed}; load one of a lower rank",
                tenant=tenant,
                quota="max_device_bytes",
            )

    def prefetch(self, spec: AdapterSpec, tenant: str = DEFAULT_TENANT) -> None:
        """Load an adapter before a request of the tenant names it, if there are enough free pages."""
        self._post(lambda: self._scheduler.residency.prefetch(spec, tenant))

    def check_pin_adapters(self, name: str, specs: tuple[AdapterSpec, ...]) -> None:
        """Check that adapters can be pinned under a name, instead of those that are pinned under it.

        Raises:
            AdapterTooLargeError: pinned prompts and adapters would take more than their share of the arena.
        """
        self._scheduler.allocation.check_pin_adapters(name, specs)

    def pin_adapters(self, name: str, specs: tuple[AdapterSpec, ...]) -> None:
        """Load adapters and keep them resident, instead of those that are pinned under the name. With no
        `specs`, nothing stays pinned under it.
        """
        self._post(lambda: self._scheduler.pin_adapters(name, specs))

    def drop(self, revision: str) -> None:
        """Free a revision that no new request names, and unpin its prompts."""
        self._post(lambda: self._scheduler.drop(revision))

    def is_resident(self, revision: str) -> bool:
        resident = self._scheduler.residency.get(revision)
        return resident is not None and resident.ready

    def num_pages(self, spec: AdapterSpec) -> int:
        """Pages that an adapter takes when resident."""
        return self._scheduler.residency.num_pages(spec)

    def check_integrity(self) -> None:
        """Check between two steps that no page is lost.

        Raises:
            AssertionError: the page counts do not match.
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

    def _check_generates(self) -> None:
        if self._scheduler.allocation.bidirectional:
            raise UnsupportedTaskError(
                "the model is an encoder, and generates no text; ask it to classify, tag or embed, or use a "
                "server whose model is a decoder"
            )

    def _enqueue(self, sequence: Sequence) -> None:
        self._scheduler.allocation.check_fits(sequence)
        with self._wake:
            if self._stopping:
                raise ShuttingDownError("the server is shutting down; send the request to another server")
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
                if not self.step():
                    self._sleep()
            error: TurretError = _stopped()
        except Exception as failure:
            log.critical("the engine failed, and serves no more", exc_info=True)
            error = GenerationFailedError(f"the engine failed: {type(failure).__name__}: {failure}")
            self.failed = True
        self._end_all(error)
        self.progress.is_idle = True
        if self.failed:
            self.on_failure()

    def step(self) -> bool:
        """Drain the inbox, run one step and emit its outputs; False if there was nothing to compute.

        The engine's thread calls it in a loop. Without the thread, tests and simulations call it themselves.
        """
        self.progress.begin()
        self._drain_inbox()
        step = self._scheduler.schedule(self._clock())
        seconds = self._run(step) if step is not None else 0.0
        self._on_stats(self._stats(step, seconds))
        return step is not None

    def _drain_inbox(self) -> None:
        # Both under one lock, arrivals first: the cancellation of a job must find it.
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
            sequence.job.emit(Output(finish_reason=FinishReason.FAILED, error=error))

    def _run(self, step: Step) -> float:
        started = self._clock()
        self._runner.num_failures = 0
        result = self._runner.run(step)
        for sequence_id, error in result.errors.items():
            with logs.about(self._scheduler.about(sequence_id)):
                log.warning("request %d failed: %s (%s)", sequence_id, error, error.reason)
        seconds = self._clock() - started
        self._scheduler.update(step, result, seconds)
        running = self._scheduler.running
        self._admission.record_step((each.job.max_tokens - each.num_generated for each in running), seconds)
        return seconds

    def _sleep(self) -> None:
        with self._wake:
            if not self._arriving and not self._inbox and not self._stopping:
                self.progress.is_idle = True
                # What runs is computed in every step, so the engine sleeps only beside jobs that wait.
                self._wake.wait(timeout=_IDLE_SECONDS if self._scheduler.waiting else None)

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
            num_loading=scheduler.residency.num_loading,
            num_failures=self._runner.num_failures if step is not None else 0,
            pages=pages,
        )


def _stopped() -> ShuttingDownError:
    return ShuttingDownError("the server stopped before the request finished; send it to another server")
