"""llama.cpp: its own server on Q4_0, a slot for each request of a batch, over HTTP with streaming."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import click

from bench.layout import LLAMA_CONVERTER_NEEDS, LLAMA_CPP, LLAMA_QUANTIZE, LLAMA_SERVER, RANK_16, Shape
from bench.process import LoggedProcess
from bench.work import Batch, NotRunError, TokenTimes

_SLOTS = len(RANK_16)
_CONTEXT_OF_A_SLOT = 640
# The converter takes the digest of a tokenizer for its kind, and does not know ours: it is one like GPT-2's.
_CONVERT = """
import json, runpy, sys
sys.path[:0] = sys.argv[1:3]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
for sys.argv in json.loads(sys.argv[3]):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


class LlamaCpp:
    """Raises NotRunError where llama.cpp is not built, or its converters or server fail."""

    def __init__(self, shape: Shape) -> None:
        if not LLAMA_SERVER.exists():
            raise NotRunError("not installed")
        model, adapters = _ensure_gguf(shape)
        cores = str(os.cpu_count() or 1)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        command = [LLAMA_SERVER, "--model", model, "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--parallel", str(_SLOTS), "--ctx-size", str(_SLOTS * _CONTEXT_OF_A_SLOT)]
        command += ["--threads", cores, "--threads-batch", cores, "--lora-init-without-apply"]
        command += ["--lora", ",".join(map(str, adapters))]
        self._process = LoggedProcess(f"llama-server-{shape.name}", command, os.environ)
        try:
            self._process.wait_for(r"(listening on http)")
        except BaseException:
            self.close()
            raise

    def run(self, batch: Batch) -> TokenTimes:
        began = time.perf_counter()
        with ThreadPoolExecutor(len(batch.adapters)) as pool:
            times = pool.map(
                lambda prompt, name: [at - began for at in self._stream(prompt, name, batch.max_tokens)],
                batch.prompts(),
                batch.adapters,
            )
            return list(times)

    def close(self) -> None:
        self._process.close()

    def _stream(self, prompt: list[int], adapter: str | None, max_tokens: int) -> Iterator[float]:
        asked = {
            "prompt": prompt,
            "n_predict": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            # By its place on the command line. None named: none is applied.
            "lora": [{"id": RANK_16.index(adapter), "scale": 1.0}] if adapter else [],
        }
        connection = HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request("POST", "/completion", json.dumps(asked))
            response = connection.getresponse()
            if response.status != 200:
                raise NotRunError(f"failed: {response.read().decode()[:80]}")
            told = 0
            for line in response:
                if line.startswith(b"data: "):
                    # A message stands for several tokens where one alone was no whole character.
                    predicted = json.loads(line[6:])["tokens_predicted"]
                    yield from [time.perf_counter()] * (predicted - told)
                    told = predicted
        except OSError as error:
            raise self._process.failed() from error
        finally:
            connection.close()


def _ensure_gguf(shape: Shape) -> tuple[Path, list[Path]]:
    model = shape.gguf / "model-q4_0.gguf"
    adapters = [shape.gguf / f"{name}.gguf" for name in RANK_16]
    if shape.gguf.exists():
        return model, adapters
    click.echo(f"  converting the model and {len(adapters)} adapters of {shape.title} to GGUF")
    unfinished = shape.folder / "unfinished-gguf"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    whole = unfinished / "model-bf16.gguf"
    _convert("convert_hf_to_gguf.py", [[shape.model, "--outtype", "bf16", "--outfile", whole]])
    _call(LLAMA_QUANTIZE, whole, unfinished / model.name, "Q4_0")
    whole.unlink()
    to_f16 = ["--base", shape.model, "--outtype", "f16", "--outfile"]
    _convert(
        "convert_lora_to_gguf.py",
        [[shape.adapters / name, *to_f16, unfinished / f"{name}.gguf"] for name in RANK_16],
    )
    unfinished.rename(shape.gguf)
    return model, adapters


def _convert(script: str, calls: Sequence[Sequence[str | Path]]) -> None:
    """Run a converter several times in one process: it takes longer to import than to convert."""
    arguments = json.dumps([[str(word) for word in (LLAMA_CPP / script, *call)] for call in calls])
    _call(sys.executable, "-c", _CONVERT, LLAMA_CPP, LLAMA_CONVERTER_NEEDS, arguments)


def _call(*command: str | Path) -> None:
    done = subprocess.run(  # noqa: S603 (the benchmark's own command)
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no word"]
        raise NotRunError(f"failed: {Path(command[0]).name}: {lines[-1][:120]}")
