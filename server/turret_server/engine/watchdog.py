"""Whether the engine's steps go on, judged from outside of its thread by the age of the current one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

# A step is late after this time, or after so many times what steps may take or have taken lately. It hangs
# after so many times that.
_LATE_SECONDS = 30.0
_LATE_STEPS = 10.0
_HUNG_LATES = 10.0
# Between two looks: of a longer time, the process was stopped, or its machine.
_MAX_GAP_SECONDS = 5.0
# By how much the longest step is forgotten with each look at another one.
_FADE = 0.999


@dataclass(slots=True)
class Progress:
    """Written by the engine's thread. `number` counts steps, and the parts of a step that failed."""

    number: int = 0
    is_idle: bool = True

    def begin(self) -> None:
        self.number += 1
        self.is_idle = False


class Pace(Enum):
    """How the engine's steps go on."""

    NORMAL = "normal"
    LATE = "late"
    HUNG = "hung"


class Watchdog:
    """Measures the age of the current step, to about the time between two looks.

    Steps are planned to take at most `max_step_seconds`, but on a slow machine a legitimate one takes longer:
    the first, whose time is not known yet, or many streams with a large model. So the limits grow with the
    longest step of the last minutes: a machine is late once, if at all, before it is known to be slow.
    """

    def __init__(
        self, progress: Progress, max_step_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.age = 0.0
        self._progress = progress
        self._max_step_seconds = max_step_seconds
        self._clock = clock
        self._looked = clock()
        self._number = progress.number
        self._longest = 0.0

    @property
    def limit(self) -> float:
        """Seconds after which a step is late."""
        return max(_LATE_SECONDS, _LATE_STEPS * max(self._max_step_seconds, self._longest))

    @property
    def pace(self) -> Pace:
        """As of the last look."""
        if self.age < self.limit:
            return Pace.NORMAL
        return Pace.LATE if self.age < _HUNG_LATES * self.limit else Pace.HUNG

    def look(self) -> Pace:
        """Measure the age now. It is called every second or so, from one thread."""
        now = self._clock()
        passed, self._looked = min(now - self._looked, _MAX_GAP_SECONDS), now
        if self._progress.is_idle or self._progress.number != self._number:
            self._longest = max(self._longest * _FADE, self.age)
            self._number, self.age = self._progress.number, 0.0
        else:
            self.age += passed
        return self.pace
