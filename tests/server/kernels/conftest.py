from __future__ import annotations

from importlib.util import find_spec

# Triton, in which the kernels for GPUs are written, is there for Linux alone.
collect_ignore_glob = [] if find_spec("triton") else ["test_gpu_*.py"]
