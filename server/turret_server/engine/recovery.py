"""A step that fails as a whole is computed again in parts, until only what fails alone is left.

That is safe at any point of a step: every sequence writes only to pages of its own, what it writes depends
on nothing that the same step writes for another, and a draw depends on its seed and position alone. So what
was done of it already is done again with the same outcome.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Protocol

from turret_server.engine.step import DeviceLostError, SequenceStep, Step, StepResult
from turret_server.errors import GenerationFailedError, OutOfMemoryError, TurretError

log = logging.getLogger(__name__)


class Runner(Protocol):
    """The device's side of a step."""

    def run(self, step: Step) -> StepResult:
        """Compute a step.

        Raises:
            DeviceLostError: no step can be computed any more.
            MemoryError: this one takes more than there is.
        """


class RecoveringRunner:
    """Runs steps so that one sequence fails no other. `num_failures` counts the runs that failed."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.num_failures = 0

    def run(self, step: Step) -> StepResult:
        """Compute a step, in halves and halves of these where it fails: one that is at fault among n
        sequences is found in 2 log n runs. A step that was too large for the memory may go through in halves.

        Raises:
            DeviceLostError: no step can be computed any more.
        """
        sequences = step.sequences
        try:
            return self._runner.run(step)
        except DeviceLostError:
            raise
        except Exception as error:
            self.num_failures += 1
            if len(sequences) == 1:
                [sequence] = sequences
                log.exception("the step of request %d failed alone", sequence.sequence_id)
                return StepResult(token_ids={}, errors={sequence.sequence_id: _told(error)})
            log.warning(
                "a step of %d sequences failed, and is computed in halves: %s", len(sequences), _shown(error)
            )
        # Not in the block above: the error keeps alive what the step had allocated.
        middle = len(sequences) // 2
        first, second = (self.run(_part(step, half)) for half in (sequences[:middle], sequences[middle:]))
        return StepResult(
            token_ids={**first.token_ids, **second.token_ids}, errors={**first.errors, **second.errors}
        )


def _part(step: Step, sequences: tuple[SequenceStep, ...]) -> Step:
    """The step for some of its sequences, with the copies of pages that these write to."""
    pages = {page for sequence in sequences for page in sequence.block_table}
    return replace(
        step, sequences=sequences, copies=tuple(copy for copy in step.copies if copy.target in pages)
    )


def _told(error: Exception) -> TurretError:
    if isinstance(error, MemoryError):
        return OutOfMemoryError(
            "the device has too little memory to compute the request; ask for less, or start the server with "
            "less --memory for the arena or fewer --max-batch-tokens"
        )
    return GenerationFailedError(f"the step failed for this request: {_shown(error)}")


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
