"""Decides whether the outcome of each request is allowed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import click

from soak.known import QUESTIONS, Answer, KnownAnswers
from soak.requests import Entry, Request
from soak.timeline import State, Timeline

# Outcomes of partial answers, which must be the beginning of the whole answer.
PARTIAL = {"cancelled", "killed", "DEADLINE_EXCEEDED", "UNAVAILABLE"}


@dataclass
class Judge:
    """Counts events and collects violations. All methods may be called from any thread.

    `forbidden` maps tenants to the prefix of names that they may not use. `queue_full` and `quota` are the
    tenants that may get these refusals. `killed_at` is the time at which the server is killed.
    """

    answers: KnownAnswers
    timeline: Timeline
    forbidden: dict[str, str]
    queue_full: set[str]
    quota: set[str]
    killed_at: float = float("inf")
    events: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    tokens: Counter[tuple[str, str]] = field(default_factory=Counter)
    answered: Counter[Entry] = field(default_factory=Counter)
    checked: int = 0
    tokens_checked: int = 0
    violations: list[str] = field(default_factory=list)
    _routed: dict[tuple[str, int, str], str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, event: str, number: int = 1) -> None:
        with self._lock:
            self.events[event] += number

    def violation(self, what: str) -> None:
        with self._lock:
            self.violations.append(what)
        click.echo(f"{time.strftime('%X')} VIOLATION: {what}", err=True)

    def expect(self, holds: bool, what: str) -> None:  # noqa: FBT001 -- as in assert
        if not holds:
            self.violation(what)

    def check(self, request: Request) -> None:
        """Check a request that has ended, or whose client has ended."""
        with self._lock:
            self.outcomes[request.tenant, request.outcome] += 1
            if request.outcome == "ok":
                self.tokens[request.tenant, "prompt"] += len(QUESTIONS[request.question].prompt)
                self.tokens[request.tenant, "generated"] += len(request.tokens)
                self.answered[request.entry] += 1
        if problem := self._problem(request):
            self.violation(f"{problem}; {request}")

    def _problem(self, request: Request) -> str:
        match request.outcome:
            case "ok" | "cancelled" | "killed":
                return self._check_answer(request)
            case "DEADLINE_EXCEEDED" if request.timeout is not None:
                return self._check_answer(request)
            case "UNAVAILABLE" if request.ended >= self.killed_at:
                return self._check_answer(request)
        return "" if self._is_expected(request) else "an unexpected status"

    def _is_expected(self, request: Request) -> bool:
        match request.outcome:
            case "ADAPTER_NOT_FOUND":
                return self._may_be_absent(request)
            case "REVISION_NOT_FOUND":
                return self._may_be_deleted(request)
            case "QUEUE_FULL":
                return request.tenant in self.queue_full
            case "QUOTA_EXCEEDED":
                return request.tenant in self.quota
            case "PROMPT_TOO_LONG":
                return request.too_long
        return False

    def _check_answer(self, request: Request) -> str:
        if request.too_long or any(self._is_forbidden(request, name) for name in request.names):
            return "answered a request that must be refused"
        if request.revision is None:
            return "" if request.outcome in PARTIAL else "answered without a revision"
        revisions = request.revision.split("+") if request.names else []
        if len(revisions) != len(request.names) or bool(request.names) != bool(request.revision):
            return "the revision does not match the adapters"
        for name, revision in zip(request.names, revisions, strict=True):
            if problem := self._check_served(request, name, revision):
                return problem
        expected = self.answers.answer(request.revision, request.question)
        return self._compare(request, expected) if expected else "an unknown revision"

    def _check_served(self, request: Request, named: str, revision: str) -> str:
        name, _, beginning = named.partition("@")
        states = self.timeline.possible(name, request.began, request.ended)
        if beginning:
            if not revision.startswith(beginning):
                return "not the requested revision"
            found = any(revision in state.history for state in states)
        else:
            found = any(revision in state.served for state in states)
        if not found:
            return f"revision {revision} of {name} was not served at any time of the request"
        if request.routing_key and not beginning and len(states) == 1 and states[0].split:
            return self._check_routing(name, states[0], request.routing_key, revision)
        return ""

    def _check_routing(self, name: str, state: State, key: str, revision: str) -> str:
        """All requests with the same key use the same revision while the split does not change."""
        with self._lock:
            self.events["split answers with a routing key"] += 1
            before = self._routed.setdefault((name, id(state), key), revision)
        return "" if before == revision else f"routed to {revision}; the same key was routed to {before}"

    def _compare(self, request: Request, expected: Answer) -> str:
        with self._lock:
            self.checked += 1
            self.tokens_checked += len(request.tokens)
        tokens = tuple(request.tokens)
        if request.outcome in PARTIAL:
            return "" if tokens == expected.tokens[: len(tokens)] else f"wrong tokens, expected {expected}"
        if (tokens, request.text, request.finish) != (expected.tokens, expected.text, expected.finish):
            return f"a wrong answer, expected {expected}"
        if request.ends != 1:
            return "not exactly one final message"
        if request.usage != (len(QUESTIONS[request.question].prompt), len(tokens)):
            return "the usage does not match the answer"
        return ""

    def _is_forbidden(self, request: Request, name: str) -> bool:
        beginning = self.forbidden.get(request.tenant)
        return beginning is not None and name.startswith(beginning)

    def _may_be_absent(self, request: Request) -> bool:
        return any(
            self._is_forbidden(request, name)
            or any(not state.history for state in self._states(request, name))
            for name in request.names
        )

    def _may_be_deleted(self, request: Request) -> bool:
        """Whether the request named a revision that the store was free to delete."""
        return any(
            not any(revision.startswith(beginning) for revision in state.kept)
            for name in request.names
            if (beginning := name.partition("@")[2])
            for state in self._states(request, name)
        )

    def _states(self, request: Request, name: str) -> list[State]:
        return self.timeline.possible(name.partition("@")[0], request.began, request.ended)
