"""Adapters with known answers: the answer of each to each question, asked alone on an idle server that has
memory for everything.

In bfloat16 on a CPU with AVX512-BF16 an answer does not depend on its batch (`tests/parity`), so a busy
server must give the same tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.adapter_files import revision, write_folder
from turret_client import Client, Generation

# Revisions of one name use any of these.
KINDS = (
    *(("lora", seed) for seed in range(3)),
    *(("prefix", seed) for seed in range(2)),
    *(("prompt", seed) for seed in range(2)),
    *((kind, 0) for kind in ("lora-all-linear", "lora-layers", "rslora", "dora", "ia3")),
    *((kind, 0) for kind in ("p-tuning-v2", "p-tuning")),
)
COMPOSED = ("lora-0", "prefix-0")
BASE = ""


@dataclass(frozen=True)
class Question:
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


def _questions() -> tuple[Question, ...]:
    """Short prompts and long ones, some with a common prefix; each greedy at two lengths and once with a
    seed.
    """
    rng = random.Random(7)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(50, 250) for _ in range(count))

    beginnings = [tokens(150), tokens(70)]
    prompts = [tokens(5), tokens(24), *(each + tokens(9) for each in beginnings for _ in range(3))]
    return tuple(
        question
        for index, prompt in enumerate(prompts)
        for question in (
            Question(prompt, 12),
            Question(prompt, 40),
            Question(prompt, 24, temperature=0.9, seed=index),
        )
    )


QUESTIONS = _questions()


@dataclass(frozen=True)
class Content:
    """The two files of an adapter. Trailing blanks in the config make a revision with the same answers."""

    key: str
    config: bytes
    tensors: bytes

    @classmethod
    def read(cls, key: str, folder: Path) -> Content:
        config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        return cls(key, config.read_bytes(), tensors.read_bytes())

    def variant(self, blanks: int) -> Content:
        return Content(self.key, self.config + b" " * blanks, self.tensors)

    @property
    def revision(self) -> str:
        return revision(self.tensors, self.config)

    def write(self, folder: Path) -> Path:
        return write_folder(folder, self.tensors, self.config)


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    text: str
    finish: str

    @classmethod
    def of(cls, generation: Generation) -> Answer:
        return cls(generation.token_ids, generation.text, generation.finish_reason.value)


class KnownAnswers:
    """Answers by content, and which revision has which content."""

    def __init__(self, contents: Sequence[Content], answers: Mapping[str, Mapping[int, Answer]]) -> None:
        self._answers = answers
        self._keys = {BASE: BASE} | {content.revision: content.key for content in contents}

    def add(self, content: Content) -> None:
        """Register a revision before it is loaded."""
        self._keys[content.revision] = content.key

    def answer(self, revision: str, question: int) -> Answer | None:
        """The answer of a revision, or of several joined by +; None if it was never registered."""
        try:
            key = "+".join(self._keys[part] for part in revision.split("+"))
        except KeyError:
            return None
        return self._answers[key][question]


def make_contents(base: Path, root: Path, kinds: Iterable[tuple[str, int]] = KINDS) -> list[Content]:
    from support.adapters import save_adapter  # noqa: PLC0415 (slow, and client processes do not need it)

    return [
        Content.read(f"{kind}-{seed}", save_adapter(kind, "llama", base, root / f"{kind}-{seed}", seed))
        for kind, seed in kinds
    ]


def record_answers(
    address: str, contents: Sequence[Content], root: Path, questions: Sequence[int] = range(len(QUESTIONS))
) -> KnownAnswers:
    """Send all questions, or some of them, to an idle server, one at a time."""
    with Client(address) as client:
        for content in contents:
            client.load_adapter(content.key, str(content.write(root / content.key)))
        named: list[tuple[str, ...]] = [(), *((content.key,) for content in contents)]
        if set(COMPOSED) <= {content.key for content in contents}:
            named.append(COMPOSED)
        answers = {
            "+".join(names): {index: _ask(client, names, QUESTIONS[index]) for index in questions}
            for names in named
        }
    tables = [tuple(answer.tokens for answer in table.values()) for table in answers.values()]
    assert len(set(tables)) == len(tables), "two contents have the same answers: a mix-up would not show"
    return KnownAnswers(contents, answers)


def _ask(client: Client, names: tuple[str, ...], question: Question) -> Answer:
    return Answer.of(
        client.generate(
            question.prompt,
            adapter=names,
            max_tokens=question.max_tokens,
            temperature=question.temperature,
            seed=question.seed,
        )
    )
