"""A peer that runs inside a Python process of its own: HF + peft, vLLM."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.layout import RANK_16, VLLM_PYTHON, Shape
from bench.process import LoggedProcess
from bench.work import Batch, NotRunError, TokenTimes

_HERE = Path(__file__).parent
_VLLM_ADAPTERS = 8


class Worker:
    """Speaks `bench.workers.protocol` with a script of `bench.workers`."""

    def __init__(
        self, shape: Shape, script: str, python: Path, names: Sequence[str], env: Mapping[str, str]
    ) -> None:
        command = [python, _HERE / "workers" / f"{script}.py", shape.model, shape.adapters, *names]
        env = os.environ | {"PYTHONPATH": str(_HERE.parent)} | env
        self._process = LoggedProcess(f"{script}-{shape.name}", command, env, pipes=True)
        self._read()

    def run(self, batch: Batch) -> TokenTimes:
        asked = {
            "prompts": batch.prompts(),
            "adapters": list(batch.adapters),
            "max_tokens": batch.max_tokens,
        }
        stdin = self._process.process.stdin
        assert stdin
        try:
            stdin.write(json.dumps(asked) + "\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise self._process.failed() from error
        return self._read()["times"]

    def close(self) -> None:
        self._process.close()

    def _read(self) -> dict:
        assert self._process.process.stdout
        line = self._process.process.stdout.readline()
        if not line:
            self._process.process.wait()
            raise self._process.failed()
        return json.loads(line)


def peft(shape: Shape) -> Worker:
    return Worker(shape, "peft_nf4", Path(sys.executable), RANK_16, {})


def vllm(shape: Shape) -> Worker:
    """vLLM with room for eight adapters: more of them cost it time even where they are not used.

    Raises:
        NotRunError: it is not installed.
    """
    if not VLLM_PYTHON.exists():
        raise NotRunError("not installed")
    cores = os.cpu_count() or 1
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return Worker(shape, "vllm_cpu", VLLM_PYTHON, RANK_16[:_VLLM_ADAPTERS], env)
