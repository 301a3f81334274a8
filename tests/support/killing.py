"""A program that kills processes which write a store and its names, and looks at what they leave.

It stands alone so that it can fork: with torch's threads in it, a process cannot do so safely.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.adapter_files import CONFIG, add, digest, files, read_folder, revision, write_folder
from turret_adapters.formats.files import digest_of_folder
from turret_adapters.store.names import Names
from turret_adapters.store.store import AdapterStore

CONTENTS = [b"tensors%d" % index * 100 for index in range(4)]
REVISIONS = [revision(content) for content in CONTENTS]
BUDGET = 2200  # two of them


class Writer:
    """One life of a server: what it does to the store and the names, step by step."""

    def __init__(self, root: Path) -> None:
        self.sources = root / "sources"
        self.store = AdapterStore(root / "store", BUDGET)
        self.names = Names(root / "store" / "names.sqlite", "llama")

    def add(self, name: str, index: int) -> None:
        found = add(self.store, self.sources / str(index))
        self.names.publish(name, found, str(index))
        self.store.release(found)

    def upload(self, name: str, index: int) -> None:
        content = CONTENTS[index]
        with self.store.receive(digest(content), CONFIG, len(content)) as upload:
            while upload.offset < upload.size:
                upload.write(upload.offset, content[upload.offset : upload.offset + 300])
            found = upload.finish()
        self.names.publish(name, found, "upload")
        self.store.release(found)

    def collect(self) -> None:
        self.store.collect(lambda: self.names.needed(depth=1))


_ZERO, _ONE, _TWO, _THREE = REVISIONS
# Steps, each with what the names serve after it.
PLAN: list[tuple[Callable[[Writer], object], dict[str, str]]] = [
    (lambda writer: writer.add("poet", 0), {"poet": _ZERO}),
    (lambda writer: writer.add("poet", 1), {"poet": _ONE}),
    (lambda writer: writer.names.rollback("poet"), {"poet": _ZERO}),
    (Writer.collect, {"poet": _ZERO}),
    (lambda writer: writer.upload("pirate", 2), {"poet": _ZERO, "pirate": _TWO}),
    (lambda writer: writer.add("poet", 3), {"poet": _THREE, "pirate": _TWO}),
    (Writer.collect, {"poet": _THREE, "pirate": _TWO}),
    (lambda writer: writer.names.remove("pirate"), {"poet": _THREE}),
    (lambda writer: writer.add("sailor", 1), {"poet": _THREE, "sailor": _ONE}),
    (Writer.collect, {"poet": _THREE, "sailor": _ONE}),
]
STATES = [{}, *(state for _, state in PLAN), {}]


def make_sources(root: Path) -> None:
    for index, content in enumerate(CONTENTS):
        write_folder(root / "sources" / str(index), content)


def kill_at(countdown: int) -> None:
    """Kills this process at the n-th line of ours or operation on a file, counted from now."""
    left = countdown

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def trace(frame: Any, event: str, _argument: object) -> Any:
        if "turret_adapters" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count()
        return trace

    def audit(event: str, _arguments: object) -> None:
        if event == "open" or event.startswith(("os.", "shutil.", "fcntl.", "sqlite3.")):
            count()

    sys.addaudithook(audit)
    sys.settrace(trace)


def fork(child: Callable[[int], None]) -> tuple[int, int]:
    """Runs `child` in a process of its own with a pipe to write to; its id and the pipe's other end."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    try:
        os.close(reader)
        child(writer)
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 -- whatever it is, it must not go up into the parent's code
        sys.stderr.write(f"the child failed: {error!r}\n")
        os._exit(1)


def told(reader: int) -> bytes:
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read()


def check(root: Path, expected: list[dict[str, str]]) -> None:
    """Asserts that what a killed process left is whole, and that opening it leaves nothing else."""
    for folder in (root / "store" / "adapters").glob("*"):
        assert digest_of_folder(folder)[:32] == folder.name, "half a revision is visible"
    for _ in range(2):
        writer = Writer(root)
        serving = {name: published.revision for name, published in writer.names.current().items()}
        assert serving in expected, f"serves {serving}, not one of {expected}"
        for name in {*serving.values()}:
            writer.store.verify(name)
            assert read_folder(writer.store.path(name)) == files(CONTENTS[REVISIONS.index(name)])
        assert list((root / "store" / "staging").iterdir()) == [], "something is left over"
        expected = [serving]
        writer.names.close()
        writer.store.close()


def count_down(root: Path, first: int, stride: int) -> None:
    """Kills a process at every `stride`-th point of its life in turn, until it lives to its end."""
    countdown = first - stride
    finished = False
    while not finished:
        countdown += stride
        shutil.rmtree(root, ignore_errors=True)
        make_sources(root)

        def live(pipe: int, countdown: int = countdown) -> None:
            kill_at(countdown)
            writer = Writer(root)
            for step, _ in PLAN:
                step(writer)
                os.write(pipe, b".")
            sys.settrace(None)

        process, reader = fork(live)
        done = len(told(reader))
        _, status = os.waitpid(process, 0)
        finished = status == 0
        assert finished or os.WTERMSIG(status) == signal.SIGKILL, f"at {countdown}: status {status}"
        try:
            check(root, STATES[done : done + 2])
            go_on(root)
        except BaseException:
            sys.stderr.write(f"killed at {countdown}, after {done} steps\n")
            raise
    sys.stdout.write(f"{countdown}\n")


def go_on(root: Path) -> None:
    """What was begun can be done: the upload goes on, whatever has come of it."""
    writer = Writer(root)
    writer.upload("pirate", 2)
    writer.add("poet", 1)
    assert list((root / "store" / "uploads").iterdir()) == []
    writer.store.verify(REVISIONS[2])
    writer.store.verify(REVISIONS[1])
    writer.names.close()
    writer.store.close()


def at_random(root: Path, rounds: int, seed: int) -> None:
    """Kills a process that writes without end at any moment, in SQLite's code too, time and again."""
    chance = random.Random(seed)
    make_sources(root)
    state: dict[str, str] = {}
    steps = 0
    for _ in range(rounds):
        draws = [(chance.randrange(5), chance.choice("abc"), chance.randrange(4)) for _ in range(1000)]

        def live(pipe: int, draws: list[tuple[int, str, int]] = draws) -> None:
            writer = Writer(root)
            for kind, name, index in draws:
                apply(writer, kind, name, index)
                os.write(pipe, b".")

        process, reader = fork(live)
        time.sleep(chance.uniform(0, 0.06))
        os.kill(process, signal.SIGKILL)
        done = len(told(reader))
        os.waitpid(process, 0)
        steps += done
        for kind, name, index in draws[:done]:
            state = after(state, kind, name, index)
        expected = [state, *(after(state, *draw) for draw in draws[done : done + 1])]
        check(root, expected)
        names = Names(root / "store" / "names.sqlite", "llama")
        state = {name: published.revision for name, published in names.current().items()}
        names.close()
    sys.stdout.write(f"{steps}\n")


def apply(writer: Writer, kind: int, name: str, index: int) -> None:
    match kind:
        case 0:
            writer.add(name, index)
        case 1:
            writer.upload(name, index)
        case 2 if name in writer.names.current():
            writer.names.remove(name)
        case 3:
            writer.collect()
        case 4 if REVISIONS[index] in writer.store.revisions():
            writer.store.verify(REVISIONS[index])


def after(state: dict[str, str], kind: int, name: str, index: int) -> dict[str, str]:
    match kind:
        case 0 | 1:
            return {**state, name: REVISIONS[index]}
        case 2:
            return {each: found for each, found in state.items() if each != name}
        case _:
            return state


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["count-down", root, first, stride]:
            count_down(Path(root), int(first), int(stride))
        case ["at-random", root, rounds, seed]:
            at_random(Path(root), int(rounds), int(seed))
