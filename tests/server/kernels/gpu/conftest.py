from __future__ import annotations

from importlib.util import find_spec

# Triton, in which the GPU kernels are written, exists for Linux only.
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
