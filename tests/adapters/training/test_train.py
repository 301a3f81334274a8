from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from turret_adapters.training import train
from turret_adapters.training.train import Recipe, encode_batch, load_base, train_adapter

WORDS = ["</s>", "<s>", "up", "down", "left", "right"]
EXAMPLES = [("up", "down"), ("left up", "right down"), ("down down left", "up up right")]
RECIPES = {
    "lora": Recipe(
        peft_type="LORA",
        config={"r": 4, "target_modules": ["q_proj", "down_proj"]},
        learning_rate=0.05,
        steps=3,
        batch_size=4,
    ),
    "qlora": Recipe(
        peft_type="LORA",
        config={"r": 4, "target_modules": ["q_proj", "down_proj"]},
        learning_rate=0.05,
        steps=3,
        batch_size=4,
        nf4_base=True,
    ),
    "prefix": Recipe(
        peft_type="PREFIX_TUNING",
        config={"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 32},
        learning_rate=0.05,
        steps=3,
        batch_size=4,
    ),
    "p_tuning_v2": Recipe(
        peft_type="PREFIX_TUNING",
        config={"num_virtual_tokens": 4},
        learning_rate=0.05,
        steps=3,
        batch_size=4,
    ),
    "p_tuning": Recipe(
        peft_type="P_TUNING",
        config={
            "num_virtual_tokens": 4,
            "encoder_reparameterization_type": "LSTM",
            "encoder_num_layers": 1,
            "encoder_dropout": 0.0,
            "encoder_hidden_size": 32,
        },
        learning_rate=0.05,
        steps=3,
        batch_size=4,
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loss_of(model, tokenizer):
    with torch.inference_mode():
        return model.eval()(**encode_batch(tokenizer, EXAMPLES)).loss.item()


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_saved_lowers_the_loss_when_peft_loads_it(name, base_dir, tokenizer, tmp_path):
    recipe = RECIPES[name]
    steps = []

    report = train_adapter(
        load_base(base_dir, nf4=recipe.nf4_base),
        tokenizer,
        EXAMPLES,
        recipe,
        tmp_path / "final",
        early={1: tmp_path / "early"},
        on_step=lambda step, loss: steps.append((step, loss)),
    )

    losses = [loss_of(load_base(base_dir, nf4=recipe.nf4_base), tokenizer)]
    for revision in ("early", "final"):
        base = load_base(base_dir, nf4=recipe.nf4_base)
        adapted = PeftModel.from_pretrained(base, tmp_path / revision)
        losses.append(loss_of(adapted, tokenizer))
        assert not (tmp_path / revision / "adapter_model.bin").exists()
    assert losses[2] < losses[1]
    assert losses[2] < losses[0]
    assert [step for step, _ in steps] == [1, 2, 3]
    assert report.final_loss == steps[-1][1]
    assert report.trainable_parameters > 0
    assert report.seconds > 0
    assert report.peak_memory_bytes is None or report.peak_memory_bytes >= 0


def test_the_same_recipe_gives_the_same_bytes(base_dir, tokenizer, tmp_path):
    for run in ("first", "second"):
        base = load_base(base_dir, nf4=False)
        train_adapter(base, tokenizer, EXAMPLES, RECIPES["lora"], tmp_path / run)

    files = [tmp_path / run / "adapter_model.safetensors" for run in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_base_that_the_recipe_does_not_ask_for_is_refused(base_dir, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="nf4_base: expected a base loaded with nf4=True"):
        train_adapter(load_base(base_dir, nf4=False), tokenizer, EXAMPLES, RECIPES["qlora"], tmp_path)


def test_only_the_completion_and_its_end_are_labelled(tokenizer):
    batch = encode_batch(tokenizer, [("left up", "right"), ("up", "down down down")])

    assert batch["input_ids"].tolist() == [[4, 2, 5, 0, 0], [2, 3, 3, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 5, 0, -100], [-100, 3, 3, 3, 0]]


def test_a_large_gradient_is_scaled_down_to_the_largest_norm(base_dir, tokenizer, tmp_path, monkeypatch):
    """One step of plain gradient descent moves the parameters by the gradient itself."""
    moved = []

    def descent(trainable, recipe, _device):
        moved.extend((parameter, parameter.detach().clone()) for parameter in trainable)
        return torch.optim.SGD(trainable, lr=recipe.learning_rate)

    monkeypatch.setattr(train, "_optimizer", descent)
    config = {**RECIPES["lora"].config, "lora_alpha": 1e5}
    recipe = replace(RECIPES["lora"], config=config, steps=1, learning_rate=1.0)
    train_adapter(load_base(base_dir, nf4=False), tokenizer, EXAMPLES, recipe, tmp_path)
    norms = [(parameter.detach() - before).norm() for parameter, before in moved]
    assert float(torch.stack(norms).norm()) == pytest.approx(train._MAX_GRADIENT_NORM, rel=1e-3)


def test_the_peak_of_memory_is_in_bytes(monkeypatch):
    status = "VmPeak:\t   9 kB\nVmHWM:\t   3 kB\nVmRSS:\t   2 kB\n"
    monkeypatch.setattr(train.Path, "read_text", lambda _: status)
    assert train._peak_resident_bytes() == 3 << 10


def test_a_peak_that_lags_behind_is_no_growth(monkeypatch):
    memory = train._PeakMemory(torch.device("cpu"))
    memory._before = 5
    monkeypatch.setattr(train, "_peak_resident_bytes", lambda: 3)
    assert memory.growth() == 0
