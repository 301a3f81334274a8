"""Decides whether the outcome of each request is allowed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import click

from soak.asking import Asked, Entry
from soak.known import QUESTIONS, Answer, KnownAnswers
from soak.timeline import State, Timeline

# Requests that end in the middle: what came of them must be how the answer begins.
CUT = {"left", "killed", "DEADLINE_EXCEEDED", "UNAVAILABLE"}


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

    def complain(self, what: str) -> None:
        with self._lock:
            self.violations.append(what)
        click.echo(f"{time.strftime('%X')} VIOLATION: {what}", err=True)

    def expect(self, holds: bool, what: str) -> None:  # noqa: FBT001 -- as in assert
        if not holds:
            self.complain(what)

    def take(self, asked: Asked) -> None:
        """Judge a request that has ended, or whose client has ended."""
        with self._lock:
            self.outcomes[asked.tenant, asked.outcome] += 1
            if asked.outcome == "ok":
                self.tokens[asked.tenant, "prompt"] += len(QUESTIONS[asked.question].prompt)
                self.tokens[asked.tenant, "generated"] += len(asked.tokens)
                self.answered[asked.entry] += 1
        if complaint := self._judge(asked):
            self.complain(f"{complaint}; {asked}")

    def _judge(self, asked: Asked) -> str:
        match asked.outcome:
            case "ok" | "left" | "killed":
                return self._answered(asked)
            case "DEADLINE_EXCEEDED" if asked.timeout is not None:
                return self._answered(asked)
            case "UNAVAILABLE" if asked.ended >= self.killed_at:
                return self._answered(asked)
        return "" if self._is_explained(asked) else "a status that nothing explains"

    def _is_explained(self, asked: Asked) -> bool:
        match asked.outcome:
            case "ADAPTER_NOT_FOUND":
                return self._may_be_absent(asked)
            case "REVISION_NOT_FOUND":
                return self._may_be_gone(asked)
            case "QUEUE_FULL":
                return asked.tenant in self.queue_full
            case "QUOTA_EXCEEDED":
                return asked.tenant in self.quota
            case "PROMPT_TOO_LONG":
                return asked.too_long
        return False

    def _answered(self, asked: Asked) -> str:
        if asked.too_long or any(self._is_forbidden(asked, name) for name in asked.names):
            return "answered what it must refuse"
        if asked.revision is None:
            return "" if asked.outcome in CUT else "answered without a revision"
        revisions = asked.revision.split("+") if asked.names else []
        if len(revisions) != len(asked.names) or bool(asked.names) != bool(asked.revision):
            return "a revision of other adapters than were named"
        for name, revision in zip(asked.names, revisions, strict=True):
            if complaint := self._served(asked, name, revision):
                return complaint
        expected = self.answers.answer(asked.revision, asked.question)
        return self._compare(asked, expected) if expected else "a revision that nobody made"

    def _served(self, asked: Asked, named: str, revision: str) -> str:
        name, _, beginning = named.partition("@")
        states = self.timeline.possible(name, asked.began, asked.ended)
        if beginning:
            if not revision.startswith(beginning):
                return "another revision than was named"
            found = any(revision in state.history for state in states)
        else:
            found = any(revision in state.served for state in states)
        if not found:
            return f"revision {revision} of {name} was not served at any time of the request"
        if asked.routing_key and not beginning and len(states) == 1 and states[0].split:
            return self._routed_alike(name, states[0], asked.routing_key, revision)
        return ""

    def _routed_alike(self, name: str, state: State, key: str, revision: str) -> str:
        """All requests with the same key use the same revision while the split does not change."""
        with self._lock:
            self.events["answers of a split with a routing key"] += 1
            before = self._routed.setdefault((name, id(state), key), revision)
        return "" if before == revision else f"routed to {revision}, and before with the same key to {before}"

    def _compare(self, asked: Asked, expected: Answer) -> str:
        with self._lock:
            self.checked += 1
            self.tokens_checked += len(asked.tokens)
        tokens = tuple(asked.tokens)
        if asked.outcome in CUT:
            return "" if tokens == expected.tokens[: len(tokens)] else f"wrong tokens, expected {expected}"
        if (tokens, asked.text, asked.finish) != (expected.tokens, expected.text, expected.finish):
            return f"a wrong answer, expected {expected}"
        if asked.ends != 1:
            return "not exactly one end"
        if asked.usage != (len(QUESTIONS[asked.question].prompt), len(tokens)):
            return "a usage that is not that of the answer"
        return ""

    def _is_forbidden(self, asked: Asked, name: str) -> bool:
        beginning = self.forbidden.get(asked.tenant)
        return beginning is not None and name.startswith(beginning)

    def _may_be_absent(self, asked: Asked) -> bool:
        return any(
            self._is_forbidden(asked, name) or any(not state.history for state in self._states(asked, name))
            for name in asked.names
        )

    def _may_be_gone(self, asked: Asked) -> bool:
        """Whether the request named a revision that the store was free to delete."""
        return any(
            not any(revision.startswith(beginning) for revision in state.kept)
            for name in asked.names
            if (beginning := name.partition("@")[2])
            for state in self._states(asked, name)
        )

    def _states(self, asked: Asked, name: str) -> list[State]:
        return self.timeline.possible(name.partition("@")[0], asked.began, asked.ended)
