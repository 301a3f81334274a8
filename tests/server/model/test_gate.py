from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Gemma3Config,
    GPTNeoXConfig,
    JambaConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
)

from turret_server.errors import UnsupportedModelError
from turret_server.model.gate import check_config, check_model


def check(config) -> None:
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    check_config(config, model_class)


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "gemma2", "mistral", "gpt_neox", "phi3", "gpt2"]
)
def test_plain_decoders_pass(model_type):
    check(AutoConfig.for_model(model_type))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (JambaConfig(), "jamba models are not supported"),
        (BloomConfig(), "transformers does not let their attention be replaced"),
        (AutoConfig.for_model("qwen3_next"), "qwen3_next models are not supported"),
        (AutoConfig.for_model("minimax"), "minimax models are not supported"),
        (AutoConfig.for_model("falcon_h1"), "falcon_h1 models are not supported"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_families_that_would_go_wrong_in_silence_are_refused_by_name(config, why):
    with pytest.raises(UnsupportedModelError, match=why) as refused:
        check(config)
    assert refused.value.metadata == {"model": config.model_type}


@pytest.mark.parametrize(
    "config", [BertConfig(num_hidden_layers=1), RobertaConfig(num_hidden_layers=1)], ids=["bert", "roberta"]
)
def test_attention_of_a_decoder_looks_back_and_that_of_an_encoder_to_both_sides(config):
    check(config)
    with torch.device("meta"):
        encoder = AutoModel.from_config(config)
        check_model(encoder)
        encoder.config.is_decoder = True
        with pytest.raises(
            UnsupportedModelError, match=f"{config.model_type} .*looks at later tokens"
        ) as found:
            check_model(encoder)
        assert found.value.metadata["model"] == config.model_type
        decoder = AutoModelForCausalLM.from_config(config)
        check_model(decoder)
        decoder.config.is_decoder = False
        with pytest.raises(UnsupportedModelError, match="does not look at later tokens"):
            check_model(decoder)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "youtu", "minicpm3"])
def test_values_of_another_width_than_keys_are_refused(model_type):
    with pytest.raises(UnsupportedModelError, match=f"{model_type} .*values are .* wide"):
        check(AutoConfig.for_model(model_type))


def test_values_as_wide_as_keys_pass():
    config = LlamaConfig(head_dim=64)
    config.v_head_dim = 64
    check(config)


def test_an_encoder_is_refused():
    with pytest.raises(UnsupportedModelError, match="encoder"):
        check_config(T5Config(), AutoModelForCausalLM._model_mapping[GPTNeoXConfig])


@pytest.mark.parametrize("of", ["the model", "the part of it that reads text"])
def test_other_layers_are_refused_by_their_type(of):
    types = ["full_attention", "sliding_attention", "linear_attention", "chunked_attention"]
    config = LlamaConfig(num_hidden_layers=4, layer_types=types)
    if of != "the model":
        config = Gemma3Config(text_config={"num_hidden_layers": 4, "layer_types": types})
    said = "found layers of type chunked_attention, linear_attention; supported are full_attention, sliding"
    with pytest.raises(UnsupportedModelError, match=said):
        check_config(config, AutoModelForCausalLM._model_mapping[LlamaConfig])
    check(LlamaConfig(num_hidden_layers=2, layer_types=types[:2]))


@pytest.mark.parametrize(
    ("quantization", "found"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}, "bitsandbytes FP4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bit"),
        ({"bits": 4}, "an unknown method"),
    ],
)
def test_other_quantisations_are_refused(quantization, found):
    with pytest.raises(UnsupportedModelError, match=f"quantised with {found}; use the checkpoint that it"):
        check(LlamaConfig(quantization_config=quantization))


def test_bitsandbytes_nf4_passes():
    quantization = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "load_in_4bit": True}
    check(LlamaConfig(quantization_config=quantization))


def on_meta(config) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "gpt_oss", "granitemoe", "phimoe"])
def test_other_stacked_experts_are_refused_by_name(model_type):
    config = AutoConfig.for_model(model_type, num_hidden_layers=2)
    said = rf"{model_type} models are not supported: model\.layers"
    with pytest.raises(UnsupportedModelError, match=said) as refused:
        check_model(on_meta(config))
    assert refused.value.metadata == {"model": model_type}


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_models_without_experts_and_with_those_that_are_served_pass(model_type):
    config = AutoConfig.for_model(model_type, num_hidden_layers=2)
    check(config)
    check_model(on_meta(config))


def test_experts_that_bitsandbytes_left_in_16_bit_are_refused():
    quantization = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "load_in_4bit": True}
    with pytest.raises(
        UnsupportedModelError, match="mixtral models are not supported as quantised by bitsandbytes"
    ) as refused:
        check(MixtralConfig(quantization_config=quantization))
    assert refused.value.metadata == {"model": "mixtral"}
