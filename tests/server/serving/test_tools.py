from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret_server.serving.tools import (
    TOOL_FORMS,
    FormParser,
    Reasoning,
    TemplateParser,
    answer_format,
    form_of,
)

THINK = Reasoning("<think>", "</think>", has_begun=False)
TOOLS = ({"type": "function", "function": {"name": "get_weather", "parameters": {}}},)
QWEN_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<\|im_end\|>", "content": "text"},
    },
}


@dataclass
class Answer:
    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)


def read(parser, pieces) -> Answer:
    """What all deltas together make."""
    answer = Answer()
    for number, piece in enumerate(pieces, 1):
        parsed = parser.push(piece, final=number == len(pieces))
        answer.text += parsed.text
        answer.reasoning += parsed.reasoning
        for delta in parsed.tool_calls:
            if delta.index == len(answer.calls):
                answer.calls.append((delta.name, ""))
                answer.ids.append(delta.id)
            else:
                assert (delta.id, delta.name) == ("", "")
            name, arguments = answer.calls[delta.index]
            answer.calls[delta.index] = (name, arguments + delta.arguments)
    assert parser.num_calls == len(answer.calls)
    return answer


def parse(form, text, *, reasoning=None) -> Answer:
    return read(FormParser(TOOL_FORMS.get(form), reasoning), [text])


PARIS = '{"city": "Paris", "near": ["}", "\\"{"]}'
CALL = f'{{"name": "get_weather", "arguments": {PARIS}}}'
# Whole answers by their form: what is read of them, as (text, calls).
ANSWERS = {
    ("hermes", "Sunny."): ("Sunny.", []),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>"): ("", [("get_weather", PARIS)]),
    ("hermes", f"Wait.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call> Done."): (
        "Wait.Done.",
        [("get_weather", PARIS)] * 2,
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'): ("", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>'): ("", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1'): ("", [("f", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}\n</tool_'): ("", [("f", "{}")]),
    ("hermes", "a <tool_call> b </tool_call> c"): ("a <tool_call> b </tool_call> c", []),
    ("hermes", "a < b <tool"): ("a < b <tool", []),
    ("hermes", '<tool_call>{"name": "f'): ('<tool_call>{"name": "f', []),
    ("hermes", f"<tool_call>{'x' * 20000}"): (f"<tool_call>{'x' * 20000}", []),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]"): ("", [("get_weather", PARIS)] * 2),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "123456789"}]'): ("", [("f", "{}")]),
    ("mistral", 'Hm. [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{"b": 2}'): (
        "Hm.",
        [("f", '{"a": 1}'), ("g", '{"b": 2}')],
    ),
    ("mistral", "[TOOL_CALLS] none"): ("[TOOL_CALLS] none", []),
    ("llama3", '{"name": "f", "parameters": {"a": 1}}'): ("", [("f", '{"a": 1}')]),
    (
        "llama3",
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
    ): (
        "",
        [("f", "{}"), ("g", "{}")],
    ),
    ("llama3", 'So: {"name": "f", "parameters": {}}'): ('So: {"name": "f", "parameters": {}}', []),
    ("llama3", '{"name": "Ada", "age": 36}'): ('{"name": "Ada", "age": 36}', []),
}


@pytest.mark.parametrize(("form", "text"), ANSWERS, ids=lambda each: each[:24])
def test_calls_are_found_and_all_else_is_text(form, text):
    answer = parse(form, text)
    assert (answer.text, answer.calls) == ANSWERS[form, text]


@pytest.mark.parametrize(("form", "text"), ANSWERS, ids=lambda each: each[:24])
def test_an_answer_that_comes_character_by_character_is_the_same(form, text):
    found = read(FormParser(TOOL_FORMS[form], THINK), [*text, ""])
    assert (found.text, found.calls) == ANSWERS[form, text]


PARTS = st.sampled_from(
    [
        *(
            '<tool_call>\n{"name": "f", "arguments": ',
            "</tool_call>",
            "<tool_call>",
            '{"a": "}"}',
            "}",
            "{",
            "\n",
        ),
        *(
            "[TOOL_CALLS]",
            "[TOOL_CALLS][",
            "]",
            ", ",
            '{"name": "g", "parameters": ',
            "f[ARGS]",
            "; ",
            "<|python_tag|>",
        ),
        *("<think>", "</think>", " ", '"', "\\", "é", "word", '"id": "x"', "<", "[", "<tool_call"),
    ]
)
TEXTS = st.lists(PARTS, max_size=12).map("".join)


@given(
    text=TEXTS,
    form=st.sampled_from([None, *TOOL_FORMS]),
    reasoning=st.sampled_from([None, THINK, replace(THINK, has_begun=True)]),
    data=st.data(),
)
def test_the_deltas_together_do_not_depend_on_where_an_answer_was_cut(text, form, reasoning, data):
    whole = parse(form, text, reasoning=reasoning)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=len(text) + 1)))
    bounds = zip([0, *cuts], [*cuts, len(text)], strict=True)
    pieces = [text[begin:end] for begin, end in bounds]
    found = read(FormParser(TOOL_FORMS.get(form), reasoning), pieces)
    assert (found.text, found.reasoning, found.calls) == (whole.text, whole.reasoning, whole.calls)


@given(
    text=st.text(alphabet=st.characters(exclude_characters="<[{"), max_size=80),
    form=st.sampled_from([*TOOL_FORMS]),
)
def test_text_without_marks_is_what_it_was(text, form):
    assert parse(form, text) == Answer(text=text)


@given(text=TEXTS, form=st.sampled_from([*TOOL_FORMS]))
def test_an_answer_without_a_call_loses_nothing(text, form):
    answer = parse(form, text)
    if not answer.calls:
        assert answer.text == text


@given(
    arguments=st.dictionaries(
        st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(), st.lists), max_size=4
    ),
    ascii_only=st.booleans(),
)
def test_arguments_are_what_the_model_wrote(arguments, ascii_only):
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    for form, call in {
        "hermes": f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>',
        "mistral": f'[TOOL_CALLS][{{"name": "f", "arguments": {written}}}]',
        "llama3": f'{{"name": "f", "parameters": {written}}}',
    }.items():
        answer = parse(form, call)
        assert (answer.text, answer.calls) == ("", [("f", written)])


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "rest"),
    [
        ("assistant\n", "<think>\nHm.\n</think>\n\nSunny.", "Hm.", "Sunny."),
        ("assistant\n<think>\n", "Hm.\n</think>\n\nSunny.", "Hm.", "Sunny."),
        ("assistant\n<think>\n\n</think>\n\n", "Sunny.", "", "Sunny."),
        ("assistant\n", "Sunny <think> not.", "", "Sunny <think> not."),
        ("assistant\n<think>\n", "It never ends </thi", "It never ends </thi", ""),
    ],
)
def test_reasoning_precedes_the_answer(prompt, text, reasoning, rest):
    for pieces in ([text], [*text, ""]):
        answer = read(answer_format("{{ messages }}</think>", prompt, ()).parser(), pieces)
        assert (answer.reasoning, answer.text) == (reasoning, rest)


def test_arguments_are_streamed_as_they_come():
    parser = FormParser(TOOL_FORMS["hermes"], None)
    deltas = [
        parser.push(piece).tool_calls for piece in ('<tool_call>{"name": "f", "arguments": {"a', '": 1', "}")
    ]
    assert [delta.arguments for [delta] in deltas] == ['{"a', '": 1', "}"]
    assert [bool(delta.name and delta.id) for [delta] in deltas] == [True, False, False]


def test_what_is_too_long_for_a_beginning_is_not_held_back():
    parser = FormParser(TOOL_FORMS["hermes"], None)
    assert parser.push("<tool_call>" + "x" * 5000).text == ""
    assert parser.push("x" * 5000).text == "<tool_call>" + "x" * 10000


def test_ids_are_new_and_of_the_length_that_a_family_wants():
    answer = parse("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]")
    assert len(set(answer.ids)) == 2
    assert all(len(each) == 9 and each.isalnum() for each in answer.ids)
    [only] = parse("llama3", CALL).ids
    assert only.startswith("call_")


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ("{{ '<|python_tag|>' }}", "llama3"),
        ("{{ messages[0].content }}", None),
    ],
)
def test_the_template_says_which_form_it_is(template, form):
    assert form_of(template) == TOOL_FORMS.get(form)


def test_an_answer_that_is_text_alone_has_no_parser():
    assert answer_format("{{ messages }} <tool_call>", "", ()) is None
    assert answer_format("{{ messages }}", "", TOOLS) is None
    assert answer_format("{{ messages }} <tool_call>", "", TOOLS)
    assert answer_format("{{ messages }} </think>", "", ())


def test_marks_name_the_special_tokens_that_are_read():
    assert "[TOOL_CALLS]" in answer_format("[TOOL_CALLS]", "", TOOLS).marks
    template = {"fields": {"x": {"open_pattern": r"<\|tool_call>", "close": ["<end>"]}}}
    marks = answer_format("", "", (), template).marks
    assert "<|tool_call>" in marks
    assert "<end>" in marks


@pytest.mark.parametrize("cut", [True, False], ids=["characters", "whole"])
def test_a_response_template_is_read_by_transformers_parser(cut):
    text = "<think>Hm.</think>\n\nLet me see.\n<tool_call>\n" + CALL + "\n</tool_call><|im_end|>"
    parser = TemplateParser(QWEN_TEMPLATE, "<|im_start|>assistant\n", TOOLS)
    answer = read(parser, [*text, ""] if cut else [text])
    assert (answer.reasoning, answer.text) == ("Hm.", "Let me see.")
    assert [(name, json.loads(arguments)) for name, arguments in answer.calls] == [
        ("get_weather", json.loads(PARIS))
    ]


def test_a_call_that_a_response_template_does_not_understand_is_text():
    parser = TemplateParser(QWEN_TEMPLATE, "", TOOLS)
    answer = read(parser, ["Hm. <tool_call>no JSON</tool_call> And more."])
    assert answer.calls == []
    assert answer.text.startswith("Hm.")
    assert "no JSON" in answer.text
    assert answer.text.endswith(" And more.")
