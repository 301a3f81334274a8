from __future__ import annotations

import torch

# These tests are about what only a GPU does; what kernels compute is tested without one beside the others.
collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
