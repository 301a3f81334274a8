"""Recovery from failed steps: a step that raises is computed again in halves, down to the sequences that fail
alone.

A step can be repeated wherever it failed: every sequence writes only to its own pages, does not depend on
what the step writes for others, and draws depend on seed and position alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from turret_server.engine.step import DeviceLostError, SequenceStep, Step, StepResult
from turret_server.errors import GenerationFailedError, OutOfMemoryError, TurretError

log = logging.getLogger(__name__)


class Runner(Protocol):
    """Computes steps on the device."""

    def run(self, step: Step) -> StepResult:
        """Compute a step.

        Raises:
            DeviceLostError: no step can be computed any more.
            MemoryError: the device has too little memory for this one.
        """


class RecoveringRunner:
    """Runs steps so that a sequence that fails does not fail others. `num_failures` counts failed runs;
    `on_run` is called before each.
    """

    def __init__(self, runner: Runner, on_run: Callable[[], None] = lambda: None) -> None:
        self._runner = runner
        self._on_run = on_run
        self.num_failures = 0

    def run(self, step: Step) -> StepResult:
        """Compute a step, and if it fails its halves, recursively: one sequence at fault among n is found in
        2 log n runs. The halves of a step that was too large for the memory may succeed.

        Raises:
            DeviceLostError: no step can be computed any more.
        """
        sequences = step.sequences
        self._on_run()
        try:
            return self._runner.run(step)
        except DeviceLostError:
            raise
        except Exception as error:
            self.num_failures += 1
            if len(sequences) == 1:
                [sequence] = sequences
                log.exception("the step of request %d failed alone", sequence.sequence_id)
                return StepResult(token_ids={}, errors={sequence.sequence_id: _typed(error)})
            log.warning(
                "a step of %d sequences failed, and is retried in halves: %s",
                len(sequences),
                _describe(error),
            )
        # Outside of the `except` block, as the error keeps the failed step's tensors alive.
        middle = len(sequences) // 2
        first, second = (self.run(_part(step, half)) for half in (sequences[:middle], sequences[middle:]))
        return StepResult(
            token_ids={**first.token_ids, **second.token_ids},
            errors={**first.errors, **second.errors},
            logprobs={**first.logprobs, **second.logprobs},
            prompt_logprobs={**first.prompt_logprobs, **second.prompt_logprobs},
            rows={**first.rows, **second.rows},
        )


def _part(step: Step, sequences: tuple[SequenceStep, ...]) -> Step:
    """The step for some of its sequences, with the page copies that they need."""
    pages = {page for sequence in sequences for page in sequence.block_table}
    return replace(
        step, sequences=sequences, copies=tuple(copy for copy in step.copies if copy.target in pages)
    )


def _typed(error: Exception) -> TurretError:
    if isinstance(error, MemoryError):
        return OutOfMemoryError(
            "the device has too little memory to compute the request; shorten it, or start the server with "
            "less --memory for the arena or fewer --max-batch-tokens"
        )
    return GenerationFailedError(f"the step failed for this request: {_describe(error)}")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
