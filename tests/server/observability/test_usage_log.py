from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import wait
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from support.guarded import guard
from support.prompts import until
from turret_server.errors import ConfigError, UsageLogFailedError
from turret_server.observability import usage_log
from turret_server.observability.usage_log import UsageLog

HANG_S = 60
"""Only so that a failing test ends."""


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "usage.jsonl"


def read(path: Path) -> list[int]:
    """The numbers of the entries, each of which must be whole."""
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


def entry(number: int) -> dict[str, object]:
    return {"number": number, "padding": "x" * 100}


def test_entries_of_many_threads_are_there_once_each_when_they_say_so(path):
    with closing(UsageLog(path)) as log:

        def write(first: int) -> None:
            for number in range(first, first + 50):
                log.append(entry(number)).result(HANG_S)
                # Others may be half written now.
                assert json.dumps(entry(number)) + "\n" in path.read_text()

        threads = [threading.Thread(target=write, args=(each * 50,)) for each in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(read(path)) == list(range(200))


def test_an_entry_is_acknowledged_after_its_fsync_and_later_ones_share_the_next(path, monkeypatch):
    """The gate stands in an fsync: what is on its way then is not told, and one more is for all of it."""
    syncing, go_on, real, num_syncs = threading.Event(), threading.Event(), os.fsync, 0

    def gated(handle: int) -> None:
        nonlocal num_syncs
        num_syncs += 1
        syncing.set()
        assert go_on.wait(HANG_S)
        real(handle)

    with closing(UsageLog(path)) as log:
        monkeypatch.setattr(os, "fsync", gated)
        first = log.append(entry(0))
        assert syncing.wait(HANG_S)
        rest = [log.append(entry(number)) for number in range(1, 30)]
        assert read(path) == [0]
        assert not first.done()
        go_on.set()
        wait(rest, HANG_S)
        assert first.done()
    assert read(path) == list(range(30))
    assert num_syncs == 2


@pytest.mark.parametrize(
    "torn", ['{"number": 2, "pad', "{", '{"number": 2, "padding": ""}', "\0" * 5000, '{"' + "x" * 200_000]
)
@pytest.mark.parametrize("before", [0, 2, 3000])
def test_a_line_that_a_crash_left_unfinished_is_cut_off_and_no_other(path, torn, before):
    whole = "".join(json.dumps(entry(number)) + "\n" for number in range(before))
    path.write_text(whole + torn)
    with closing(UsageLog(path)) as log:
        assert path.read_text() == whole
        log.append(entry(before)).result(HANG_S)
    assert read(path) == list(range(before + 1))


@pytest.mark.parametrize("content", ["root:x:0:0", "one\ntwo", "\n\nthree"])
def test_a_file_of_something_else_is_left_as_it_is(path, content):
    path.write_text(content)
    with pytest.raises(ConfigError, match="found another kind of file"):
        UsageLog(path)
    assert path.read_text() == content


def test_what_is_no_file_or_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        UsageLog(tmp_path / "nowhere" / "usage.jsonl")
    with pytest.raises(ConfigError, match="irectory"):
        UsageLog(tmp_path)
    with pytest.raises(ConfigError, match="regular file"):
        UsageLog(Path("/dev/full"))


def test_a_second_server_must_use_another_file(path):
    with closing(UsageLog(path)), pytest.raises(ConfigError, match="another process writes it"):
        UsageLog(path)
    UsageLog(path).close()


def test_a_renamed_file_is_followed_by_a_new_one(path, tmp_path):
    old = tmp_path / "usage.jsonl.1"
    with closing(UsageLog(path)) as log:
        log.append(entry(0)).result(HANG_S)
        path.rename(old)
        log.append(entry(1)).result(HANG_S)
        path.unlink()
        log.append(entry(2)).result(HANG_S)
    assert read(old) == [0]
    assert read(path) == [2]


@contextmanager
def full_at(size: int):
    """No file of this process grows beyond so many bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_on_a_full_disk_entries_fail_and_are_written_once_when_there_is_room(path, monkeypatch):
    monkeypatch.setattr(usage_log, "RETRY_SECONDS", 0.01)
    with closing(UsageLog(path)) as log:
        log.append(entry(0)).result(HANG_S)
        size = path.stat().st_size
        with full_at(size + size // 2):
            failed = log.append(entry(1))
            with pytest.raises(UsageLogFailedError, match="File too large") as refused:
                failed.result(HANG_S)
            assert refused.value.retry_after == 1.0
            with pytest.raises(UsageLogFailedError):
                log.check()
            with pytest.raises(UsageLogFailedError):
                log.append(entry(2)).result(HANG_S)
            assert path.read_text().startswith(json.dumps(entry(0)) + "\n")
        log.append(entry(3)).result(HANG_S)
        log.check()
    assert read(path) == [0, 1, 2, 3]


def test_after_a_failed_fsync_the_lines_are_written_again_and_stand_there_once(path, monkeypatch):
    monkeypatch.setattr(usage_log, "RETRY_SECONDS", 0.01)
    failures, real = [OSError(5, "Input/output error")], os.fsync

    def failing(handle: int) -> None:
        if failures:
            raise failures.pop()
        real(handle)

    with closing(UsageLog(path)) as log:
        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(UsageLogFailedError, match="Input/output error"):
            log.append(entry(0)).result(HANG_S)
        log.append(entry(1)).result(HANG_S)
    assert read(path) == [0, 1]


def test_what_the_disk_never_took_stands_in_the_log_at_the_end(path, caplog):
    log = UsageLog(path)
    with full_at(10):
        failed = log.append(entry(0))
        assert failed.exception(HANG_S)
        log.close()
    assert path.stat().st_size <= 10
    [said] = [record.getMessage() for record in caplog.records if "lacks this line" in record.getMessage()]
    assert json.loads(said.partition(": ")[2]) == entry(0)
    UsageLog(path).close()
    assert read(path) == []


KILLED = """
import os, sys, threading
from itertools import count
from pathlib import Path
from turret_server.observability.usage_log import UsageLog

log = UsageLog(Path(sys.argv[1]))
first = int(sys.argv[2])

def write(thread):
    for number in count(first + thread, 8):
        log.append({"number": number, "padding": "x" * (number % 5000)}).result()
        os.write(1, b"%d\\n" % number)

for thread in range(8):
    threading.Thread(target=write, args=(thread,)).start()
"""


def test_entries_acknowledged_before_a_kill_are_in_the_log_once(path):
    told: list[int] = []
    for life in range(12):
        first = 1_000_000 * life
        process = subprocess.Popen(  # noqa: S603 (this interpreter)
            [sys.executable, "-c", KILLED, str(path), str(first)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        # Another moment of its work each time.
        lines = [process.stdout.readline() for _ in range(1 + 37 * life)]
        process.kill()
        lines += process.stdout.read().splitlines()
        process.wait()
        process.stdout.close()
        told += [int(line) for line in lines if line.strip()]
        UsageLog(path).close()
        found = read(path)
        assert len(found) == len(set(found))
        assert set(told) <= set(found)
        # Of what was not told there is at most what each thread was about to be.
        assert len(set(found) - set(told)) <= 8 * (life + 1)


@pytest.mark.parametrize("torn", ["", "{" + "x" * 100_000])
def test_of_a_long_log_only_the_end_is_read_at_the_start(path, monkeypatch, torn):
    line = json.dumps(entry(0)) + "\n"
    path.write_text(line * 5000 + torn)
    asked, pread = [], os.pread

    def counted(handle: int, size: int, offset: int) -> bytes:
        asked.append(size)
        return pread(handle, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    UsageLog(path).close()
    assert path.stat().st_size == 5000 * len(line)
    # Of more than 600,000 bytes: about as much as is cut off.
    assert sum(asked) < 250_000


def test_who_asks_while_the_disk_fails_is_told_why_and_the_log_once(path, monkeypatch, caplog):
    monkeypatch.setattr(usage_log, "RETRY_SECONDS", 0.01)
    caplog.set_level("WARNING")
    real, failures = os.fsync, [OSError(5, "Input/output error")] * 3

    def failing(handle: int) -> None:
        if failures:
            raise failures.pop()
        real(handle)

    with closing(UsageLog(path)) as log:
        log.check()
        monkeypatch.setattr(os, "fsync", failing)
        failed = log.append(entry(0))
        assert isinstance(failed.exception(HANG_S), UsageLogFailedError)
        until(lambda: not failures)
        log.append(entry(1)).result(HANG_S)
        log.check()
    assert read(path) == [0, 1]
    first, last = caplog.messages
    assert first.startswith(f"{path} cannot be written (Input/output error)")
    assert last == f"{path} can be written again"


def test_entries_are_added_and_removed_under_the_lock(path):
    log = UsageLog(path)
    guard(log, lambda: log._changed._is_owned() or not log._thread.is_alive(), "_entries")
    log.append(entry(1)).result(HANG_S)
    log.close()
    assert read(path) == [1]
