"""The oracle is transformers' `apply_chat_template`."""

from __future__ import annotations

import asyncio
import json
import os
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.fake_device import make_spec
from support.tokenizers import make_tokenizer
from turret_server.errors import ChatTemplateError, InvalidRequestError, NoChatTemplateError
from turret_server.serving import chat_templates
from turret_server.serving.chat import Chat, Message, ToolCall, ToolChoice
from turret_server.serving.chat_templates import ChatTemplates

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The <weather> & é",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
CHATML = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
STRICT = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate') }}
{% endif %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]{% else %}
{% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}{% endif %}
{% endfor %}"""
AGENT = """{% set ns = namespace(seen=false, self=1) %}
{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}
{{ tool | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}
{% endfor %}</tools>{% endif %}
{% for message in messages -%}
{% if message.role == 'tool' %}<result>{{ message.content }} of {{ message.tool_call_id }}</result>
{% continue %}{% endif %}
<{{ message.role }}>
{%- if message.reasoning_content and enable_thinking %}
<think>{{ message.reasoning_content }}</think>{% endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments":
{{ call.function.arguments | tojson(indent=1) }}}</tool_call>
{%- set ns.seen = true %}
{%- endfor %}
{%- endfor %}{{ ns.seen }}{{ dict(a=1) }}{{ strftime_now('%Y') }}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
PARTS = """{% for message in messages %}{{ message.role }}:
{%- for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}
{% endfor %}"""
EITHER = """{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}({{ part['text'] }}){% endfor %}{% endif %}{% endfor %}"""

USER = Message(role="user", content=("Is it <sunny> & warm? é",))
SYSTEM = Message(role="system", content=("Be brief.",))
HELLO = Message(role="assistant", content=(" Hello. ",), reasoning="Greet.")
CALL = Message(
    role="assistant",
    tool_calls=(ToolCall(id="call00001", name="get_weather", arguments='{"city": "Paris", "days": 2}'),),
)
RESULT = Message(role="tool", content=("sunny",), tool_call_id="call00001", name="get_weather")
CHATS = {
    "one": Chat(messages=(USER,)),
    "several": Chat(messages=(SYSTEM, USER, HELLO, USER)),
    "alternating": Chat(messages=(USER, HELLO, USER), add_generation_prompt=False),
    "tools": Chat(messages=(SYSTEM, USER, CALL, RESULT, USER), tools=(TOOL,)),
    "arguments": Chat(messages=(USER, HELLO, USER), template_arguments={"enable_thinking": True}),
    "continued": Chat(messages=(USER, HELLO), continue_final_message=True),
}
TEMPLATES = {"chatml": CHATML, "strict": STRICT, "agent": AGENT, "either": EITHER}


@pytest.fixture(scope="module")
def shared():
    """Processes that render for all tests take a while to start."""
    templates = ChatTemplates(None, lambda _: None)
    yield templates
    templates.close()


@pytest.fixture
def rendering(shared, monkeypatch):
    """Renders chats by the templates of a model, and of revisions that have their own."""

    def rendering(templates, own=None, response_template=None):
        monkeypatch.setattr(shared, "base", templates)
        monkeypatch.setattr(shared, "_own", OrderedDict())
        monkeypatch.setattr(shared, "_read", (own or {}).__getitem__)
        monkeypatch.setattr(shared, "_response_template", response_template)

        async def render(chat, adapters=()):
            return await shared.render(chat, adapters, make_tokenizer().special_tokens_map)

        return render

    return rendering


def as_dicts(chat: Chat) -> list[dict[str, Any]]:
    """The messages as transformers gets them."""
    found = []
    for message in chat.messages:
        [content] = message.content or [None]
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.tool_calls
        ]
        found.append(
            {
                "role": message.role,
                "content": content,
                "reasoning_content": message.reasoning or None,
                "tool_calls": calls or None,
                "tool_call_id": message.tool_call_id or None,
                "name": message.name or None,
            }
        )
    return found


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
async def test_a_prompt_is_the_one_of_transformers(rendering, template, chat):
    tokenizer = make_tokenizer()

    def expected() -> str:
        return tokenizer.apply_chat_template(
            as_dicts(chat),
            tools=list(chat.tools) or None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
            continue_final_message=chat.continue_final_message,
            **chat.template_arguments,
        )

    render = rendering(template)
    if chat.tools and "tools" not in template:
        with pytest.raises(InvalidRequestError, match="no place for tools"):
            await render(chat)
        return
    try:
        wanted = expected()
    except Exception as error:  # noqa: BLE001 (the template's)
        with pytest.raises(ChatTemplateError, match=str(error)[:20]):
            await render(chat)
    else:
        assert (await render(chat)).prompt == wanted


@pytest.mark.parametrize(
    ("template", "one", "two"),
    [(CHATML, "a", "a\nb"), (PARTS, "user:a", "user:ab"), (EITHER, "a", "(a)(b)")],
    ids=["text", "parts", "either"],
)
async def test_text_parts_have_the_form_that_a_template_reads(rendering, template, one, two):
    render = rendering(template)
    for parts, text in ((("a",), one), (("a", "b"), two)):
        chat = Chat(messages=(Message(role="user", content=parts),), add_generation_prompt=False)
        prompt = (await render(chat)).prompt
        assert prompt.removeprefix("<s><|im_start|>user\n").removesuffix("<|im_end|>\n").strip() == text


async def test_a_developer_is_the_system_where_a_template_knows_none(rendering):
    chat = Chat(messages=(Message(role="developer", content=("x",)),))
    assert "<|im_start|>system\nx" in (await rendering(CHATML)(chat)).prompt
    knows = "{{ messages[0].role }}{% if messages[0].role == 'developer' %}!{% endif %}"
    assert (await rendering(knows)(chat)).prompt == "developer!"


async def test_the_template_for_tools_is_used_with_tools(rendering):
    render = rendering({"default": "default", "tool_use": "with {{ tools[0].function.name }}"})
    chat = Chat(messages=(USER,), tools=(TOOL,))
    assert (await render(chat)).prompt == "with get_weather"
    assert (await render(replace(chat, tool_choice=ToolChoice.NONE))).prompt == "default"
    assert (await render(replace(chat, tools=()))).prompt == "default"


async def test_an_adapters_own_template_comes_before_the_models(rendering):
    render = rendering("model", {"1" * 32: "first", "2" * 32: "second"})
    plain, first, second = (
        replace(make_spec(str(digit) * 32, slab_pages=1), chat_template=name)
        for digit, name in ((0, ""), (1, "a"), (2, "b"))
    )
    chat = Chat(messages=(USER,))
    found = [
        (await render(chat, specs)).prompt for specs in ([plain], [plain, second], [first, second], [first])
    ]
    assert found == ["model", "second", "first", "first"]


@pytest.mark.parametrize("templates", [None, {}, {"tool_use": "x"}])
async def test_a_model_without_a_template_says_how_to_give_one(rendering, templates):
    with pytest.raises(NoChatTemplateError, match="--chat-template FILE"):
        await rendering(templates)(Chat(messages=(USER,)))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.mro() }}", "SecurityError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{% set ns = namespace(_x=1) %}", "begins with _"),
        ("{{ raise_exception('Only one system message!') }}", "Only one system message!"),
        ("{% include 'secrets' %}", "no loader"),
        ("{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}", "more than"),
        ("{{ 'x' * 10 ** 11 }}", "MemoryError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    ],
)
async def test_a_template_that_fails_says_why_and_the_next_chat_is_rendered(rendering, template, message):
    render = rendering({"default": template, "tool_use": "tools"})
    with pytest.raises(ChatTemplateError, match=message):
        await render(Chat(messages=(USER,)))
    assert (await render(Chat(messages=(USER,), tools=(TOOL,)))).prompt == "tools"


@pytest.mark.parametrize(
    "template",
    ["{{ 9 ** (9 ** 9) }}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"],
    ids=["one instruction", "a loop"],
)
async def test_a_template_that_does_not_end_is_ended_and_refused_for_a_while(
    rendering, template, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(chat_templates.time, "monotonic", lambda: now[0])
    render = rendering({"default": template, "tool_use": "tools"})
    with pytest.raises(ChatTemplateError, match="takes more than 1 s"):
        await render(Chat(messages=(USER,)))
    assert (await render(Chat(messages=(USER,), tools=(TOOL,)))).prompt == "tools"
    # Without a second of anybody's time.
    answers = [chat_templates._Renderer._answer]
    monkeypatch.setattr(chat_templates._Renderer, "_answer", lambda *_: pytest.fail("it ran again"))
    with pytest.raises(ChatTemplateError, match="refused for 10 s"):
        await render(Chat(messages=(USER,)))
    monkeypatch.setattr(chat_templates._Renderer, "_answer", answers[0])
    now[0] = 10.5
    with pytest.raises(ChatTemplateError, match="takes more than 1 s"):
        await render(Chat(messages=(USER,)))


async def test_a_strangers_template_does_not_keep_the_models_waiting(rendering):
    render = rendering("model", {"1" * 32: "{{ 9 ** (9 ** 9) }}"})
    spec = replace(make_spec("1" * 32, slab_pages=1), chat_template="a")
    slow = asyncio.ensure_future(render(Chat(messages=(USER,)), [spec]))
    await asyncio.sleep(0)
    assert (await render(Chat(messages=(USER,)))).prompt == "model"
    assert not slow.done()
    with pytest.raises(ChatTemplateError):
        await slow


async def test_a_template_sees_nothing_of_the_servers_environment(monkeypatch):
    monkeypatch.setenv("TURRET_SECRET", "x")
    templates = ChatTemplates("{{ 1 }}", lambda _: None)
    await templates.render(Chat(messages=(USER,)), [], {})
    process = templates._renderer._process
    assert process
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()  # noqa: ASYNC240 (of a process)
    assert b"TURRET_SECRET" not in environment
    templates.close()
    assert process.returncode == 0
    assert os.environ["TURRET_SECRET"] == "x"


async def test_the_last_message_is_continued_only_where_it_is_shown(rendering):
    chat = Chat(messages=(USER, HELLO), continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="does not show the last message"):
        await rendering("{{ messages[0].content }}")(chat)
    with pytest.raises(ChatTemplateError, match="no content to continue"):
        await rendering(AGENT)(Chat(messages=(USER, CALL), continue_final_message=True))


async def test_what_no_tokenizer_takes_is_refused(rendering):
    chat = Chat(messages=(USER,), template_arguments={"x": json.loads('"\\ud83d"')})
    with pytest.raises(InvalidRequestError, match=r"lone surrogate, U\+D83D"):
        await rendering("{{ x }}")(chat)


async def test_arguments_that_are_nested_too_deeply_are_refused(rendering):
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        await rendering("{{ x }}")(Chat(messages=(USER,), template_arguments={"x": nested}))


async def test_answers_are_read_as_the_template_says(rendering):
    chat = Chat(messages=(USER,), tools=(TOOL,))
    assert (await rendering(AGENT)(chat)).answers
    assert (await rendering("{{ tools }}")(chat)).answers is None
    assert (await rendering(CHATML)(replace(chat, tools=()))).answers is None
    declared = {"start_anchor": "x", "fields": {"content": {"content": "text"}}}
    assert (await rendering("{{ tools }}", response_template=declared)(chat)).answers
