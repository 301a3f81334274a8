from __future__ import annotations

import torch

# These are about what only a GPU does; what kernels compute is tested without one beside the others.
collect_ignore = [] if torch.cuda.is_available() else ["test_decode_graph.py", "test_ops.py"]
