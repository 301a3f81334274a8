"""Adapters and base models as plain data, without tensors, and the layout of an adapter's rows in pages.

The engine plans memory with these; `formats` fills them in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

# Separates an adapter's digest and the number of a task in the revision of that task.
TASK_MARK = "#"


class Method(Enum):
    """How an adapter was trained, in the field's names. The members' names are peft's `peft_type`s."""

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


class HeadTask(Enum):
    """What a head computes of the hidden states of a text. The values are peft's `task_type`s."""

    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"  # noqa: S105 (no password)
    QUESTION_ANS = "QUESTION_ANS"

    @property
    def by_token(self) -> bool:
        """Whether it computes a row for each token, and not one for the text."""
        return self is not HeadTask.SEQ_CLS


class Problem(Enum):
    """What the logits of a SEQ_CLS head mean. The values are transformers' `problem_type`s."""

    SINGLE_LABEL = "single_label_classification"  # softmax
    MULTI_LABEL = "multi_label_classification"  # sigmoid of each
    REGRESSION = "regression"  # the numbers themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """A head, with the names of its outputs in order; those of QUESTION_ANS are start and end."""

    task: HeadTask
    labels: tuple[str, ...]
    problem: Problem = Problem.SINGLE_LABEL


class PrefixKind(Enum):
    """Whether a file has the keys and values of the virtual tokens, or their embeddings."""

    KEY_VALUE = "key_value"
    EMBEDDING = "embedding"


class Part(Enum):
    """The role of an adapter's rows in one module, which computes y from x with its weight W and bias b.

    In a linear: y = gain · (W(input_gain · x) + scaling · Bᵀ(Ax)) + b. In an embedding, where x is a token,
    y = gain · (W[x] + scaling · B(A[x])).
    """

    LORA_A = "lora_a"  # [rank, in_features]; of an embedding [vocabulary, rank]
    LORA_B = "lora_b"  # [rank, out_features]; of the head [vocabulary, rank]
    GAIN = "gain"  # [1, out_features]; of the head [vocabulary, 1]
    INPUT_GAIN = "input_gain"  # [1, in_features]
    BIAS = "bias"  # replaces b: [1, out_features]; of the head [vocabulary, 1]
    WEIGHT = "weight"  # replaces W: of a norm [1, hidden]; of embedding and head [vocabulary, hidden]
    TOKENS = "tokens"  # replaces rows of embedding or head: [tokens, hidden]
    HEAD = "head"  # a parameter of the head, of which the module is the name: as many rows as its first size


class ModuleKind(Enum):
    LINEAR = "linear"  # quantised, or in the model's dtype
    EXPERT = "expert"  # one expert's part of a stacked parameter, a quantised linear without a bias
    ROUTER = "router"  # from hidden states to the probabilities of experts
    HEAD = "head"  # from hidden states to logits
    EMBEDDING = "embedding"
    NORM = "norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleShape:
    """A module of the base that adapters may change. A norm has in_features = out_features."""

    kind: ModuleKind
    in_features: int
    out_features: int
    has_bias: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of an embedding or a head."""
        return self.in_features if self.kind is ModuleKind.EMBEDDING else self.out_features


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSpec:
    """The properties of the base model that an adapter must match.

    `modules` maps the path of every adaptable module (`model.layers.0.self_attn.q_proj`) to its shape, in the
    model's order. In a tied model, head and embedding share their weight. `left_out` are the paths of the
    modules of a multimodal model that are not part of its language model. An encoder generates no text, and
    its attention looks to both sides.

    `heads` has the parameters of the head for each task that the base can do: names and shapes, in which 0
    stands for the number of labels. Those in `head_weights` are in the base's checkpoint, and `head` is its
    own head, if it was saved with one. The base model is the module `prefix` of what is served, and one of
    `task_prefixes` in transformers' classes for these tasks. `takes_prefix` is whether it takes keys and
    values that stand before the first token.
    """

    name_or_path: str
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    modules: Mapping[str, ModuleShape]
    tied: bool = False
    left_out: tuple[str, ...] = ()
    is_encoder: bool = False
    heads: Mapping[HeadTask, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    head_weights: tuple[str, ...] = ()
    head: HeadSpec | None = None
    prefix: str = ""
    task_prefixes: tuple[str, ...] = ()
    takes_prefix: bool = True

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys and values over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def tied_modules(self) -> tuple[str, ...]:
        """The modules that share their weight."""
        return tuple(self.of_kind(ModuleKind.EMBEDDING, ModuleKind.HEAD)) if self.tied else ()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        [embedding] = self.of_kind(ModuleKind.EMBEDDING).values()
        return embedding.num_tokens

    def of_kind(self, *kinds: ModuleKind) -> dict[str, ModuleShape]:
        return {name: shape for name, shape in self.modules.items() if shape.kind in kinds}

    def resized(self, vocab_size: int) -> BaseSpec:
        """The spec after transformers' `resize_token_embeddings`, which resizes embedding and head."""
        modules = dict(self.modules)
        for name, shape in self.of_kind(ModuleKind.EMBEDDING).items():
            modules[name] = replace(shape, in_features=vocab_size)
        for name, shape in self.of_kind(ModuleKind.HEAD).items():
            modules[name] = replace(shape, out_features=vocab_size)
        return replace(self, modules=modules)


@dataclass(frozen=True, slots=True)
class RowGroup:
    """`count` rows of `width` elements for a part of a module."""

    module: str
    part: Part
    count: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSpec:
    """Virtual tokens before the prompt, at positions 0 … num_virtual_tokens − 1.

    A prefix that was joined of both kinds has `parts`, and is of the kind EMBEDDING. Embeddings that are
    computed `per_request` have no keys and values of their own: on an encoder, these depend on the text.
    """

    num_virtual_tokens: int
    kind: PrefixKind
    parts: tuple[PrefixSpec, ...] = ()
    per_request: bool = False

    @property
    def embedded(self) -> tuple[range, ...]:
        """The positions of embeddings, whose keys and values are to be computed; in runs, in order."""
        if self.per_request:
            return ()
        runs, start = [], 0
        for part in self.parts or (self,):
            if part.kind is PrefixKind.EMBEDDING:
                runs.append(range(start, start + part.num_virtual_tokens))
            start += part.num_virtual_tokens
        return tuple(runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """One revision of an adapter; `revision` is the digest of its files.

    With `invocation_tokens` (activated LoRA) the rows apply from the last occurrence of these tokens in the
    prompt on, and nowhere if there is none. `num_tasks` is the number of prefixes of a multitask adapter, of
    which a request chooses one; 0 for other methods. `vocab_size` is the number of its logits if it was
    trained with resized embeddings, `tokenizer` identifies its tokens and
    `chat_template` its chat template, if they are not the base's. `head` computes what is asked for instead
    of an answer.
    """

    revision: str
    method: Method
    rows: tuple[RowGroup, ...]
    prefix: PrefixSpec | None
    max_rank: int
    num_parameters: int
    file_bytes: int
    invocation_tokens: tuple[int, ...] = ()
    num_tasks: int = 0
    vocab_size: int | None = None
    tokenizer: str = ""
    chat_template: str = ""
    head: HeadSpec | None = None
    # By page size. It lives as long as the spec, so there is nothing to clean up.
    _num_slab_pages: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def resident_revisions(self) -> list[str]:
        """The revisions that requests run on: its own, or those of its tasks."""
        if not self.num_tasks:
            return [self.revision]
        return [self.of_task(task).revision for task in range(self.num_tasks)]

    def of_task(self, task: int) -> AdapterSpec:
        """The spec that a request for one task runs on."""
        return replace(self, revision=f"{self.revision}{TASK_MARK}{task}", num_tasks=0)

    @property
    def num_virtual_tokens(self) -> int:
        return self.prefix.num_virtual_tokens if self.prefix else 0

    @property
    def num_prefix_tokens(self) -> int:
        """Virtual tokens whose keys and values are in its own pages."""
        return self.prefix.num_virtual_tokens if self.prefix and not self.prefix.per_request else 0

    def num_slab_pages(self, page_elements: int) -> int:
        """The pages that its rows take, see `slab_layout`. Computed once: the engine asks in every step."""
        num_pages = self._num_slab_pages.get(page_elements)
        if num_pages is None:
            num_pages = self._num_slab_pages[page_elements] = slab_layout(self.rows, page_elements).num_pages
        return num_pages

    def num_pages(self, page_elements: int, block_size: int) -> int:
        """The pages that it takes in the arena: those of its rows, and of its virtual tokens (one task's)."""
        return self.num_slab_pages(page_elements) + -(-self.num_prefix_tokens // block_size)


@dataclass(frozen=True, slots=True)
class Split:
    """`percent` of a name's requests use `revision` instead of the name's current one."""

    revision: str
    percent: int


@dataclass(frozen=True, slots=True)
class Run:
    """`count` contiguous rows, the first of which begins at element `offset` of the slab."""

    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class SlabLayout:
    """The runs of an adapter's rows: `runs[g]` has those of row group g, in the order of its rows."""

    num_pages: int
    runs: tuple[tuple[Run, ...], ...]


def slab_layout(groups: Sequence[RowGroup], page_elements: int) -> SlabLayout:
    """Places the rows of every group one after another; a row that does not fit starts the next page.

    A slab is a list of arena pages. A row never crosses a page, so one element offset finds it; apart from
    that there is no padding (the unified paging of S-LoRA, arXiv 2311.03285, without its padding).

    Args:
        groups: the row groups of an adapter.
        page_elements: elements of a page, at least the width of the widest row.
    """
    position = 0
    runs = []
    for group in groups:
        placed = []
        missing = group.count
        while missing:
            fitting = (page_elements - position % page_elements) // group.width
            if not fitting:
                position += page_elements - position % page_elements
                fitting = page_elements // group.width
                assert fitting, "the arena's pages are made to hold the widest row"
            run = Run(position, min(missing, fitting))
            placed.append(run)
            position += run.count * group.width
            missing -= run.count
        runs.append(tuple(placed))
    return SlabLayout(num_pages=-(-position // page_elements), runs=tuple(runs))


def lora_rows(base: BaseSpec, rank: int) -> tuple[RowGroup, ...]:
    """The rows of a LoRA of rank `rank` on every linear of a base."""
    linears = base.of_kind(ModuleKind.LINEAR, ModuleKind.EXPERT)
    return tuple(
        RowGroup(name, part, rank, width)
        for name, shape in linears.items()
        for part, width in ((Part.LORA_A, shape.in_features), (Part.LORA_B, shape.out_features))
    )
