"""How a worker process is spoken to: a batch in JSON on a line, an answer in JSON on a line.

The worker of a peer runs in the peer's environment, so this imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

# Prompts of token ids, the adapters' names, tokens to generate → times of the tokens of each request.
Generate = Callable[[list[list[int]], list[str | None], int], list[list[float]]]


def serve(load: Callable[[], Generate]) -> None:
    """Load, say so, and answer batches until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    # Libraries print what they like; it goes where their log goes.
    os.dup2(2, 1)
    generate = load()
    _say(answers, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        _say(answers, {"times": generate(asked["prompts"], asked["adapters"], asked["max_tokens"])})


def _say(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
