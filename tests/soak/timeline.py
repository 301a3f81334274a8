"""Which states of a name are possible at which time.

The state after a change is possible from just before the call, the state before it until just after the
answer. An answer's revision must belong to a state that was possible between the sending of its request and
its arrival.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from turret_adapters.store.names import MAX_HISTORY

# Revisions of a name that the store keeps whatever its budget.
_KEPT = 2


@dataclass(frozen=True)
class State:
    """The history of a name, latest first, empty if it is not loaded; and its traffic split, revision and
    percent.

    `kept` are the revisions that the store must have: those that were among the latest, or in a split, ever
    since they were last served. A rollback does not restore a revision that was deleted meanwhile.
    """

    history: tuple[str, ...] = ()
    split: tuple[str, int] | None = None
    kept: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def served(self) -> set[str]:
        return {*self.history[:1], *([self.split[0]] if self.split else [])}

    def loaded(self, revision: str) -> State:
        if self.history[:1] == (revision,):
            return self._with_history(self.history)
        return self._with_history((revision, *self.history)[:MAX_HISTORY])

    def rolled_back(self, to: int) -> State:
        """The state after a rollback to the revision at this index of the history."""
        return self._with_history(self.history[to:])

    def split_to(self, revision: str, percent: int) -> State:
        return self._with(self.history, (revision, percent) if percent else None)

    def _with_history(self, history: tuple[str, ...]) -> State:
        others = set(history) - {history[0]}
        return self._with(history, self.split if self.split and self.split[0] in others else None)

    def _with(self, history: tuple[str, ...], split: tuple[str, int] | None) -> State:
        state = State(history, split)
        kept = (self.kept | state.served) & {*history[:_KEPT], *state.served}
        return replace(state, kept=frozenset(kept))


@dataclass
class _Span:
    state: State
    since: float
    until: float = float("inf")


@dataclass
class Change:
    """A change in progress; set `done` if it succeeded."""

    after: State
    done: bool = False


@dataclass
class Timeline:
    """All methods may be called from any thread. Each name is changed by one thread only."""

    _spans: dict[str, list[_Span]] = field(default_factory=dict)
    _unacknowledged: dict[str, State] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self, name: str) -> State:
        """The current state of a name, for the thread that changes it."""
        with self._lock:
            spans = self._spans.get(name)
            return spans[-1].state if spans else State()

    def names(self) -> list[str]:
        with self._lock:
            return sorted(name for name, spans in self._spans.items() if spans[-1].state.history)

    @contextmanager
    def change(self, name: str, after: State) -> Iterator[Change]:
        """A change that begins now. Unless it is `done` at the end, the state did not change."""
        change = Change(after)
        with self._lock:
            spans = self._spans.setdefault(name, [_Span(State(), 0.0)])
            before, changed = spans[-1], _Span(after, time.monotonic())
            spans.insert(-1, changed)
            self._unacknowledged.pop(name, None)
        try:
            yield change
        except BaseException:
            self._unacknowledged[name] = after
            raise
        finally:
            with self._lock:
                if change.done:
                    spans.remove(changed)
                    spans.append(changed)
                (before if change.done else changed).until = time.monotonic()

    def final_states(self) -> dict[str, list[State]]:
        """The possible final states of each name: the last known one and, where the outcome of the last
        change is unknown, the one after it.
        """
        unacknowledged = self._unacknowledged
        return {
            name: [self.now(name), *([unacknowledged[name]] if name in unacknowledged else [])]
            for name in list(self._spans)
        }

    def put(self, name: str, state: State) -> None:
        """Set the initial state of a name."""
        self._spans[name] = [_Span(state, 0.0)]

    def possible(self, name: str, began: float, ended: float) -> list[State]:
        with self._lock:
            spans: Sequence[_Span] = self._spans.get(name, [_Span(State(), 0.0)])
            return [span.state for span in spans if span.since <= ended and began <= span.until]
