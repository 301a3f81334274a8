"""Requests and answers of the service as plain data, to and from which every door translates its messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from turret_adapters.spec import Problem
from turret_server.engine.pooling import Pooling as Pooling  # noqa: PLC0414 -- for the doors
from turret_server.serving.chat import Chat, ToolCallDelta
from turret_server.serving.request_fields import RequestFields


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens
    TOOL_CALLS = "tool_calls"  # the answer ended with calls of tools


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """An adapter that a request names: NAME, or NAME@REVISION with at least 8 digits of the revision."""

    name: str
    weight: float = 1.0
    task: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest(RequestFields):
    """A generation. `prompt` is text, token ids or a chat; `deadline` is a time of `time.monotonic`."""

    prompt: str | Sequence[int] | Chat | None
    adapters: Sequence[AdapterRef] = ()
    deadline: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PinRequest:
    """A prompt to compute and to keep under `name`; the other fields are as in `GenerationRequest`."""

    name: str
    prompt: str | Sequence[int] | Chat | None
    adapters: Sequence[AdapterRef] = ()
    cache_salt: str = ""
    add_special_tokens: bool = True
    deadline: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request: of its prompt without virtual tokens, found in the prefix cache (virtual ones
    included), and generated. The prompt counts once, the generated tokens are those of all choices.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The log probability of a token by the model alone, before temperature and the like.

    `token` are the bytes of its text, which may be part of a character. `rank` is 1 for the likeliest. `top`
    are the likeliest tokens in its place, the likeliest first, as many as the request asks for.
    """

    token_id: int
    token: bytes
    logprob: float
    rank: int
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What is new of an answer, which is the one with this `index` of the request's `n`.

    `finish_reason` and what ended it are set in the last chunk of each answer only: `stop_string` is one of
    the request's, `stop_token_id` an end-of-sequence token or one of the request's. `usage` is set in the
    last chunk of all. If the request wants them, `logprobs` has one item for each token, and
    `prompt_logprobs` of the first chunk one for each token of the prompt but the first.

    Of a chat's answer, `reasoning` is new text of the part that precedes the answer, and `tool_calls` what is
    new of the calls; neither is part of `text`.
    """

    text: str
    token_ids: tuple[int, ...]
    revision: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedPrompt:
    """A prompt whose whole blocks stay in the prefix cache. `revision` is that of its adapters."""

    name: str
    revision: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPair:
    """Two texts that are one input."""

    first: str
    second: str


Input: TypeAlias = str | Sequence[int] | TextPair


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """Inputs of one call, of which vectors, classes, tags or scores are wanted. With `truncate` those that
    are too long are cut; the other fields are as in `GenerationRequest`.
    """

    inputs: Sequence[Input | None]
    adapters: Sequence[AdapterRef] = ()
    truncate: bool = False
    priority: int = 0
    cache_salt: str = ""
    routing_key: str = ""
    add_special_tokens: bool = True
    deadline: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Vectors of a batch, of the first `dimensions` numbers if that is not 0. None is as the model has it."""

    batch: TextBatch
    pooling: Pooling | None = None
    normalize: bool | None = None
    dimensions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """What all answers to a batch have: the revision of the adapters, and the usage of all inputs."""

    revision: str
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings(Pooled):
    """[N, dimensions], float32."""

    vectors: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes(Pooled):
    """`logits` and `scores` are [N, labels]; scores are what the problem makes of the logits."""

    labels: tuple[str, ...]
    problem: Problem
    logits: NDArray[np.float64]
    scores: NDArray[np.float64]

    def label(self, index: int) -> str:
        """The likeliest label of an input: by logits, as the scores of large ones are the same."""
        return self.labels[int(self.logits[index].argmax())]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores(Pooled):
    """Both [N]: the head's logits, and scores from 0 to 1, which no longer tell large logits apart."""

    logits: NDArray[np.float64]
    scores: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedToken:
    """A token, its likeliest label and the label's probability. `source` is the text that it is of (1 is the
    second of a pair), `start` and `end` are its characters there; all are 0 in inputs of token ids.
    """

    token_id: int
    label: str
    score: float
    source: int = 0
    start: int = 0
    end: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Tokens that follow each other with the same label. `score` is the mean of theirs."""

    label: str
    score: float
    source: int
    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedText:
    tokens: tuple[TaggedToken, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags(Pooled):
    """Of each input its tokens and spans."""

    texts: tuple[TaggedText, ...]
