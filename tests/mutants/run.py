"""Seeded random single mutants, and whether the tests notice them.

Each mutant is made in a copy of the tree. It is killed if a test of `make test` fails that passes without the
mutant, or if the types of `make check` refuse what all tests let pass; it survives if nothing does.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

import click

from mutants.covering import Covering, record
from mutants.mirrors import draw, import_path, stages
from mutants.report import Outcome, report
from mutants.sites import Mutant

ROOT = Path(__file__).resolve().parents[2]
# Guards against mutants that never end, far above what any test takes.
_TEST_SECONDS = 240
_RUN_SECONDS = 3000
_NOT_COPIED = (
    ".git",
    ".venv",
    ".bench",
    ".demo",
    ".load",
    ".model",
    ".mutants",
    ".soak",
    ".chaos",
    ".whl",
    ".*_cache",
    ".hypothesis",
)
_OK, _NO_TESTS = 0, 5
_TYPE_ERRORS = 1


@dataclass(frozen=True)
class TestRun:
    """`failed` is the test that ended the run, empty if all passed."""

    failed: str
    how: str = ""


@dataclass
class Copy:
    """A copy of the tree, which holds one mutant at a time. `num_stages` are run, all if None."""

    root: Path
    num_stages: int | None = None
    covering: Covering | None = None
    # Tests that failed with a mutant, and whether they pass without.
    clean: dict[str, bool] = field(default_factory=dict)
    _num_mutated: int = 0

    def judge(self, mutant: Mutant) -> Outcome:
        began = time.monotonic()
        diff = mutant.diff((self.root / mutant.path).read_bytes())
        found = self._hunt(mutant)
        return Outcome(mutant, diff, found.failed, found.how, time.monotonic() - began)

    def _hunt(self, mutant: Mutant) -> TestRun:
        """The first test that fails with the mutant and passes without it."""
        new_kernels = "/kernels/cpu/" in mutant.path
        for tests in self._stages(mutant):
            while True:
                broken = {name for name, passes in self.clean.items() if not passes}
                if not (left := [test for test in tests if test not in broken]):
                    break
                with self._mutated(mutant):
                    found = self._pytest(left, broken, new_kernels=new_kernels)
                if not found.failed:
                    break
                if found.failed in broken:
                    raise RuntimeError(f"{found.failed} fails without a mutant, and pytest still runs it")
                if self._passes_without(found.failed):
                    return found
        with self._mutated(mutant):
            refused = self._mypy()
        return TestRun("mypy", refused) if refused and self._has_valid_types else TestRun("")

    def _stages(self, mutant: Mutant) -> list[list[str]]:
        by_name = list(islice(stages(self.root, mutant.path), self.num_stages))
        covering = self.covering.tests(mutant, by_name[0]) if self.covering else []
        return [covering, *by_name[2:]] if covering else by_name

    def _passes_without(self, test: str) -> bool:
        if test not in self.clean:
            self.clean[test] = not self._pytest([test], set(), new_kernels=False).failed
        return self.clean[test]

    @cached_property
    def _has_valid_types(self) -> bool:
        return not self._mypy()

    def _mypy(self) -> str:
        """The first error of types, empty if there is none, or if mypy does not say so."""
        command = [sys.executable, "-m", "mypy", "--no-error-summary"]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)  # noqa: S603
        return done.stdout.partition("\n")[0] if done.returncode == _TYPE_ERRORS else ""

    @contextmanager
    def _mutated(self, mutant: Mutant) -> Iterator[None]:
        file = self.root / mutant.path
        source, written = file.read_bytes(), file.stat().st_mtime_ns
        # Compiled files are known by their source's time and size: no mutant may share the time of another.
        self._num_mutated += 1
        try:
            file.write_bytes(mutant.apply(source))
            os.utime(file, ns=(written, written + self._num_mutated * 10**9))
            yield
        finally:
            file.write_bytes(source)
            os.utime(file, ns=(written, written))

    def _pytest(self, tests: list[str], left_out: set[str], *, new_kernels: bool) -> TestRun:
        with tempfile.TemporaryDirectory(prefix="turret-mutant-", ignore_cleanup_errors=True) as folder:
            places = {"XDG_CACHE_HOME": folder, "TMPDIR": folder, "COLUMNS": "250"}
            if new_kernels:  # numba does not see that what a kernel was compiled from has changed
                places["NUMBA_CACHE_DIR"] = folder
            command = [
                sys.executable,
                "-m",
                "pytest",
                "--exitfirst",
                "--verbose",
                "--no-header",
                "--color=no",
            ]
            command += ["-m", "not slow"]
            command += ["-p", "no:cacheprovider", "-o", f"faulthandler_timeout={_TEST_SECONDS}"]
            command += ["-o", "faulthandler_exit_on_timeout=true", f"--basetemp={folder}/tests"]
            command += [f"--deselect={name}" for name in left_out]
            names = Path(folder) / "tests.txt"
            names.write_text("\n".join(tests))
            with (Path(folder) / "output").open("w+") as output:
                status = self._run([*command, f"@{names}"], os.environ | places, output.fileno())
                output.seek(0)
                return _read_run(status, output.read(), tests)

    def _run(self, command: list[str], environment: dict[str, str], output: int) -> int | None:
        """The exit status, or None at the time limit. Kills servers left behind as well."""
        environment |= {"PYTHONPATH": import_path(self.root)}
        process = subprocess.Popen(  # noqa: S603 (pytest)
            command, cwd=self.root, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(_RUN_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read_run(status: int | None, output: str, tests: list[str]) -> TestRun:
    if status in {_OK, _NO_TESTS}:
        return TestRun("")
    if found := re.search(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - (.*))?$", output, re.MULTILINE):
        return TestRun(found[1], found[2] or "error")
    begun = re.findall(r"^(tests/\S+?::\S+(?:\[.*?\])?) ?", output, re.MULTILINE)
    return TestRun(
        begun[-1] if begun else tests[0], "hung" if "Timeout (" in output else f"exit status {status}"
    )


@click.command()
@click.argument("paths", nargs=-1)
@click.option("--seed", default=0, show_default=True)
@click.option("--count", default=20, show_default=True, help="How many mutants.")
@click.option("--jobs", default=1, show_default=True, help="How many at a time.")
@click.option("--near", is_flag=True, help="Run only the tests that mirror the module and its folder.")
@click.option(
    "--covering",
    type=click.Path(path_type=Path),
    help="Folder of the record of which test runs which line, made first if missing (a run of all tests).",
)
@click.option("--gpu", is_flag=True, help="Mutate the code that only a GPU runs, instead of all other code.")
@click.option("--results", type=click.Path(path_type=Path), help="File for the report, in Markdown.")
def main(
    paths: tuple[str, ...],
    seed: int,
    count: int,
    jobs: int,
    near: bool,  # noqa: FBT001
    covering: Path | None,
    gpu: bool,  # noqa: FBT001
    results: Path | None,
) -> None:
    """Mutate the modules at PATHS (files or folders; default: all of server/ and adapters/)."""
    mutants, num_sites = draw(ROOT, paths, count=count, seed=seed, gpu=gpu)
    arguments = " ".join([*paths, f"--seed {seed} --count {count}", *["--near"][:near], *["--gpu"][:gpu]])
    about = f"`make mutants ARGS='{arguments}'`: {len(mutants)} of {num_sites} sites"
    outcomes: list[Outcome] = []
    if covering and not covering.exists():
        record(ROOT, covering.absolute())
    num_stages, lines = 2 if near else None, Covering(ROOT, covering) if covering else None
    with tempfile.TemporaryDirectory(prefix="turret-mutants-", ignore_cleanup_errors=True) as folder:
        for outcome in _judge_all(mutants, Path(folder), jobs, num_stages, lines):
            outcomes.append(outcome)
            what = f"{outcome.mutant.path} {outcome.mutant.site.kind}"
            fate = f"killed by {outcome.killer} ({outcome.how})" if outcome.killer else "SURVIVED"
            click.echo(f"{len(outcomes)}/{len(mutants)} {what}: {fate}, {outcome.seconds:.0f} s")
            if not outcome.killer:
                click.echo(outcome.diff)
            if results:
                results.write_text(report(about, outcomes))
    killed = sum(bool(outcome.killer) for outcome in outcomes)
    click.echo(f"{killed} of {len(outcomes)} killed")


def _judge_all(
    mutants: list[Mutant], folder: Path, jobs: int, num_stages: int | None, covering: Covering | None
) -> Iterator[Outcome]:
    copies = SimpleQueue[Copy]()
    for job in range(jobs):
        root = folder / str(job)
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        copies.put(Copy(root, num_stages, covering))

    def judge(mutant: Mutant) -> Outcome:
        copy = copies.get()
        try:
            return copy.judge(mutant)
        finally:
            copies.put(copy)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in as_completed([pool.submit(judge, mutant) for mutant in mutants]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
