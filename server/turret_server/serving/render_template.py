"""A program that renders chat templates, in a process of its own with limits.

A template is a stranger's program: it can loop for ever, compute 9 ** (9 ** 9), or build texts of any length,
some of it within one instruction of the interpreter. Here the kernel ends what takes too much time or memory.

The program reads requests from standard input and writes answers to standard output, each a JSON object in a
line. A request has the arguments of `render`; an answer has `text`, or `error`. A request that exceeds the
limit of time ends the process with `TIME_SIGNAL`.

Variables, filters and extensions are those of transformers (`render_jinja_template`), so that a template has
the same text there and here.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Of processor time, for a template that is compiled and rendered. Ordinary ones take a hundredth.
MAX_SECONDS = 1.0
MAX_MEMORY_BYTES = 512 << 20
TIME_SIGNAL = signal.SIGPROF

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PROBE = "turret-probe"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks for training what the assistant wrote; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(lineno)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Without attributes that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args  # a variable may be called self
        found = dict(*rest, **values)
        for name in found:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_attribute(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.TemplateError(f"a namespace has no attribute that begins with _; found {name!r}")


class _Dict:
    """The function `dict`, without the attributes of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # noqa: DTZ005 (as there)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 (the filter's signature)
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


_compile = lru_cache(64)(_environment().from_string)


def render(
    template: str,
    variables: Mapping[str, Any],
    max_characters: int,
    continue_final_message: bool,  # noqa: FBT001 (by the names of the request)
) -> str:
    """The text of a template.

    Raises:
        ValueError: the last message cannot be continued, or the text is too long.
        jinja2.TemplateError: the template is wrong, or refuses the messages.
    """
    messages = [_message(template, message) for message in variables["messages"]]
    final = messages[-1].get("content") if continue_final_message else None
    if continue_final_message:
        if not final:
            raise ValueError("continue_final_message: the last message has no content to continue")
        _set_last_text(messages[-1], _last_text(final) + _TAG)
    text = _text_of(template, {**variables, "messages": messages}, max_characters)
    return _up_to_tag(text, _last_text(final)) if final else text


def _text_of(template: str, variables: Mapping[str, Any], max_characters: int) -> str:
    pieces, length = [], 0
    for piece in _compile(template).generate(variables):
        length += len(piece)
        if length > max_characters:
            raise ValueError(f"its text has more than {max_characters} characters")
        pieces.append(piece)
    return "".join(pieces)


def _message(template: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """With the reasoning under the names that templates read, the content in the form that this one reads,
    which is a text or a list of parts, and the arguments of calls as objects.
    """
    found = dict(message)
    if found["role"] == "developer" and "developer" not in template:
        found["role"] = "system"
    if reasoning := found.pop("reasoning", None):
        found |= dict.fromkeys(_REASONING, reasoning)
    if parts := found.pop("content", None):
        if _reads(template, "parts") and (len(parts) > 1 or not _reads(template, "text")):
            found["content"] = [{"type": "text", "text": part} for part in parts]
        else:
            found["content"] = "\n".join(parts)
    for call in found.get("tool_calls", ()):
        call["function"]["arguments"] = _parsed(call["function"]["arguments"])
    return found


def _parsed(arguments: str) -> Any:
    """The arguments of a call as an object; as they are if they are none."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


@lru_cache(128)
def _reads(template: str, form: str) -> bool:
    """Whether a template shows the content of a message in a form. Of one in the other form, templates for
    images show nothing, and templates for text the list as Python or JSON writes it.
    """
    content = _PROBE if form == "text" else [{"type": "text", "text": _PROBE}]
    variables = {"messages": [{"role": "user", "content": content}], "add_generation_prompt": True}
    try:
        text = _compile(template).render(variables)
    except Exception:  # noqa: BLE001 (whatever a template makes of a form that it does not expect)
        return False
    return _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text


def _last_text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else content[-1]["text"]


def _set_last_text(message: dict[str, Any], text: str) -> None:
    if isinstance(message["content"], str):
        message["content"] = text
    else:
        message["content"][-1]["text"] = text


def _up_to_tag(text: str, final: str) -> str:
    """The text up to the end of the last message, which a template may have stripped."""
    end = text.rfind(_TAG.strip())
    if end < 0 or final.strip() not in text:
        raise ValueError("continue_final_message: the template does not show the last message as it is")
    return text[:end] if text[end:].startswith(_TAG) else text[:end].rstrip()


def _answer(line: bytes) -> dict[str, str]:
    try:
        return {"text": render(**json.loads(line))}
    except Exception as error:  # noqa: BLE001 (a template can raise anything)
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def main() -> None:
    os.nice(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the server closes the pipe when it ends
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        answer = json.dumps(_answer(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
