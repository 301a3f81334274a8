from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

from turret_server import logs

RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def lines():
    """A logger, and a function that gives the lines of both formats that it wrote."""
    # Not one that pytest knows and listens to: its workers cannot tell each other what is no UTF-8.
    logger = logging.Logger("turret_server.test_logs", logging.INFO)  # noqa: LOG001
    handlers = {"human": logs.HumanFormatter(), "json": logs.JsonFormatter()}
    written = {}
    for form, formatter in handlers.items():
        handler = logging.StreamHandler(io.StringIO())
        handler.setFormatter(formatter)
        logger.addHandler(handler)
        written[form] = handler.stream
    return logger, lambda form: written[form].getvalue().splitlines()


def test_a_line_says_when_how_severe_and_what_it_is_about(lines):
    logger, written = lines
    with logs.about({"request_id": "r-1", "tenant": "acme"}):
        logger.info("request %s", "finished", extra={"fields": {"prompt_tokens": 7, "seconds": 0.123456789}})
    [human], [line] = written("human"), written("json")
    time, rest = human.split(" ", 1)
    assert RFC_3339.fullmatch(time)
    assert rest == (
        "INFO turret_server.test_logs: request finished "
        "request_id=r-1 tenant=acme prompt_tokens=7 seconds=0.1235"
    )
    found = json.loads(line)
    assert RFC_3339.fullmatch(found.pop("time"))
    assert found == {
        "level": "info",
        "logger": "turret_server.test_logs",
        "message": "request finished",
        "request_id": "r-1",
        "tenant": "acme",
        "prompt_tokens": 7,
        "seconds": 0.123456789,
    }


def raised(text: str) -> ValueError:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (it is this one)
        raise ValueError(text)
    return caught.value


HOSTILE = [
    "one\nERROR two",
    "one\r\ntwo",
    "one\x1b[2Jtwo",
    "one\x85two\u2028three\u2029four",
    "one\x00\x0b\x0ctwo",
    "one\udc80two",
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_untrusted_text_starts_no_line_and_does_not_move_the_cursor(lines, text):
    logger, written = lines
    with logs.about({"tenant": text}):
        logger.info("from %s", text)
    [human], [line] = written("human"), written("json")
    assert human.isprintable()
    assert line.isprintable()
    assert json.loads(line)["message"] == f"from {text}"
    assert json.loads(line)["tenant"] == text


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_lines_of_a_traceback_are_indented(lines, text):
    logger, written = lines
    logger.error("it failed", exc_info=raised(text))
    first, *trace = written("human")
    assert first.endswith("it failed")
    assert trace[0] == "  Traceback (most recent call last):"
    assert all(each.startswith("  ") and each.isprintable() for each in trace)
    [line] = written("json")
    assert json.loads(line)["exception"].endswith(f"ValueError: {text}")


@pytest.mark.parametrize(
    ("value", "said"),
    [("a b", '"a b"'), ('a"b', r'"a\"b"'), ("a=b", '"a=b"'), ("", '""'), ("é", r'"\u00e9"'), (3, "3")],
)
def test_fields_of_a_human_readable_line_are_unambiguous(lines, value, said):
    logger, written = lines
    logger.info("x", extra={"fields": {"key": value, "next": "1"}})
    assert written("human")[0].endswith(f"x key={said} next=1")


def test_a_field_that_json_lacks_is_its_text(lines):
    logger, written = lines
    logger.info("x", extra={"fields": {"path": Path("/srv/adapters")}})
    assert json.loads(written("json")[0])["path"] == "/srv/adapters"


def test_what_is_bound_holds_for_its_own_thread_alone(lines):
    logger, written = lines
    thread = threading.Thread(target=lambda: (logs.bind(request_id="other"), logger.info("there")))
    thread.start()
    thread.join()
    logger.info("here")
    there, here = map(json.loads, written("json"))
    assert there["request_id"] == "other"
    assert "request_id" not in here


@contextmanager
def unconfigured():
    """Logging as in a new process within the block, and as before afterwards. Used in the test itself, for
    pytest adds handlers of its own before each test.
    """
    root, variable = logging.getLogger(), "HF_HUB_DISABLE_PROGRESS_BARS"
    logging.captureWarnings(capture=False)  # a test that ran a command may have left it on
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(root, "handlers", [])
        patched.setattr(root, "level", root.level)
        patched.setitem(os.environ, variable, "")
        del os.environ[variable]
        try:
            yield root
        finally:
            logging.captureWarnings(capture=False)


@pytest.mark.parametrize(
    ("form", "is_terminal", "disabled"),
    [("human", True, None), ("human", False, "1"), ("json", True, "1"), ("json", False, "1")],
)
def test_progress_bars_appear_only_between_lines_for_people_at_a_terminal(
    monkeypatch, form, is_terminal, disabled
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    with unconfigured():
        logs.set_up("warning", form)
        assert os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == disabled


@pytest.mark.parametrize("form", ["human", "json"])
def test_the_log_goes_to_standard_error_in_its_format_from_its_level_on(capsys, form):
    with unconfigured() as root:
        logs.set_up("warning", form)
        root.info("below")
        root.warning("hello")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", stacklevel=1)
    out, written = capsys.readouterr()
    assert out == ""
    first, second, *_ = written.splitlines()
    if form == "json":
        assert json.loads(first)["message"] == "hello"
        assert "old" in json.loads(second)["message"]
    else:
        assert first.endswith(" WARNING root: hello")
        assert " WARNING py.warnings: " in second


def test_the_log_of_a_library_goes_the_servers_way():
    logger, mine = logging.getLogger("turret_server.test_logs.library"), io.StringIO()
    logger.addHandler(logging.StreamHandler(mine))
    logger.propagate = False
    above = logging.StreamHandler(io.StringIO())
    logging.getLogger("turret_server.test_logs").addHandler(above)
    try:
        logs.take_over("turret_server.test_logs.library")
        logger.warning("hello")
    finally:
        logging.getLogger("turret_server.test_logs").removeHandler(above)
    assert (mine.getvalue(), above.stream.getvalue()) == ("", "hello\n")


def test_fields_of_a_block_are_its_own():
    with logs.about({"outer": 1}):
        with logs.about({"inner": 2}):
            logs.bind(more=3)
            assert logs.bound() == {"inner": 2, "more": 3}
        assert logs.bound() == {"outer": 1}
