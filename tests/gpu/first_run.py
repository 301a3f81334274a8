"""The first five minutes on a GPU: is the server right on it, and how fast?

    bash tests/gpu/first_run.sh OUT

Correctness comes first, then speed. Each stage has a limit of time, which together are five minutes; a stage
that fails does not end the run. OUT gets a text file for each stage, and after each stage a
line in results.jsonl and in summary.txt. Weights are random, and nothing is downloaded. The exit status is 1
if a stage failed. With --dry-run, everything runs without a GPU, in Triton's interpreter on tiny shapes, to
find typos.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click

TESTS = Path(__file__).resolve().parents[1]
_DRY_RUN_FACTOR = 20


@dataclass(frozen=True, slots=True)
class Stage:
    """A command, the seconds that it may take, and what it is in a dry run, if it is not the same."""

    name: str
    seconds: int
    command: Sequence[str]
    dry: Sequence[str] | None = None


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _tests(*arguments: str) -> list[str]:
    workers = ["-n", "8", "--dist", "loadgroup"] if find_spec("xdist") else []
    return _python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=40", *workers, *arguments)


def stages(out: Path) -> list[Stage]:
    here = TESTS / "gpu"
    few = _python("-m", "pytest", "-q", "-x")
    return [
        Stage("machine", 10, _python("-m", "gpu.machine")),
        Stage(
            "streams",
            30,
            [*few, str(here / "test_streams.py")],
            [*few, str(here / "test_streams.py")],
        ),
        Stage(
            "kernels",
            60,
            _tests(str(here / "test_ops.py"), str(here / "test_decode_graph.py")),
            _python("-c", "import gpu.test_ops, gpu.test_decode_graph"),
        ),
        Stage(
            "parity",
            40,
            _tests(str(TESTS / "parity/test_peft_parity.py"), "-k", "llama", "-m", "not slow"),
            [*few, str(TESTS / "parity/test_peft_parity.py"), "-k", "llama-base"],
        ),
        Stage("ops", 40, _python("-m", "gpu.bench_ops")),
        Stage("decode", 45, _python("-m", "gpu.bench_decode")),
        Stage("profile", 25, _python("-m", "gpu.profile_steps")),
        Stage("serve", 50, _python("-m", "gpu.bench_server", str(out))),
    ]


def run(stage: Stage, number: int, out: Path, *, seconds: float, dry: bool) -> dict[str, object]:
    """Runs a stage for at most so many seconds; what became of it."""
    began = time.monotonic()
    command = stage.dry if dry and stage.dry is not None else stage.command
    status: int | str
    with (
        (out / f"{number:02}-{stage.name}.txt").open("wb") as text,
        subprocess.Popen(  # noqa: S603 (our own commands)
            command, stdout=text, stderr=subprocess.STDOUT, cwd=TESTS.parent, start_new_session=True
        ) as process,
    ):
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
    return {
        "stage": stage.name,
        "status": "ok" if status == 0 else status,
        "seconds": round(time.monotonic() - began, 1),
        "limit": round(seconds),
    }


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--dry-run", "dry", is_flag=True, help="Without a GPU, on tiny shapes, to find typos.")
def main(*, out: Path, dry: bool) -> None:
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # The tests take the device from it; in the interpreter it is the CPU.
    os.environ |= {"PYTHONUNBUFFERED": "1", "TEST_DEVICE": "cpu" if dry else "cuda"}
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    factor = _DRY_RUN_FACTOR if dry else 1
    failed = False
    with (out / "results.jsonl").open("w") as lines, (out / "summary.txt").open("w") as summary:
        for number, stage in enumerate(stages(out), 1):
            result = run(stage, number, out, seconds=stage.seconds * factor, dry=dry)
            failed |= result["status"] != "ok"
            line = "{stage:10}{seconds:7} s of {limit}: {status}".format(**result)
            click.echo(line)
            for file, text in ((lines, json.dumps(result)), (summary, line)):
                file.write(f"{text}\n")
                file.flush()
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
