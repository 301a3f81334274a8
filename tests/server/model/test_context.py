from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from turret_server.kernels import ReferenceOps
from turret_server.model.context import StepContext, current_step, step_context


def context() -> StepContext:
    return StepContext(
        ops=ReferenceOps(), arena=None, attention=None, deltas=None, head_deltas=None, attention_calls=[]
    )


def test_the_context_is_that_of_the_running_forward():
    own = context()
    with step_context(own):
        assert current_step() is own
    with pytest.raises(AssertionError, match="inside step_context"):
        current_step()


def test_a_forward_that_fails_leaves_the_thread_ready_for_the_next():
    with pytest.raises(ValueError, match="broken"), step_context(context()):
        raise ValueError("broken")
    with step_context(context()):
        pass


def test_a_forward_inside_another_is_refused():
    outer = context()
    with step_context(outer):
        with pytest.raises(AssertionError, match="inside another"), step_context(context()):
            pass
        assert current_step() is outer


def test_each_thread_has_its_own():
    with step_context(context()), ThreadPoolExecutor() as pool, pytest.raises(AssertionError):
        pool.submit(current_step).result()
