from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.tokenizers import TOKENIZERS, VOCAB_SIZE, make_tokenizer
from turret_server.errors import InvalidRequestError, StructuredOutputError
from turret_server.serving import structured
from turret_server.serving.chat import Chat, Message, ToolChoice
from turret_server.serving.codec import TextCodec
from turret_server.serving.request import GenerationRequest
from turret_server.serving.structured import (
    Grammars,
    StructuredKind,
    StructuredOutput,
    after_reasoning,
    check_stops,
    form_of,
    form_of_call,
)
from turret_server.serving.tools import TOOL_FORMS, FormParser, Reasoning
from turret_server.serving.vocabulary import Vocabulary

VOCABULARIES = {
    kind: Vocabulary(
        codec=TextCodec(tokenizer := make_tokenizer(kind)),
        size=VOCAB_SIZE,
        stop_token_ids=frozenset({tokenizer.eos_token_id}),
    )
    for kind in TOKENIZERS
}
VOCABULARY = VOCABULARIES["byte-level"]
[EOS] = VOCABULARY.stop_token_ids
each_kind = pytest.mark.parametrize("kind", TOKENIZERS)


def wanted(kind, value=""):
    return StructuredOutput(kind=StructuredKind(kind), value=value)


def compiled(form, vocabulary=VOCABULARY):
    return asyncio.run(Grammars(VOCABULARY).compiled(form, vocabulary))


def token_ids_of(bits, size=VOCAB_SIZE):
    return [index for index in range(size) if bits[index // 8] >> index % 8 & 1]


def walk(grammar, vocabulary, chance, max_tokens=400):
    """The text of a random answer, and whether it ended as it should, and not at its length."""
    matcher, token_ids = grammar.start(), []
    while not matcher.is_complete and len(token_ids) < max_tokens:
        allowed = token_ids_of(matcher.allowed())
        assert allowed
        if (ends := vocabulary.stop_token_ids.intersection(allowed)) and chance.random() < 0.3:
            return vocabulary.codec.decode(token_ids), bool(ends)
        # Those that end a string, a list or an object often, so that the answer ends.
        closing = [each for each in allowed if vocabulary.codec.decode([each]) in ('"', "]", "}", "0")]
        often = closing if closing and chance.random() < 0.5 else allowed
        token_id = chance.choice([each for each in often if each not in ends] or [EOS])
        if token_id == EOS:
            return vocabulary.codec.decode(token_ids), True
        token_ids.append(token_id)
        matcher.accept(token_id)
    return vocabulary.codec.decode(token_ids), matcher.is_complete


def _object_of(schemas):
    def schema(properties, data):
        required = data if properties else []
        return {
            "type": "object",
            "properties": properties,
            "required": [name for index, name in enumerate(properties) if index % 3 < len(required)],
            "additionalProperties": False,
        }

    names = st.text(alphabet='abc é"\\', min_size=1, max_size=4)
    return st.builds(schema, st.dictionaries(names, schemas, max_size=3), st.lists(st.none(), max_size=3))


NUMBERS = st.tuples(st.integers(-50, 50), st.integers(0, 100))
LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"type": "string"}]),
    NUMBERS.map(lambda it: {"type": "integer", "minimum": it[0], "maximum": it[0] + it[1]}),
    NUMBERS.map(lambda it: {"type": "number", "minimum": it[0], "exclusiveMaximum": it[0] + it[1] + 0.5}),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
        lambda it: {"type": "string", "minLength": it[0], "maxLength": it[0] + it[1]}
    ),
    st.sampled_from(["^[a-c]{2,4}$", "^x?y*z$", "^[0-9]{3}-[0-9]{2}$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "time", "uuid", "ipv4", "email"]).map(
        lambda name: {"type": "string", "format": name}
    ),
    st.lists(st.none() | st.integers(-9, 9) | st.text(max_size=3), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda schemas: st.one_of(
        _object_of(schemas),
        st.tuples(schemas, st.integers(0, 2), st.integers(0, 2)).map(
            lambda it: {"type": "array", "items": it[0], "minItems": it[1], "maxItems": it[1] + it[2]}
        ),
        st.lists(schemas, min_size=1, max_size=3).map(lambda found: {"anyOf": found}),
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_an_answer_that_ends_is_valid_for_its_schema(kind, schema, seed):
    vocabulary, chance = VOCABULARIES[kind], random.Random(seed)
    grammar = compiled(wanted("json_schema", json.dumps(schema)), vocabulary)
    for _ in range(2):
        text, ended = walk(grammar, vocabulary, chance)
        if ended:
            jsonschema.validate(json.loads(text), schema)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_thousands_of_schemas_are_kept(schema, seed):
    vocabulary, chance = VOCABULARY, random.Random(seed)
    grammar = compiled(wanted("json_schema", json.dumps(schema)), vocabulary)
    text, ended = walk(grammar, vocabulary, chance)
    if ended:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize(
    ("form", "is_valid"),
    [
        (wanted("json_object"), lambda text: isinstance(json.loads(text), dict)),
        (wanted("regex", r"(ab|c\d){1,4}é?"), lambda text: re.fullmatch(r"(ab|c\d){1,4}é?", text)),
        (
            wanted("choice", ("yes", "no", 'a "b"\n\\', "🙂", "é")),
            ("yes", "no", 'a "b"\n\\', "🙂", "é").__contains__,
        ),
        (wanted("grammar", 'start: "(" start ")" | "x"'), lambda text: re.fullmatch(r"\(*x\)*", text)),
    ],
)
def test_each_form_is_kept(kind, form, is_valid):
    vocabulary = VOCABULARIES[kind]
    grammar = compiled(form, vocabulary)
    ended = []
    for seed in range(20):
        text, has_ended = walk(grammar, vocabulary, random.Random(seed))
        ended += [text] if has_ended else []
    assert ended
    assert all(map(is_valid, ended))


def test_a_form_that_no_token_continues_says_so():
    matcher = compiled(wanted("regex", "a≠"), VOCABULARIES["metaspace"]).start()
    [a] = token_ids_of(matcher.allowed())
    matcher.accept(a)
    with pytest.raises(StructuredOutputError, match="the vocabulary has no token"):
        matcher.allowed()


@pytest.mark.parametrize("form", [wanted("json_object"), wanted("json_schema", '{"type": "object"}')])
def test_spaces_between_the_parts_of_json_end(form):
    matcher = compiled(form).start()
    brace, space = VOCABULARY.codec.encode("{ ", 9, add_special_tokens=False)
    matcher.accept(brace)
    for _ in range(32):
        assert space in token_ids_of(matcher.allowed())
        matcher.accept(space)
    assert space not in token_ids_of(matcher.allowed())


def test_answers_of_one_form_do_not_know_of_each_other():
    grammar = compiled(wanted("choice", ("aa", "b")))
    first, second = grammar.start(), grammar.start()
    [a] = VOCABULARY.codec.encode("a", 9, add_special_tokens=False)
    before = second.allowed()
    first.accept(a)
    assert second.allowed() == before != first.allowed()


def test_a_form_is_complete_when_nothing_but_an_end_may_follow():
    matcher = compiled(wanted("regex", "ab?")).start()
    a, b = VOCABULARY.codec.encode("ab", 9, add_special_tokens=False)
    assert token_ids_of(matcher.allowed()) == [a]
    matcher.accept(a)
    assert not matcher.is_complete
    assert sorted(token_ids_of(matcher.allowed())) == sorted([b, EOS])
    matcher.accept(b)
    assert matcher.is_complete


def test_a_vocabulary_without_an_end_has_forms_that_end_by_themselves():
    vocabulary = Vocabulary(codec=VOCABULARY.codec, size=VOCAB_SIZE, stop_token_ids=frozenset())
    matcher = compiled(wanted("regex", "ab?"), vocabulary).start()
    a, b = VOCABULARY.codec.encode("ab", 9, add_special_tokens=False)
    matcher.accept(a)
    assert token_ids_of(matcher.allowed()) == [b]


def test_tokens_that_only_the_model_has_are_never_allowed():
    vocabulary = Vocabulary(codec=VOCABULARY.codec, size=VOCAB_SIZE + 100, stop_token_ids=frozenset({EOS}))
    bits = compiled(wanted("regex", "(.|\n)*"), vocabulary).start().allowed()
    assert len(bits) * 8 >= VOCAB_SIZE + 100
    assert max(token_ids_of(bits, VOCAB_SIZE + 100)) < VOCAB_SIZE


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        ("json_schema", "{", "json_schema is invalid"),
        ("json_schema", '"text"', "json_schema is invalid"),
        ("json_schema", '{"type": "integer", "not": {}}', 'Unimplemented keys: ["not"]'),
        ("json_schema", '{"type": "strin"}', "json_schema is invalid"),
        ("json_schema", '{"$ref": "http://localhost/schema"}', "not present in a registry"),
        ("json_schema", '{"not": {}, "x-guidance": {"lenient": true}}', 'Unimplemented keys: ["not"]'),
        ("json_schema", "[" * 100_000, "recursion limit"),
        ("regex", "(a", "unclosed group"),
        ("grammar", "start: missing", 'unknown name: "missing"'),
        ("grammar", "", "grammar is invalid"),
    ],
)
def test_what_is_wrong_with_a_form_is_said(kind, value, why):
    with pytest.raises(InvalidRequestError, match=re.escape(why)) as raised:
        compiled(wanted(kind, value))
    assert raised.value.metadata["field"] == kind
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"json_object": True, "regex": "a"}, "an answer has one form; found json_object and regex"),
        ({"json_object": True, "min_tokens": 1}, "min_tokens would continue an answer beyond the end"),
        ({"choice": ("a",), "ignore_eos": True}, "ignore_eos would continue an answer beyond the end"),
    ],
)
def test_what_contradicts_a_form_is_refused(fields, why):
    with pytest.raises(InvalidRequestError, match=why):
        form_of(GenerationRequest(prompt="a", **fields))


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({}, None),
        ({"json_object": True}, wanted("json_object")),
        ({"json_schema": "{}"}, wanted("json_schema", "{}")),
        ({"choice": ("a", "b")}, wanted("choice", ("a", "b"))),
    ],
)
def test_the_form_of_a_request(fields, form):
    assert form_of(GenerationRequest(prompt="a", **fields)) == form


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"stop": ("</s>", "a")}, "stop"), ({"stop_token_ids": (EOS, EOS + 5)}, "stop_token_ids")],
)
def test_nothing_cuts_an_answer_that_has_a_form(fields, field):
    with pytest.raises(InvalidRequestError, match="would cut an answer that has a form") as raised:
        check_stops(GenerationRequest(prompt="a", **fields), VOCABULARY)
    assert raised.value.metadata["field"] == field


def test_special_tokens_may_be_named_as_stops_of_an_answer_that_has_a_form():
    check_stops(GenerationRequest(prompt="a", stop=("</s>",), stop_token_ids=(EOS,)), VOCABULARY)


def test_a_form_that_becomes_too_complex_says_so():
    matcher = compiled(wanted("regex", "(.|\n)*a(.){60}c")).start()
    [a, b] = VOCABULARY.codec.encode("ab", 9, add_special_tokens=False)
    chance = random.Random(1)

    def follow():
        for _ in range(3000):
            matcher.allowed()
            matcher.accept(chance.choice([a, b]))

    with pytest.raises(StructuredOutputError, match="too complex to follow: lexer error: too many states"):
        follow()
    assert not matcher.is_complete


async def test_a_form_is_compiled_once_for_all_who_want_it(monkeypatch):
    count, compile_form = [], structured._compile
    monkeypatch.setattr(structured, "_compile", lambda *given: count.append(1) or compile_form(*given))
    grammars = Grammars(VOCABULARY)
    form = wanted("regex", "a+")
    first, second = await asyncio.gather(
        grammars.compiled(form, VOCABULARY), grammars.compiled(form, VOCABULARY)
    )
    assert first is second is await grammars.compiled(form, VOCABULARY)
    assert len(count) == 1
    assert await grammars.compiled(form, VOCABULARIES["metaspace"]) is not first
    assert len(count) == 2


async def test_one_that_goes_away_does_not_take_the_form_from_others(monkeypatch):
    begun, may_end, compile_form = threading.Event(), threading.Event(), structured._compile

    def slow(*given):
        begun.set()
        may_end.wait()
        return compile_form(*given)

    monkeypatch.setattr(structured, "_compile", slow)
    grammars = Grammars(VOCABULARY)
    form = wanted("regex", "a+")
    gone = asyncio.create_task(grammars.compiled(form, VOCABULARY))
    await asyncio.to_thread(begun.wait)
    other = asyncio.create_task(grammars.compiled(form, VOCABULARY))
    gone.cancel()
    may_end.set()
    assert (await other).start()


async def test_the_least_recently_used_form_is_forgotten(monkeypatch):
    monkeypatch.setattr(structured, "_MAX_GRAMMARS", 2)
    grammars = Grammars(VOCABULARY)
    forms = [wanted("regex", letter) for letter in "abc"]
    kept = [await grammars.compiled(form, VOCABULARY) for form in forms[:2]]
    assert await grammars.compiled(forms[0], VOCABULARY) is kept[0]
    await grammars.compiled(forms[2], VOCABULARY)
    assert await grammars.compiled(forms[0], VOCABULARY) is kept[0]
    assert await grammars.compiled(forms[1], VOCABULARY) is not kept[1]


async def test_an_invalid_form_is_not_kept():
    grammars = Grammars(VOCABULARY)
    for _ in range(2):
        with pytest.raises(InvalidRequestError):
            await grammars.compiled(wanted("regex", "("), VOCABULARY)
    assert not grammars._grammars._items


# Reasoning

THINK = Reasoning("<think>", "</think>", has_begun=False)
FORMS_AND_ANSWERS = {
    "json_schema": ('{"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}', "{"),
    "json_object": ("", "{"),
    "regex": ("a/b|[0-9]+", "a"),
    "choice": (("yes", "no"), "y"),
    "grammar": ('start: "a" REST\nREST: /b+/', "a"),
}


def fits(grammar, vocabulary, text) -> bool:
    """Whether an answer may begin with a text; special tokens by their texts."""
    matcher = grammar.start()
    for token_id in vocabulary.codec.encode(text, 1000):
        if token_id not in token_ids_of(matcher.allowed(), vocabulary.size):
            return False
        matcher.accept(token_id)
    return True


@pytest.fixture(params=["text", "token"])
def marked(request) -> Vocabulary:
    """A vocabulary in which the marks of reasoning are special tokens, or not."""
    if request.param == "text":
        return VOCABULARY
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return Vocabulary(codec=TextCodec(tokenizer), size=VOCAB_SIZE + 8, stop_token_ids=frozenset({EOS}))


@pytest.mark.parametrize("kind", FORMS_AND_ANSWERS)
def test_a_form_is_that_of_the_answer_after_the_reasoning(marked, kind):
    value, begin = FORMS_AND_ANSWERS[kind]
    form = wanted(kind, value)
    grammar = compiled(after_reasoning(form, THINK, marked.codec), marked)
    assert fits(grammar, marked, begin)
    assert fits(grammar, marked, f"<think>Hm, [yes]\n</think>\n\n{begin}")
    assert not fits(grammar, marked, "Hm")
    assert not fits(grammar, marked, "<think>Hm</think>Hm")
    assert not fits(grammar, marked, f"<think>Hm</think><think>{begin}")
    assert fits(grammar, marked, f"\n<think>Hm</think>{begin}")
    begun = compiled(after_reasoning(form, replace(THINK, has_begun=True), marked.codec), marked)
    assert fits(begun, marked, f"Hm\n</think>{begin}")
    assert not fits(begun, marked, "Hm</think>Hm")


def test_the_mark_in_other_tokens_does_not_end_the_reasoning(marked):
    """The text of the answer would begin there, in any form."""
    grammar = compiled(after_reasoning(wanted("regex", "[0-9]+"), THINK, marked.codec), marked)
    spelled = [marked.codec.encode(each, 10)[0] for each in "</think>Hm"]
    matcher = grammar.start()
    for token_id in [*marked.codec.encode("<think>Hm", 10), *spelled]:
        if token_id not in token_ids_of(matcher.allowed(), marked.size):
            return
        matcher.accept(token_id)
    raise AssertionError("a text without form was allowed")


def test_a_grammar_names_no_other(marked):
    form = wanted("grammar", "start: @answer")
    for each in (form, after_reasoning(form, THINK, marked.codec)):
        with pytest.raises(InvalidRequestError, match="grammar is invalid"):
            compiled(each, marked)
    of_text = after_reasoning(wanted("grammar", 'start: "a@b"'), THINK, marked.codec)
    assert fits(compiled(of_text, marked), marked, "<think>Hm</think>a@b")


# Calls of tools

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
)
MUST_CALL = Chat(
    messages=(Message(role="user", content=("a",)),), tools=TOOLS, tool_choice=ToolChoice.REQUIRED
)


@pytest.mark.parametrize("name", TOOL_FORMS)
@pytest.mark.parametrize("tool_name", ["", "weather"])
def test_an_answer_that_must_call_a_tool_is_read_as_one_call(name, tool_name):
    form, codec = TOOL_FORMS[name], VOCABULARY.codec
    grammar = compiled(form_of_call(replace(MUST_CALL, tool_name=tool_name), form, codec))
    called = set()
    for seed in range(30):
        text, ended = walk(grammar, VOCABULARY, random.Random(seed))
        if not ended:
            continue
        parsed = FormParser(form, None).push(text, final=True)
        assert parsed.text.strip() == ""
        assert {call.index for call in parsed.tool_calls} == {0}
        function = "".join(call.name for call in parsed.tool_calls)
        arguments = json.loads("".join(call.arguments for call in parsed.tool_calls))
        assert isinstance(arguments, dict)
        if function == "weather":
            assert arguments in ({"city": "Paris"}, {"city": "Oslo"})
        called.add(function)
    assert called == ({"weather"} if tool_name else {"weather", "now"})


def test_the_marks_of_a_call_are_the_special_tokens_where_the_vocabulary_has_them():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    mark = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    vocabulary = Vocabulary(codec=TextCodec(tokenizer), size=VOCAB_SIZE + 8, stop_token_ids=frozenset({EOS}))
    form = form_of_call(MUST_CALL, TOOL_FORMS["mistral"], vocabulary.codec)
    assert token_ids_of(compiled(form, vocabulary).start().allowed(), VOCAB_SIZE + 8) == [mark]


def test_a_form_of_calls_that_is_not_known_is_refused():
    with pytest.raises(InvalidRequestError, match="a form that is not known") as raised:
        form_of_call(MUST_CALL, None, VOCABULARY.codec)
    assert raised.value.metadata["field"] == "tool_choice"


def test_parameters_that_cannot_be_kept_are_refused_as_the_tools():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
    form = form_of_call(replace(MUST_CALL, tools=(tool,)), TOOL_FORMS["hermes"], VOCABULARY.codec)
    with pytest.raises(InvalidRequestError, match="tools is invalid: ") as raised:
        compiled(form)
    assert raised.value.metadata["field"] == "tools"


def test_an_answer_that_must_call_a_tool_has_no_other_form():
    with pytest.raises(
        InvalidRequestError, match="an answer has one form; found json_object and tool_choice"
    ):
        form_of(GenerationRequest(prompt=MUST_CALL, json_object=True))
    assert form_of(GenerationRequest(prompt=MUST_CALL)) is None
