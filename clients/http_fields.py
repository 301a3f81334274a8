"""Writes the table of the fields of the HTTP API in README.md: `make settings`."""  # noqa: INP001 -- a script

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from turret_server.web.bodies import Body
from turret_server.web.chat import ChatBody
from turret_server.web.completions import CompletionBody
from turret_server.web.pooling import ClassifyBody, EmbeddingBody, RerankBody, ScoreBody

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- fields of HTTP: written by `make settings` -->\n", "<!-- end of fields of HTTP -->"
Bodies: TypeAlias = Mapping[str, type[Body]]
GENERATING: Bodies = {"completions": CompletionBody, "chat": ChatBody}
POOLING: Bodies = {
    "embeddings": EmbeddingBody,
    "classify": ClassifyBody,
    "score": ScoreBody,
    "rerank": RerankBody,
}


def table(bodies: Bodies) -> str:
    """A row for each field of the endpoints: those that are served, then those that are refused."""
    served = dict.fromkeys(name for body in bodies.values() for name in body.model_fields)
    refused = sorted({name for body in bodies.values() for name in body.refused} - set(served))
    lines = ["", f"| field | {' | '.join(bodies)} | |", f"|---|{'---|' * len(bodies)}---|"]
    for name in [*served, *refused]:
        verdicts = " | ".join(_verdict(body, name) for body in bodies.values())
        lines.append(f"| `{name}` | {verdicts} | {_meaning(bodies, name)} |".replace("|  |", "| |"))
    return "\n".join([*lines, "", ""])


def _verdict(body: type[Body], name: str) -> str:
    if name in body.model_fields:
        return "served"
    return "refused" if name in body.refused else ""


def _meaning(bodies: Bodies, name: str) -> str:
    """What the field means, or why it is refused; the first body that has it says so."""
    for body in bodies.values():
        if name in body.model_fields:
            return body.model_fields[name].description or ""
        if name in body.refused:
            why, harmless = body.refused[name]
            accepted = ", ".join(f"`{json.dumps(value)}`" for value in harmless)
            return f"{why[:1].upper()}{why[1:]}." + (f" Accepted: {accepted}." if accepted else "")
    raise KeyError(name)


def with_table(text: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    if not (begin and END in rest):
        raise SystemExit(f"{README} has no markers {BEGIN.strip()} and {END}")
    tables = table(GENERATING) + table(POOLING)
    return before + begin + tables + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
