from __future__ import annotations

import numpy as np
import pytest

from turret_server.kernels.cpu.llvm.jit import compiled
from turret_server.kernels.cpu.llvm.vectors import SPAN, load_span, store_span


@compiled
def copy_span(source, target, num_loaded, num_stored):
    store_span(target, 0, load_span(source, 0, num_loaded), num_stored)


@pytest.mark.parametrize("count", range(SPAN + 1))
def test_a_span_is_read_and_written_no_further_than_it_counts(count):
    """What stands beyond may belong to another array, or to nobody."""
    source = np.arange(1, SPAN + 1, dtype=np.float32)
    loaded, stored = np.full((2, SPAN), -1, dtype=np.float32)
    copy_span(source, loaded, count, SPAN)
    np.testing.assert_array_equal(loaded, np.where(np.arange(SPAN) < count, source, 0))
    copy_span(source, stored, SPAN, count)
    np.testing.assert_array_equal(stored, np.where(np.arange(SPAN) < count, source, -1))
