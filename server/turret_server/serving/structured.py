"""Structured output: the form of an answer, compiled with llguidance.

Each answer has a matcher, which says after every token which tokens may come next. Compiling and matching are
bounded by limits of llguidance, so that no form takes long or grows for ever; both release the interpreter's
lock. Forms are compiled on threads and kept by vocabulary.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from turret_server.errors import InvalidRequestError, StructuredOutputError
from turret_server.serving.chat import Chat, ToolChoice
from turret_server.serving.codec import TextCodec
from turret_server.serving.request import GenerationRequest
from turret_server.serving.tools import Reasoning, ToolForm
from turret_server.serving.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_MAX_COMPILERS = 2
# Forms have at most 131072 characters (see the protocol), of which none was found that takes more than three
# seconds to compile. A compiled form takes kilobytes as a rule, a vocabulary's tokens megabytes.
_MAX_GRAMMARS = 256
_MAX_VOCABULARIES = 16
# Lexer states take about two kilobytes each, and are made while an answer is generated. Errors stay short.
_LIMITS = LLParserLimits(max_lexer_states=20_000, verbose_errors=False)
# Small models write spaces without end where they may; this is enough to indent what people read.
_JSON_DEFAULTS: JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}
_SPACE = r"[\x20\x0A\x0D\x09]{0,32}"
_JSON_OPTIONS: JsonCompileOptions = {"coerce_one_of": False, "lenient": False}
# As models write calls, and as `tools` reads them.
_CALL_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_ERROR_CHARACTERS = 500

_Item = TypeVar("_Item")


class StructuredKind(StrEnum):
    """How the form of an answer is given."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """The form of an answer: a JSON schema, a regular expression, texts to choose from, or a Lark grammar.
    `value` is a text, or the texts; JSON_OBJECT has none. `field` is the request's that wants it, if it has
    another name than the kind. `opening` is a Lark grammar of what comes before, which ends in `@answer`, the
    form; empty if nothing does.
    """

    kind: StructuredKind
    value: str | tuple[str, ...] = ""
    field: str = ""
    opening: str = ""


class Grammar:
    """A compiled form; the engine's `Grammar`."""

    def __init__(self, compiled: LLMatcher) -> None:
        self._compiled = compiled

    def start(self) -> Matcher:
        return Matcher(self._compiled.deep_copy())


class Matcher:
    """Follows one answer; the engine's `Matcher`. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether no token but an end-of-sequence token may come next."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> bytes:
        """The tokens that may come next, one bit for each, the lowest first; padded to 32 bits.

        Raises:
            StructuredOutputError: the form has become too complex, or no token can continue it.
        """
        bits = self._matcher.compute_bitmask()
        self._check()
        return bits

    def accept(self, token_id: int) -> None:
        """Go on after a token.

        Raises:
            StructuredOutputError: the form has become too complex.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        if self._matcher.get_error().startswith("NoExtensionBias"):
            raise StructuredOutputError(
                "the vocabulary has no token that continues the form of the answer; use characters that the "
                "model can write"
            )
        raise StructuredOutputError(
            f"the form of the answer became too complex to follow: {_short(self._matcher.get_error())}; "
            "use a simpler one"
        )


class Grammars:
    """Compiles and keeps the forms of answers. Used on one event loop."""

    def __init__(self, base: Vocabulary) -> None:
        """`base` is prepared now, besides what comes next."""
        self._threads = ThreadPoolExecutor(_MAX_COMPILERS, "turret-grammar")
        self._base, self._base_tokenizer = base, self._threads.submit(_tokenizer, base)
        self._tokenizers = _Kept[LLTokenizer](_MAX_VOCABULARIES)
        self._grammars = _Kept[Grammar](_MAX_GRAMMARS)

    async def compiled(self, wanted: StructuredOutput, vocabulary: Vocabulary) -> Grammar:
        """The form for answers in a vocabulary.

        Raises:
            InvalidRequestError: the form is invalid, or too complex.
        """

        async def compile_form() -> Grammar:
            return await self._run(_compile, wanted, await self._tokenizer_of(vocabulary))

        return await self._grammars.get((wanted, vocabulary), compile_form)

    async def _tokenizer_of(self, vocabulary: Vocabulary) -> LLTokenizer:
        if vocabulary == self._base:
            return await asyncio.wrap_future(self._base_tokenizer)
        return await self._tokenizers.get(vocabulary, lambda: self._run(_tokenizer, vocabulary))

    async def _run(self, function: Callable[..., _Item], *arguments: object) -> _Item:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def form_of(request: GenerationRequest) -> StructuredOutput | None:
    """The form that a request wants for its answers, besides calls of tools.

    Raises:
        InvalidRequestError: it wants several, or a field contradicts the form.
    """
    given: list[str] = [kind for kind in StructuredKind if getattr(request, kind)]
    if must_call(request):
        given.append("tool_choice")
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequestError(
            f"an answer has one form; found {' and '.join(given)}, give one of them", field=given[1]
        )
    for field in ("min_tokens", "ignore_eos"):
        if getattr(request, field):
            raise InvalidRequestError(
                f"{field} would continue an answer beyond the end of its {given[0]}; leave one of them out",
                field=field,
            )
    if must_call(request):
        return None
    value = getattr(request, given[0])
    return StructuredOutput(kind=StructuredKind(given[0]), value="" if value is True else value)


def must_call(request: GenerationRequest) -> bool:
    """Whether an answer must call a tool."""
    return isinstance(request.prompt, Chat) and request.prompt.tool_choice is ToolChoice.REQUIRED


def form_of_call(chat: Chat, form: ToolForm | None, codec: TextCodec) -> StructuredOutput:
    """The form of an answer that is one call of one of the tools, or of the one that the chat names.

    Raises:
        InvalidRequestError: it is not known how the model writes calls.
    """
    if form is None:
        raise InvalidRequestError(
            "tool_choice is auto or none for this model: its chat template writes calls of tools in a form "
            "that is not known",
            field="tool_choice",
        )
    functions = [tool["function"] for tool in chat.tools]
    schemas = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                form.arguments_key: function.get("parameters") or {"type": "object"},
            },
            "required": ["name", form.arguments_key],
            "additionalProperties": False,
        }
        for function in functions
        if chat.tool_name in ("", function["name"])
    ]
    before, after = (_lark(text, form.special, codec) for text in form.written)
    schema = {"anyOf": schemas, "x-guidance": _CALL_OPTIONS}
    grammar = f"start: {before} call {after}\ncall: %json {json.dumps(schema)}"
    return StructuredOutput(kind=StructuredKind.GRAMMAR, value=grammar, field="tools")


def after_reasoning(form: StructuredOutput, reasoning: Reasoning, codec: TextCodec) -> StructuredOutput:
    """The form of an answer that the model may reason before, or goes on to, if the prompt ends within it."""
    marks = (reasoning.open, reasoning.close)
    begin, end = (_lark(mark, marks, codec) for mark in marks)
    start = "thought SPACE" if reasoning.has_begun else f"(SPACE {begin} thought SPACE)?"
    if codec.special_token_id(reasoning.close) is None:
        thought = f"thought[suffix={end}]: /(?s:.*)/"
    else:  # the mark in other tokens would end the reasoning for who reads the answer, but not here
        mark = re.escape(reasoning.close).replace("/", r"\/")
        thought = f"thought: TEXT {end}\nTEXT: /(?s:.*)/ & ~/(?s:.*){mark}(?s:.*)/"
    return replace(form, opening=f"start: {start} @answer\n{thought}\nSPACE: /{_SPACE}/")


def _lark(text: str, special: Sequence[str], codec: TextCodec) -> str:
    """A text in Lark, with those of special tokens as the tokens."""
    for mark in special:
        token_id = codec.special_token_id(mark)
        before, found, after = text.partition(mark)
        if found and token_id is not None:
            return f"{_lark(before, special, codec)} <[{token_id}]> {_lark(after, special, codec)}"
    return json.dumps(text) if text else ""


def check_stops(request: GenerationRequest, vocabulary: Vocabulary) -> None:
    """Check that nothing cuts an answer that has a form. Special tokens are in no form's text.

    Raises:
        InvalidRequestError: a stop string or stop token has a text.
    """
    codec = vocabulary.codec
    if not all(map(codec.is_special, request.stop_token_ids)):
        field = "stop_token_ids"
    elif any(codec.special_token_id(each) is None for each in request.stop):
        field = "stop"
    else:
        return
    raise InvalidRequestError(
        f"{field} would cut an answer that has a form; leave out all but special tokens", field=field
    )


class _Tokens:
    """The tokens of a vocabulary as llguidance's `TokenizerWrapper` reads them."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        codec = vocabulary.codec
        # Without an end-of-sequence token, one stands for it that no logit belongs to: there must be one.
        self.ends = sorted(vocabulary.stop_token_ids) or [vocabulary.size]
        self.eos_token_id = self.ends[0]
        self.tokens = [codec.token_bytes(index) for index in range(max(vocabulary.size, self.ends[-1] + 1))]
        special = {index for index in range(len(self.tokens)) if codec.is_special(index)}.union(self.ends)
        self.special_token_ids = sorted(special)
        self._by_bytes = {each: index for index, each in enumerate(self.tokens) if index not in special}
        self._longest = max(map(len, self._by_bytes))

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text that the form prescribes, each the longest one: a tokenizer's own would begin some
        with a space.
        """
        token_ids, start = [], 0
        while start < len(text):
            beginnings = (text[start : start + length] for length in range(self._longest, 0, -1))
            token = next((each for each in beginnings if each in self._by_bytes), None)
            if token is None:  # no token has this byte
                break
            token_ids.append(self._by_bytes[token])
            start += len(token)
        return token_ids


def _tokenizer(vocabulary: Vocabulary) -> LLTokenizer:
    """Its making keeps the interpreter's lock for some tenths of a second."""
    tokens = _Tokens(vocabulary)
    return LLTokenizer(TokenizerWrapper(tokens), n_vocab=len(tokens.tokens), eos_token=tokens.ends)


def _compile(wanted: StructuredOutput, tokenizer: LLTokenizer) -> Grammar:
    if wanted.opening and wanted.kind is StructuredKind.GRAMMAR:
        # Alone, a grammar has errors of its own, and no other that it could refer to.
        _compile(replace(wanted, opening=""), tokenizer)
    try:
        compiled = LLMatcher(tokenizer, _source(wanted), log_level=0, limits=_LIMITS)
        error = compiled.get_error()
    except (ValueError, RecursionError) as found:
        error = str(found)
    if error:
        field = wanted.field or wanted.kind
        raise InvalidRequestError(f"{field} is invalid: {_short(error)}", field=field)
    return Grammar(compiled)


def _source(wanted: StructuredOutput) -> str:
    """The grammar in llguidance's language.

    Raises:
        ValueError: a schema is not JSON.
    """
    form = _source_of_form(wanted)
    if not wanted.opening:
        return form
    is_lark = wanted.kind in (StructuredKind.GRAMMAR, StructuredKind.CHOICE)
    answer = {"lark_grammar": form} if is_lark else json.loads(form)["grammars"][0]
    return json.dumps({"grammars": [{"lark_grammar": wanted.opening}, {**answer, "name": "answer"}]})


def _source_of_form(wanted: StructuredOutput) -> str:
    match wanted.kind, wanted.value:
        case StructuredKind.JSON_SCHEMA, str(schema):
            return LLMatcher.grammar_from_json_schema(schema, _JSON_DEFAULTS, _JSON_OPTIONS)
        case StructuredKind.JSON_OBJECT, _:
            return LLMatcher.grammar_from_json_schema({"type": "object"}, _JSON_DEFAULTS)
        case StructuredKind.REGEX, str(regex):
            return LLMatcher.grammar_from_regex(regex)
        case StructuredKind.GRAMMAR, str(lark):
            return LLMatcher.grammar_from_lark(lark)
        case StructuredKind.CHOICE, choices:
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, choices))}")
    raise AssertionError(wanted)


def _short(error: str) -> str:
    """The first lines of llguidance's message, as one."""
    return " ".join(error.partition("\n<")[0].split())[:_MAX_ERROR_CHARACTERS]


class _Kept(Generic[_Item]):
    """Items by key, the latest used. Callers that ask at once wait for the same one; errors are not kept."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: OrderedDict[Hashable, asyncio.Task[_Item]] = OrderedDict()

    async def get(self, key: Hashable, make: Callable[[], Coroutine[Any, Any, _Item]]) -> _Item:
        if key not in self._items:
            self._items[key] = asyncio.create_task(make())
        task = self._items[key]
        self._items.move_to_end(key)
        if len(self._items) > self._capacity:
            self._items.popitem(last=False)
        try:
            # A caller that goes away must not take it from the others.
            return await asyncio.shield(task)
        except Exception:
            if self._items.get(key) is task:
                del self._items[key]
            raise
