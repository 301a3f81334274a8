"""What the comparison with transformers' own attention adds to the start, on the 1.1 B shape.

PYTHONPATH=tests python -m bench.self_check
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.layout import TINY_LLAMA
from bench.models import make_model
from turret_server.model.arena import Arena
from turret_server.model.load import load_model
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler

_ROUNDS = 5


def main() -> None:
    make_model(TINY_LLAMA)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with TemporaryDirectory() as cache:
        for dtype in (torch.float32, torch.bfloat16):
            loaded = load_model(str(TINY_LLAMA.model), device=device, dtype=dtype, cache=Path(cache))
            arena = Arena(loaded.base, 1 << 28, dtype=dtype, device=device)
            runner = ModelRunner(loaded, arena, None, Sampler())
            _seconds(runner)  # prepares what the first step of a process does
            seconds = [_seconds(runner) for _ in range(_ROUNDS)]
            runner.close()
            sys.stdout.write(
                f"{dtype}: first {seconds[0]:.2f} s, median of {_ROUNDS} {statistics.median(seconds):.2f} s\n"
            )


def _seconds(runner: ModelRunner) -> float:
    began = time.perf_counter()
    runner.check()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
