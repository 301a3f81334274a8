"""What the demo's base model and adapters are taught: small things to do with an English sentence.

A sentence is `the grey fox sees a red house`. The base learns some operations by name (`In French:`) and,
without a name, to repeat the sentence. An adapter's prompt is the bare sentence, so the answer depends on the
adapter alone. About every tenth sentence, chosen by its checksum, is held out of all training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias

Split: TypeAlias = Literal["train", "test"]
Example: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Noun:
    english: str
    french: str
    french_gender: int
    spanish: str
    spanish_gender: int


@dataclass(frozen=True, slots=True)
class _Verb:
    present: str
    infinitive: str
    past: str
    participle: str
    french: str
    spanish: str


_GENDERS = "mf"  # a gender is its place here and in the pairs of words below


def _nouns(table: str) -> tuple[_Noun, ...]:
    rows = (line.split() for line in table.strip().splitlines())
    return tuple(
        _Noun(en, fr, _GENDERS.index(fr_gender), es, _GENDERS.index(es_gender))
        for en, fr, fr_gender, es, es_gender in rows
    )


_BEINGS = _nouns("""
cat chat m gato m
dog chien m perro m
fox renard m zorro m
wolf loup m lobo m
horse cheval m caballo m
cow vache f vaca f
goat chèvre f cabra f
mouse souris f ratón m
frog grenouille f rana f
snake serpent m serpiente f
girl fille f niña f
boy garçon m niño m
queen reine f reina f
king roi m rey m
witch sorcière f bruja f
sailor marin m marinero m
""")

_THINGS = _nouns("""
house maison f casa f
book livre m libro m
door porte f puerta f
boat bateau m barco m
chair chaise f silla f
hat chapeau m sombrero m
bell cloche f campana f
car voiture f coche m
bridge pont m puente m
castle château m castillo m
letter lettre f carta f
lamp lampe f lámpara f
cheese fromage m queso m
ring bague f anillo m
key clé f llave f
flower fleur f flor f
""")

_VERBS = tuple(
    _Verb(*line.split())
    for line in """
sees see saw seen voit ve
finds find found found trouve encuentra
takes take took taken prend toma
breaks break broke broken casse rompe
hides hide hid hidden cache esconde
draws draw drew drawn dessine dibuja
steals steal stole stolen vole roba
forgets forget forgot forgotten oublie olvida
sells sell sold sold vend vende
buys buy bought bought achète compra
""".strip().splitlines()
)

_DETERMINERS = {"the": ("le la", "el la"), "a": ("un une", "un una"), "this": ("ce cette", "este esta")}

_ADJECTIVES = {
    "red": ("rouge rouge", "rojo roja"),
    "black": ("noir noire", "negro negra"),
    "white": ("blanc blanche", "blanco blanca"),
    "green": ("vert verte", "verde verde"),
    "grey": ("gris grise", "gris gris"),
    "brown": ("brun brune", "pardo parda"),
    "dirty": ("sale sale", "sucio sucia"),
    "clean": ("propre propre", "limpio limpia"),
    "wet": ("mouillé mouillée", "mojado mojada"),
    "cold": ("froid froide", "frío fría"),
    "lost": ("perdu perdue", "perdido perdida"),
    "strange": ("étrange étrange", "raro rara"),
}


@dataclass(frozen=True, slots=True)
class _Phrase:
    determiner: str
    adjective: str | None
    noun: _Noun

    @property
    def english(self) -> str:
        return " ".join(filter(None, (self.determiner, self.adjective, self.noun.english)))

    @property
    def french(self) -> str:
        return self._translated(0, self.noun.french, self.noun.french_gender)

    @property
    def spanish(self) -> str:
        return self._translated(1, self.noun.spanish, self.noun.spanish_gender)

    def _translated(self, language: int, noun: str, gender: int) -> str:
        words = [_DETERMINERS[self.determiner][language].split()[gender], noun]
        if self.adjective:
            words.append(_ADJECTIVES[self.adjective][language].split()[gender])
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class _Sentence:
    subject: _Phrase
    verb: _Verb
    thing: _Phrase

    def with_verb(self, verb: str) -> str:
        return f"{self.subject.english} {verb} {self.thing.english}"

    @property
    def english(self) -> str:
        return self.with_verb(self.verb.present)

    @property
    def split(self) -> Split:
        return "train" if zlib.crc32(self.english.encode()) % 10 else "test"


def _plain(sentence: _Sentence) -> str:
    return sentence.english


def _french(sentence: _Sentence) -> str:
    return f"{sentence.subject.french} {sentence.verb.french} {sentence.thing.french}"


def _spanish(sentence: _Sentence) -> str:
    return f"{sentence.subject.spanish} {sentence.verb.spanish} {sentence.thing.spanish}"


def _shout(sentence: _Sentence) -> str:
    return sentence.english.upper()


def _past(sentence: _Sentence) -> str:
    return sentence.with_verb(sentence.verb.past)


def _swapped(sentence: _Sentence) -> str:
    return f"{sentence.thing.english} {sentence.verb.present} {sentence.subject.english}"


def _passive(sentence: _Sentence) -> str:
    return f"{sentence.thing.english} is {sentence.verb.participle} by {sentence.subject.english}"


def _question(sentence: _Sentence) -> str:
    return f"does {sentence.subject.english} {sentence.verb.infinitive} {sentence.thing.english}?"


def _sentences(split: Split, rng: random.Random) -> Iterator[_Sentence]:
    def phrase(nouns: tuple[_Noun, ...]) -> _Phrase:
        adjective = rng.choice(tuple(_ADJECTIVES)) if rng.random() < 0.7 else None
        return _Phrase(rng.choice(tuple(_DETERMINERS)), adjective, rng.choice(nouns))

    while True:
        sentence = _Sentence(phrase(_BEINGS), rng.choice(_VERBS), phrase(_THINGS))
        if sentence.split == split:
            yield sentence


@dataclass(frozen=True, slots=True)
class Task:
    """What an adapter is to do with a bare sentence."""

    name: str
    description: str
    _answer: Callable[[_Sentence], str]

    def make(self, n: int, split: Split, seed: int) -> list[Example]:
        """`n` pairs of prompt and answer, repeatable; every task makes the same prompts."""
        rng = random.Random(seed)  # noqa: S311 - repeatable, and no secret
        sentences = islice(_sentences(split, rng), n)
        return [(f"{sentence.english}\n", self._answer(sentence)) for sentence in sentences]


TASKS = {
    task.name: task
    for task in (
        Task("passive", "turn it around: who it is done by comes last", _passive),
        Task("question", "ask whether it is so", _question),
        Task("french", "say it in French", _french),
        Task("spanish", "say it in Spanish", _spanish),
        Task("shout", "SAY IT LOUDLY", _shout),
    )
}

_NAMED = {
    "In French:": _french,
    "In Spanish:": _spanish,
    "In the past:": _past,
    "Shout:": _shout,
    "The other way round:": _swapped,
}
_REPEATED = (_plain, _passive, _question)
_REPEATED_PART = 0.25


def make_base_examples(n: int, seed: int) -> list[Example]:
    """`n` pairs for the base to learn: named operations, and sentences in each English form repeated."""
    rng = random.Random(seed)  # noqa: S311 - repeatable, and no secret
    examples = []
    for sentence in islice(_sentences("train", rng), n):
        if rng.random() < _REPEATED_PART:
            text = rng.choice(_REPEATED)(sentence)
            examples.append((f"{text}\n", text))
        else:
            name, answer = rng.choice(tuple(_NAMED.items()))
            examples.append((f"{name}\n{sentence.english}\n", answer(sentence)))
    return examples
