"""Results of the client's methods."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class FinishReason(StrEnum):
    """Why a generation ended."""

    UNSPECIFIED = "unspecified"
    """A reason unknown to this version of the client."""
    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens` was reached."""
    TOOL_CALLS = "tool_calls"
    """As STOP, and the answer calls tools."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request.

    Attributes:
        prompt_tokens: Tokens of the prompt, without virtual tokens of adapters. They count once, whatever `n`
            is.
        cached_tokens: Tokens whose keys and values were found in memory instead of computed: virtual tokens
            of adapters and cached blocks of the prompt.
        generated_tokens: Tokens of the answer, or of all answers.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


class Pooling(StrEnum):
    """How the hidden states of a text's tokens become its vector."""

    CLS = "cls"
    """The first token."""
    MEAN = "mean"
    WEIGHTED_MEAN = "weighted_mean"
    """The mean, weighted by the position from 1."""
    LAST = "last"


class Problem(StrEnum):
    """What the scores of labels are."""

    UNSPECIFIED = "unspecified"
    """A problem unknown to this version of the client."""
    SINGLE_LABEL = "single_label"
    """Probabilities of which exactly one label is right."""
    MULTI_LABEL = "multi_label"
    """Each the probability of one label."""
    REGRESSION = "regression"
    """Numbers."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A vector of each input, in their order. `revision` is the adapter's; empty for the base model."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage
    revision: str


@dataclass(frozen=True, slots=True)
class Classification:
    """`label` is the one with the highest logit; `scores` and `logits` are by label."""

    label: str
    scores: dict[str, float]
    logits: dict[str, float]

    @property
    def score(self) -> float:
        """The score of `label`."""
        return self.scores[self.label]


@dataclass(frozen=True, slots=True)
class Classifications:
    """The class of each input, in their order. `revision` is as in `Embeddings`."""

    results: tuple[Classification, ...]
    problem: Problem
    usage: Usage
    revision: str


@dataclass(frozen=True, slots=True)
class TaggedToken:
    """A token, its likeliest label, and the label's probability.

    `start` and `end` are the token's characters in its text: the first, and the one after the last. Both are
    0 in inputs of token ids. `in_second` is whether it belongs to the second text of a pair.
    """

    token_id: int
    label: str
    score: float
    start: int
    end: int
    in_second: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens that follow each other with the same label, and their text. `score` is the mean of theirs."""

    label: str
    score: float
    start: int
    end: int
    text: str
    in_second: bool = False


@dataclass(frozen=True, slots=True)
class TaggedText:
    """The tokens of an input without special tokens, and spans without tokens labelled "O"."""

    tokens: tuple[TaggedToken, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of each input, in their order. `revision` is as in `Embeddings`."""

    texts: tuple[TaggedText, ...]
    usage: Usage
    revision: str


@dataclass(frozen=True, slots=True)
class Scores:
    """The score of each input from 0 to 1, in their order. `revision` is as in `Embeddings`.

    `logits` are those of the head; large ones have the same score.
    """

    scores: tuple[float, ...]
    logits: tuple[float, ...]
    usage: Usage
    revision: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log probability of a token, given all tokens before it.

    Attributes:
        token_id: The token.
        text: Its text, with U+FFFD for bytes that are not whole characters.
        token: The bytes of its text.
        logprob: Its log probability by the model alone, before temperature, penalties and the like.
        rank: 1 for the likeliest token, 2 for the next, and so on.
        top: The likeliest tokens in its place, the likeliest first, as many as the request asks for.
    """

    token_id: int
    text: str
    token: bytes
    logprob: float
    rank: int
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function. `arguments` is JSON as the model wrote it, which need not be valid."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What is new of the call number `index` of an answer, from 0.

    `id` and `name` come with the first delta of a call and are empty in the others; the `arguments` of all
    make those of the call.
    """

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer of a generation with `n` above 1; the attributes are those of `Generation`."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation. `revision` is the adapter's; empty for the base model.

    What ended it, with `FinishReason.STOP`: `stop_string` is the stop string, `stop_token_id` the
    end-of-sequence token or stop token; both if a stop string is a special token.

    With `n` above 1, `choices` are all answers, and the other attributes are those of the first. If the
    request asks for them, `logprobs` has one item for each token, `prompt_logprobs` one for each token of the
    prompt but the first.

    Of a chat, `reasoning` is what precedes the answer, and `tool_calls` are the calls of its tools; neither
    is part of `text`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    revision: str
    stop_string: str | None = None
    stop_token_id: int | None = None
    choices: tuple[Choice, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The answer as the next message of its chat."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
        ]
        found = {"role": "assistant", "content": self.text, "reasoning": self.reasoning, "tool_calls": calls}
        return {name: value for name, value in found.items() if value or (name == "content" and not calls)}


@dataclass(frozen=True, slots=True)
class Chunk:
    """New text and tokens of a stream.

    `finish_reason` is set in the last chunk of each answer only, and so is what ended it, see `Generation`;
    `usage` in the last chunk of all. With `n` above 1, chunks of all answers come in turns; `index` says of
    which one, from 0. `prompt_logprobs` are in the first chunk. Of a chat, `reasoning` and `tool_calls` have
    what is new of them.
    """

    text: str
    token_ids: tuple[int, ...]
    revision: str
    finish_reason: FinishReason | None
    usage: Usage | None
    stop_string: str | None = None
    stop_token_id: int | None = None
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class AdapterState(StrEnum):
    """State of an adapter in the server."""

    UNSPECIFIED = "unspecified"
    """A state unknown to this version of the client."""
    STAGED = "staged"
    """Not in the arena: in host memory, or in the store only."""
    RESIDENT = "resident"
    """In the arena's pages, ready for the next step."""
    DRAINING = "draining"
    """Unloaded, with in-flight requests."""
    FAILED = "failed"
    """Failed to load when the server started, or when its folder changed."""
    UNLOADED = "unloaded"
    """Removed; only `unload_adapter` and `watch_adapters` return it."""


class AdapterMethod(StrEnum):
    """How an adapter was trained."""

    UNSPECIFIED = "unspecified"
    """Unknown because the adapter FAILED, or unknown to this version of the client."""
    LORA = "lora"
    PREFIX_TUNING = "prefix_tuning"
    PROMPT_TUNING = "prompt_tuning"
    P_TUNING = "p_tuning"
    MULTITASK_PROMPT_TUNING = "multitask_prompt_tuning"
    ADALORA = "adalora"
    VERA = "vera"
    IA3 = "ia3"
    LN_TUNING = "ln_tuning"
    TRAINABLE_TOKENS = "trainable_tokens"


@dataclass(frozen=True, slots=True)
class AdapterRevision:
    """A revision of an adapter's history.

    Attributes:
        revision: Digest of its files; a request can use it as `name@revision`.
        source: Source that it was loaded from; secrets in URLs are removed.
        published_at: When it became current, in seconds since 1970 by the server's clock.
    """

    revision: str
    source: str
    published_at: float


@dataclass(frozen=True, slots=True)
class TrafficSplit:
    """`percent` of an adapter's requests go to `revision`."""

    revision: str
    percent: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that the server has under a name.

    Attributes:
        name: Name of the adapter.
        revision: Digest of its files; empty if it FAILED.
        state: State in the server.
        method: How it was trained.
        num_parameters: Number of elements of its tensors.
        max_rank: Largest LoRA rank of its modules; 0 without LoRA.
        num_virtual_tokens: Virtual tokens before the prompt; 0 if it has none.
        file_bytes: Size of its files, adapter_config.json and the safetensors file.
        arena_bytes: Bytes that it takes in the arena when resident, in whole pages.
        active_requests: Waiting and running requests of this revision.
        draining_revisions: Other revisions with in-flight requests: replaced ones, and earlier ones that
            requests name.
        error: Why it FAILED; empty otherwise.
        num_tasks: Number of tasks of a multitask adapter; 0 for others.
        history: Current and earlier revisions, latest first.
        traffic_split: Other revision that serves some of the requests; None if there is none.
        vocab_size: Number of its logits if it was trained with resized embeddings; 0 for others.
        own_tokenizer: Whether its folder has a tokenizer that differs from the base model's.
    """

    name: str
    revision: str
    state: AdapterState
    method: AdapterMethod
    num_parameters: int
    max_rank: int
    num_virtual_tokens: int
    file_bytes: int
    arena_bytes: int
    active_requests: int
    draining_revisions: tuple[str, ...]
    error: str
    num_tasks: int
    history: tuple[AdapterRevision, ...]
    traffic_split: TrafficSplit | None
    vocab_size: int
    own_tokenizer: bool


@dataclass(frozen=True, slots=True)
class Download:
    """A running download of an adapter.

    Attributes:
        name: Name under which the adapter will be served.
        done_bytes: Bytes received.
        total_bytes: Total bytes; None while unknown.
    """

    name: str
    done_bytes: int
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class PinnedPrompt:
    """A prompt whose blocks the server keeps in memory.

    Attributes:
        name: Name of the pinned prompt.
        revision: Revision of its adapter; empty for the base model.
        prompt_tokens: Tokens of the prompt, without virtual tokens of adapters.
    """

    name: str
    revision: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest requests that the tenant may send.

    Attributes:
        max_adapters: Adapters of a request.
        max_messages: Messages of a chat.
        max_tools: Tools of a chat.
        max_queued_requests: Requests that wait at once.
        max_queued_tokens: Tokens, of prompts and to generate, of the requests that wait.
        max_pinned_tokens: Tokens of pinned prompts; None without a limit.
    """

    max_adapters: int
    max_messages: int
    max_tools: int
    max_queued_requests: int
    max_queued_tokens: int
    max_pinned_tokens: int | None


@dataclass(frozen=True, slots=True)
class Model:
    """The base model of a server.

    Attributes:
        name: The id on the Hub, or the name of the folder.
        max_context: Maximum tokens of a prompt and its answer.
        vocab_size: Number of logits.
        has_chat_template: Whether chats without an adapter have a chat template.
        calls_tools: Whether calls of tools in the answers to such chats are found.
        adapter_methods: The kinds of adapter that are served.
        limits: The largest requests that the tenant may send.
    """

    name: str
    max_context: int
    vocab_size: int
    has_chat_template: bool
    calls_tools: bool
    adapter_methods: tuple[AdapterMethod, ...]
    limits: Limits
