"""Small random encoders, adapters for tasks that real peft makes, and what peft computes with them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from support.adapters import _randomise
from support.models import FAMILIES as DECODERS
from support.tokenizers import VOCAB_SIZE, save_tokenizer
from turret_adapters.registry import Named
from turret_adapters.spec import HeadTask
from turret_server.app.build import Parts
from turret_server.engine.pooling import PoolingParams
from turret_server.engine.request import AdapterUse, Output, PoolingRequest
from turret_server.model.load import quantization

MAX_CONTEXT = 128
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_CONTEXT,
    "pad_token_id": 2,
}
# RoBERTa numbers positions from after its padding token.
_AFTER_PADDING = {**_SIZES, "max_position_embeddings": MAX_CONTEXT + 3, "type_vocab_size": 1}
FAMILIES: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_SIZES),
    "roberta": RobertaConfig(**_AFTER_PADDING),
    "xlm-roberta": XLMRobertaConfig(**_AFTER_PADDING),
    "distilbert": DistilBertConfig(
        vocab_size=VOCAB_SIZE,
        dim=64,
        hidden_dim=128,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=MAX_CONTEXT,
        pad_token_id=2,
    ),
    "electra": ElectraConfig(**_SIZES, embedding_size=64),
    # The window is shorter than the texts, so that a wrong one shows.
    "modernbert": ModernBertConfig(
        **_SIZES,
        local_attention=16,
        global_attn_every_n_layers=2,
        bos_token_id=0,
        eos_token_id=1,
        cls_token_id=0,
        sep_token_id=1,
    ),
    "llama": DECODERS["llama"],
}
# The modules of heads, which stay as they are where the linears of the base become NF4.
HEADS = ["classifier", "score", "qa_outputs", "pre_classifier", "head"]
AUTOS: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}
NUM_LABELS = {"SEQ_CLS": 3, "TOKEN_CLS": 5, "QUESTION_ANS": 2, "FEATURE_EXTRACTION": 2}


@dataclass(frozen=True)
class TaskNames:
    """How a family calls its modules. `saved` are those of a head that peft does not save by itself, and
    `sizes` those that peft does not find in its configuration.
    """

    attention: tuple[str, ...] = ("query", "value")
    mlp: tuple[str, ...] = ("intermediate.dense", "output.dense")
    norms: tuple[str, ...] = ("LayerNorm",)
    saved: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


NAMES: dict[str, TaskNames] = {
    "distilbert": TaskNames(
        ("q_lin", "v_lin"),
        ("lin1", "lin2"),
        ("sa_layer_norm", "output_layer_norm"),
        sizes={"token_dim": 64, "num_layers": 3, "num_attention_heads": 4},
    ),
    "modernbert": TaskNames(
        ("Wqkv", "attn.Wo"),
        ("Wi", "mlp.Wo"),
        ("mlp_norm", "final_norm"),
        saved={"QUESTION_ANS": ("classifier",)},
    ),
    "llama": TaskNames(("q_proj", "v_proj"), ("up_proj", "down_proj"), ("input_layernorm", "model.norm")),
}


def names_of(family: str) -> TaskNames:
    return NAMES.get(family, TaskNames())


def _lora(names: TaskNames, task: str, **options: Any) -> LoraConfig:
    targets = [*names.attention, *names.mlp]
    defaults = {"r": 5, "lora_alpha": 10, "target_modules": targets, "init_lora_weights": False}
    return LoraConfig(**{**defaults, "task_type": TaskType(task), **options})


KINDS: dict[str, Callable[[TaskNames, str], PeftConfig]] = {
    "lora": _lora,
    "dora": lambda n, task: _lora(n, task, use_dora=True),
    "ia3": lambda n, task: IA3Config(
        target_modules=[*n.attention, *n.mlp], feedforward_modules=[n.mlp[1]], task_type=TaskType(task)
    ),
    "adalora": lambda n, task: AdaLoraConfig(
        init_r=6, target_r=4, total_step=10, target_modules=[*n.attention], task_type=TaskType(task)
    ),
    "vera": lambda n, task: VeraConfig(r=16, target_modules=[*n.attention], task_type=TaskType(task)),
    "ln-tuning": lambda n, task: LNTuningConfig(target_modules=[*n.norms], task_type=TaskType(task)),
    "prefix": lambda n, task: PrefixTuningConfig(
        num_virtual_tokens=7,
        prefix_projection=True,
        encoder_hidden_size=32,
        task_type=TaskType(task),
        **n.sizes,
    ),
    "p-tuning-v2": lambda n, task: PrefixTuningConfig(
        num_virtual_tokens=20, task_type=TaskType(task), **n.sizes
    ),
    "prompt": lambda n, task: PromptTuningConfig(num_virtual_tokens=16, task_type=TaskType(task), **n.sizes),
    "p-tuning": lambda n, task: PromptEncoderConfig(
        num_virtual_tokens=9, encoder_hidden_size=32, task_type=TaskType(task), **n.sizes
    ),
}
# Those that take no keys and values before the first token.
WITHOUT_PREFIX = frozenset({"distilbert", "modernbert"})


def runs(family: str, kind: str, task: str) -> bool:
    """Whether transformers and peft run a kind of adapter for a task on a family."""
    if family == "llama" and task == "QUESTION_ANS":  # its class does not find the weights of a decoder
        return False
    return kind not in ("prefix", "p-tuning-v2") or family not in WITHOUT_PREFIX


def save_base(family: str, folder: Path) -> Path:
    """Random weights, large enough that states vary; of ModernBERT with a part of other heads."""
    torch.manual_seed(sum(family.encode()))
    auto = {"modernbert": AutoModelForMaskedLM, "llama": AutoModelForCausalLM}.get(family, AutoModel)
    model = auto.from_config(FAMILIES[family]).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_marked_base(folder: Path) -> Path:
    """A BERT whose tokenizer marks texts and pairs as BERT's own does."""
    save_base("bert", folder)
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save(path)
    return folder


def save_task_adapter(
    kind: str, task: str, family: str, base: Path, folder: Path, num_labels: int | None = None
) -> Path:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = names_of(family)
        config = KINDS[kind](names, task)
        config.modules_to_save = [*names.saved.get(task, ())] or None
        num_labels = num_labels or NUM_LABELS[task]
        model = get_peft_model(AUTOS[task].from_pretrained(base, num_labels=num_labels), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and any(f"{head}." in name for head in HEADS):
                    parameter.normal_(std=0.3)
                elif parameter.requires_grad:
                    _randomise(name, parameter)
        model.save_pretrained(folder)
    return folder


class TaskOracle:
    """What peft computes on the same NF4 base, one text at a time, with transformers' own attention."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def numbers(
        self,
        task: str,
        adapter: Path | None,
        texts: Sequence[Sequence[int]],
        num_labels: int | None = None,
        **inputs: Any,
    ) -> list[torch.Tensor]:
        """[1, labels] or [T, labels] of each text; for FEATURE_EXTRACTION its hidden states, [T, hidden]."""
        config = quantization(torch.float32)
        config.llm_int8_skip_modules = HEADS
        found = []
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AUTOS[task].from_pretrained(
                self._base,
                num_labels=num_labels or NUM_LABELS[task],
                quantization_config=config,
                dtype=torch.float32,
                attn_implementation="eager",
            )
            if adapter:
                model = PeftModel.from_pretrained(model, adapter)
            for module in model.modules():
                if isinstance(module, Linear4bit):
                    module.support_avx512bf16_for_cpu = False
            model.eval()
            for text in texts:
                token_ids = torch.tensor([text])
                output = model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), **inputs)
                found.append(_numbers(task, output, len(text)))
        return found


def _numbers(task: str, output: Any, num_tokens: int) -> torch.Tensor:
    """Without the rows of virtual tokens."""
    match task:
        case "SEQ_CLS":
            return output.logits
        case "TOKEN_CLS":
            return output.logits[0, -num_tokens:]
        case "QUESTION_ANS":
            both = torch.stack((output.start_logits[0], output.end_logits[0]), dim=-1)
            return both[-num_tokens:]
        case _:
            return output.last_hidden_state[0, -num_tokens:]


_ids = itertools.count(1_000_000)


@dataclass
class Pooled:
    """One submitted pooling request."""

    end: Callable[[], None]
    outputs: list[Output] = field(default_factory=list)
    done: Event = field(default_factory=Event)

    def sink(self, output: Output) -> None:
        self.outputs.append(output)
        self.end()
        self.done.set()

    @property
    def numbers(self) -> torch.Tensor:
        """The rows, [R, X]."""
        assert self.done.wait(timeout=120), "the request did not end"
        [output] = self.outputs
        assert output.error is None, output.error
        assert output.rows
        return torch.tensor(output.rows.values).view(-1, output.rows.width)


def pool(
    parts: Parts, text: Sequence[int], *named: Named, params: PoolingParams, types: Sequence[int] = ()
) -> Pooled:
    lease = parts.registry.acquire(named)
    running = Pooled(end=lambda: parts.registry.release(lease))
    parts.engine.submit(
        PoolingRequest(
            request_id=next(_ids),
            prompt_token_ids=tuple(text),
            adapters=tuple(AdapterUse(spec, weight) for spec, weight in lease.uses),
            params=params,
            token_type_ids=tuple(types),
            deadline=None,
            sink=running.sink,
        )
    )
    return running


def params_of(task: str) -> PoolingParams:
    """For the numbers of a head."""
    return PoolingParams(task=HeadTask(task))
