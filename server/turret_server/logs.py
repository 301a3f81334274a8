"""Log lines, for people or as JSON, with the fields of the request that they are about.

Messages, fields and exceptions may hold text of a client: it is escaped, so that it neither begins a line of
its own nor moves the terminal's cursor.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Literal

Format = Literal["human", "json"]

_NOTHING: Mapping[str, object] = MappingProxyType({})
_about: ContextVar[Mapping[str, object]] = ContextVar("turret_log_about", default=_NOTHING)


def bind(**fields: object) -> None:
    """Add fields to every log line of this task or thread, and of those that are started with its context."""
    _about.set({**_about.get(), **fields})


def bound() -> Mapping[str, object]:
    return _about.get()


@contextmanager
def about(fields: Mapping[str, object]) -> Iterator[None]:
    """Use these fields for the log lines of the block."""
    token = _about.set(fields)
    try:
        yield
    finally:
        _about.reset(token)


def set_up(level: str, form: Format) -> None:
    """Log to standard error, from `level` on, Python's warnings included."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else HumanFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(capture=True)
    if form == "json" or not sys.stderr.isatty():
        # Progress bars are for terminals. The variable is read when the library is imported.
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def take_over(*loggers: str) -> None:
    """Route the logs of libraries, after they are imported, through the root logger."""
    for name in loggers:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def timestamp(seconds: float) -> str:
    """A time since the epoch as in RFC 3339, in UTC and to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class HumanFormatter(logging.Formatter):
    """Time, level, logger, message, and the fields as `key=value`; tracebacks on indented lines."""

    def format(self, record: logging.LogRecord) -> str:
        line = (
            f"{timestamp(record.created)} {record.levelname} {record.name}: {_printable(record.getMessage())}"
        )
        fields = "".join(f" {key}={_value(value)}" for key, value in _fields(record).items())
        trace = "".join(f"\n  {_printable(each)}" for each in _exception(self, record).splitlines())
        return line + fields + trace


class JsonFormatter(logging.Formatter):
    """One object a line. `exception` is a traceback as Python prints it."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if exception := _exception(self, record):
            line["exception"] = exception
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Bound fields, and those given to the logger as `extra={"fields": …}`."""
    return {**_about.get(), **getattr(record, "fields", _NOTHING)}


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""


def _value(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    plain = text.isascii() and text.isprintable() and not set(text) & set(' "=')
    return text if plain and text else json.dumps(text)


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text
    )
