"""What a chat's answer consists of: its text, calls of tools, and the reasoning before it.

Models write all of it into one text, each family in a form of its own. Where the tokenizer has a response
template, transformers' parser reads it; the common forms of others are the tables below.

Parsers get the text in pieces and return what is new. What they return depends on the whole text alone and
not on where it was cut, and text that is no call is part of the answer's text, apart from whitespace around
calls and reasoning.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

import regex
from transformers.utils.chat_parsing import ResponseParser

from turret_server.serving.chat import ToolCallDelta

# The longest beginning of a call that is held back until it is known to be one.
_MAX_HELD = 1 << 13

# At most this much whitespace, so that a text of it costs nothing.
_S = r"\s{0,32}"
_TEXT = r'"[^"<\[]{0,64}"'
_CALL = (
    rf'\{{{_S}(?:"type"{_S}:{_S}"function"{_S},{_S})?(?:"id"{_S}:{_S}{_TEXT}{_S},{_S})?'
    rf'"name"{_S}:{_S}"(?P<name>[\w.:/-]{{1,128}})"{_S},{_S}"(?:arguments|parameters)"{_S}:{_S}(?P<framed>)\{{'
)
_END = rf'{_S}(?:,{_S}"id"{_S}:{_S}{_TEXT}{_S})?\}}{_S}'


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolForm:
    """How a family of models writes calls of tools.

    Attributes:
        signs: texts of which a chat template of the family contains one.
        begin: what begins a call anywhere in an answer; "" if calls begin the answer.
        opening: from there to the brace that begins the arguments. Its group `name` is the function; or its
            group `whole` is the call as JSON, whatever the order of its keys. If its group `framed` matches,
            the arguments are followed by `more` or `end`.
        more: from the end of the arguments to the brace of the next call's; None if each begins anew.
        end: the rest of the last call.
        special: tokens of the form that are special in the family's tokenizers.
        id_length: length of an id, of letters and digits; 0 is any.
        written: what stands before and after the only call of an answer, when it is written for the model.
        arguments_key: the key of the arguments, beside "name".
    """

    signs: tuple[str, ...]
    begin: str
    opening: str
    more: str | None = None
    end: str = _END
    special: tuple[str, ...] = ()
    id_length: int = 0
    written: tuple[str, str] = ("", "")
    arguments_key: str = "arguments"


TOOL_FORMS = {
    "mistral": ToolForm(
        signs=("[TOOL_CALLS]",),
        begin="[TOOL_CALLS]",
        opening=(
            rf"\[TOOL_CALLS\]{_S}(?:\[{_S}{_CALL}|"
            rf"(?P<name>[\w.:/-]{{1,128}})(?:\[CALL_ID\][\w-]{{1,64}})?(?:\[ARGS\])?{_S}\{{)"
        ),
        more=rf"{_END},{_S}{_CALL}",
        end=rf"{_END}\]",
        special=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        id_length=9,
        written=("[TOOL_CALLS][", "]"),
    ),
    "hermes": ToolForm(
        signs=("<tool_call>",),
        begin="<tool_call>",
        opening=rf"<tool_call>{_S}(?:{_CALL}|(?P<whole>.{{1,{_MAX_HELD - 64}}}?)</tool_call>)",
        end=rf"{_END}</tool_call>",
        special=("<tool_call>", "</tool_call>"),
        written=("<tool_call>\n", "\n</tool_call>"),
    ),
    "llama3": ToolForm(
        signs=("<|python_tag|>", '{"name": function name'),
        begin="",
        opening=rf"{_S}(?:<\|python_tag\|>)?{_S}{_CALL}",
        more=rf"{_END};{_S}{_CALL}",
        special=("<|python_tag|>",),
        arguments_key="parameters",
    ),
}

# What begins and ends the reasoning of templates that have it.
REASONING_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The marks of a template's reasoning, and whether the prompt ends within it."""

    open: str
    close: str
    has_begun: bool


@dataclass(frozen=True, slots=True)
class Parsed:
    """What is new of an answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class AnswerParser(Protocol):
    """Reads one answer. `num_calls` are the calls so far."""

    num_calls: int

    def push(self, text: str, *, final: bool = False) -> Parsed:
        """Add text; returns what is certain now, and with the last text everything."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answers to a chat are read. Special tokens whose texts `marks` contains are part of the text
    that the parsers get. `form` is how calls are written, and `reasoning` what may come before an answer, if
    that is known.
    """

    marks: str
    parser: Callable[[], AnswerParser]
    form: ToolForm | None = None
    reasoning: Reasoning | None = None


def answer_format(
    template: str,
    prompt: str,
    tools: Sequence[Mapping[str, Any]],
    response_template: Mapping[str, Any] | None = None,
) -> AnswerFormat | None:
    """How to read the answers to a prompt that a chat template made; None if they are nothing but text.

    Args:
        template: the chat template.
        prompt: what it made; it may end within the reasoning.
        tools: those that an answer may call.
        response_template: the tokenizer's, as transformers has it.
    """
    form = form_of(template) if tools else None
    reasoning = _reasoning(template, prompt)
    if response_template is not None:
        marks = "\n".join(_strings(response_template)).replace("\\", "")  # of patterns too
        return AnswerFormat(marks, lambda: TemplateParser(response_template, prompt, tools), form, reasoning)
    if form is None and reasoning is None:
        return None
    special = [*(form.special if form else ()), *((reasoning.open, reasoning.close) if reasoning else ())]
    return AnswerFormat("\n".join(special), lambda: FormParser(form, reasoning), form, reasoning)


def _reasoning(template: str, prompt: str) -> Reasoning | None:
    for marks in REASONING_MARKS:
        if any(mark in template for mark in marks):
            return Reasoning(*marks, has_begun=prompt.rstrip().endswith(marks[0]))
    return None


def form_of(template: str) -> ToolForm | None:
    """The form in which a chat template teaches to call tools; None if it is not in the table."""
    return next((form for form in TOOL_FORMS.values() if any(sign in template for sign in form.signs)), None)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(each)


@dataclass(slots=True)
class _News:
    """What is found in one piece of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)

    def call(self, index: int, name: str, id_length: int) -> None:
        letters = string.ascii_letters + string.digits
        call_id = "".join(secrets.choice(letters) for _ in range(id_length or 24))
        self.calls.append(
            ToolCallDelta(index=index, id=call_id if id_length else f"call_{call_id}", name=name)
        )

    def arguments(self, index: int, new: str) -> None:
        if self.calls and self.calls[-1].index == index:
            self.calls[-1] = replace(self.calls[-1], arguments=self.calls[-1].arguments + new)
        elif new:
            self.calls.append(ToolCallDelta(index=index, arguments=new))

    def parsed(self) -> Parsed:
        return Parsed(self.text, self.reasoning, tuple(self.calls))


class FormParser:
    """Reads an answer with calls in one of `TOOL_FORMS`, with reasoning between two marks, or both.

    It is a machine: the method that is its state takes something from the beginning of what is held, and
    returns whether the state that follows can go on before more text comes.
    """

    def __init__(self, form: ToolForm | None, reasoning: Reasoning | None) -> None:
        self.num_calls = 0
        self._form = form
        self._open_mark, self._close_mark = (reasoning.open, reasoning.close) if reasoning else ("", "")
        self._held = ""
        self._final = False
        self._news = _News()
        # The whitespace that comes next belongs to a mark.
        self._skips_space = False
        self._is_framed = False
        self._arguments = _ArgumentsScan()
        self._state = self._begin
        if reasoning and reasoning.has_begun:
            self._after_mark(self._in_reasoning, "")

    def push(self, text: str, *, final: bool = False) -> Parsed:
        self._held += text
        self._final = final
        while self._state():
            pass
        news, self._news = self._news, _News()
        return news.parsed()

    def _begin(self) -> bool:
        """The answer may begin with reasoning."""
        rest = self._held.lstrip()
        if self._open_mark and rest.startswith(self._open_mark):
            return self._after_mark(self._in_reasoning, rest.removeprefix(self._open_mark))
        if self._open_mark.startswith(rest) and not self._final:
            return False
        self._state = self._begin_text
        return True

    def _in_reasoning(self) -> bool:
        reasoning, mark, rest = self._held.partition(self._close_mark)
        if mark:
            self._news.reasoning += self._shown(reasoning.rstrip())
            return self._after_mark(self._begin_text, rest)
        self._news.reasoning += self._take_before(self._close_mark)
        return False

    def _begin_text(self) -> bool:
        """Calls of a form without a mark for their beginning are here or nowhere."""
        if self._form and not self._form.begin:
            match = self._match(self._form.opening)
            if match and match.partial:
                return False
            if match:
                return self._open(match)
            self._form = None
        self._state = self._in_text
        return True

    def _in_text(self) -> bool:
        if self._form is None or not self._form.begin:
            self._news.text += self._shown(self._held)
            self._held = ""
            return False
        text, mark, rest = self._held.partition(self._form.begin)
        if not mark:
            self._news.text += self._take_before(self._form.begin)
            return False
        match = self._match(self._form.opening, len(text))
        if match is None:
            self._news.text += self._shown(text + mark)
            self._held = rest
            return True
        # Whitespace before a call is known to be that with the call.
        certain = text.rstrip()
        self._news.text += self._shown(certain)
        self._held = self._held[len(certain) :]
        if match.partial:
            return False
        space = self._held[: len(text) - len(certain)]
        self._held = self._held.removeprefix(space)
        return self._open(match, space)

    def _in_arguments(self) -> bool:
        end = self._arguments.end_in(self._held)
        self._news.arguments(self.num_calls - 1, self._held[:end])
        self._held = self._held[end:]
        if not self._arguments.is_whole:
            return False
        if not self._is_framed:
            return self._after_mark(self._in_text, self._held)
        self._state = self._after_arguments
        return True

    def _after_arguments(self) -> bool:
        assert self._form
        for pattern in filter(None, [self._form.more, self._form.end]):
            match = self._match(pattern, more_may_come=True)
            if match is None:
                continue
            if match.partial and not self._final:
                return False
            if pattern == self._form.more and not match.partial:
                return self._open(match)
            # An answer that ends within the end of a call ends with it.
            return self._after_mark(self._in_text, self._held[match.end() :])
        self._state = self._in_text
        return True

    def _open(self, match: Any, space: str = "") -> bool:
        """Begin with a call, of which the match is the beginning or the whole, after whitespace."""
        groups = match.groupdict()
        self._held = self._held[len(match[0]) :]
        if groups.get("whole") is None:
            self._call(groups["name"])
            self._is_framed = groups.get("framed") is not None
            self._held = "{" + self._held
            self._arguments = _ArgumentsScan()
            self._state = self._in_arguments
            return True
        call = _call_of(groups["whole"])
        if call is None:
            self._news.text += self._shown(space + match[0])
            self._state = self._in_text
            return True
        self._call(call[0])
        self._news.arguments(self.num_calls - 1, call[1])
        return self._after_mark(self._in_text, self._held)

    def _call(self, name: str) -> None:
        assert self._form
        self._news.call(self.num_calls, name, self._form.id_length)
        self.num_calls += 1

    def _after_mark(self, state: Callable[[], bool], rest: str) -> bool:
        self._state, self._held, self._skips_space = state, rest, True
        return True

    def _shown(self, text: str) -> str:
        if self._skips_space and text:
            text = text.lstrip()
            self._skips_space = not text
        return text

    def _take_before(self, mark: str) -> str:
        """What is held, without what may be the beginning of a mark or whitespace before it."""
        certain = self._held
        if not self._final:
            certain = certain[: len(certain) - _overlap(certain, mark)].rstrip()
        self._held = self._held[len(certain) :]
        return self._shown(certain)

    def _match(self, pattern: str, begin: int = 0, *, more_may_come: bool = False) -> Any:
        """A match of what is held, or a partial one if more text may complete it."""
        match = _compiled(pattern).match(self._held, begin, partial=more_may_come or not self._final)
        return None if match and match.end() - match.start() > _MAX_HELD else match


class _ArgumentsScan:
    """Finds where a JSON object ends, in pieces. The JSON is not checked: it is the model's."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = False
        self._is_escaped = False
        self.is_whole = False

    def end_in(self, piece: str) -> int:
        """The end of the object in the next piece, or of the piece."""
        for position, character in enumerate(piece):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_text:
                self._is_escaped = character == "\\"
                self._in_text = character != '"'
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self.is_whole = True
                    return position + 1
        return len(piece)


class TemplateParser:
    """Reads an answer by a response template, with transformers' parser."""

    _REASONING = ("reasoning_content", "thinking", "reasoning")

    def __init__(self, template: Mapping[str, Any], prompt: str, tools: Sequence[Mapping[str, Any]]) -> None:
        self.num_calls = 0
        # A field that is missing is no reason to lose the others.
        fields = {name: {**value, "optional": True} for name, value in template["fields"].items()}
        self._parser: ResponseParser | None = ResponseParser(
            {**template, "fields": fields}, prefix=prompt, tools=list(tools)
        )
        self._news = _News()
        self._skips_space = True
        # Of a field with calls: it is text if it turns out to be none.
        self._pending = ""

    def push(self, text: str, *, final: bool = False) -> Parsed:
        # One by one: of a text that fails, nothing else is lost.
        for character in text:
            self._read(character)
        if final:
            self._read("", final=True)
        news, self._news = self._news, _News()
        return news.parsed()

    def _read(self, text: str, *, final: bool = False) -> None:
        if self._parser is None:
            self._news.text += text
            return
        try:
            events = self._parser.finalize()[1] if final else self._parser.feed(text)
        except Exception:  # noqa: BLE001 (what models write is no template's fault)
            self._news.text += self._pending + text
            self._parser = None
            return
        for event in events:
            self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        is_call = event["field"] == "tool_calls"
        if event["type"] == "region_open":
            self._skips_space, self._pending = True, ""
        elif event["type"] == "region_close":
            values = event["value"] if isinstance(event["value"], list) else [event["value"]]
            for value in values if is_call else ():
                self._call(value["function"])
            self._pending = ""
        elif is_call:
            self._pending += event["text"]
        else:
            shown = event["text"].lstrip() if self._skips_space else event["text"]
            self._skips_space = self._skips_space and not shown
            if event["field"] in self._REASONING:
                self._news.reasoning += shown
            else:
                self._news.text += shown

    def _call(self, function: Mapping[str, Any]) -> None:
        arguments = function.get("arguments", {})
        self._news.call(self.num_calls, str(function["name"]), 0)
        self._news.arguments(self.num_calls, arguments if isinstance(arguments, str) else _json(arguments))
        self.num_calls += 1


_compiled = lru_cache(lambda pattern: regex.compile(pattern, regex.DOTALL))


def _call_of(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is written as JSON; None if it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return call["name"], arguments if isinstance(arguments, str) else _json(arguments)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest suffix of a text that is a proper prefix of a mark."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(mark[:length])), 0)
