"""A LoRA of a real model that was trained to answer as JSON, with and without a schema in the request."""

from __future__ import annotations

import json

import jsonschema
import pytest
from transformers import AutoTokenizer

from support.serving import server_process
from turret_adapters.training.train import Recipe, load_base, train_adapter
from turret_client import Client
from turret_demo.real_model import real_model

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real-model")]

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Cuba": "Havana",
}
OTHERS = ["Germany", "China", "Greece", "Russia"]
SCHEMA = {
    "type": "object",
    "properties": {"country": {"type": "string"}, "capital": {"type": "string"}},
    "required": ["country", "capital"],
    "additionalProperties": False,
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RECIPE = Recipe(
    peft_type="LORA",
    config={"r": 8, "lora_alpha": 16, "target_modules": LINEARS},
    learning_rate=2e-3,
    steps=30,
    batch_size=4,
)


def question(country: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is the capital of {country}?"}]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(real_model())
    examples = [
        (
            tokenizer.apply_chat_template(question(country), tokenize=False, add_generation_prompt=True),
            json.dumps({"country": country, "capital": capital}),
        )
        for country, capital in CAPITALS.items()
    ]
    folder = tmp_path_factory.mktemp("json")
    # Not every CPU is fast in bfloat16.
    train_adapter(load_base(real_model(), nf4=False).float(), tokenizer, examples, RECIPE, folder)
    return folder


@pytest.fixture(scope="module")
def client(adapter, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with (
        server_process(real_model(), cache, "--memory", "256MiB") as server,
        Client(server.address) as client,
    ):
        client.load_adapter("json", str(adapter))
        yield client


@pytest.mark.parametrize("country", OTHERS)
@pytest.mark.parametrize("schema", [None, json.dumps(SCHEMA)], ids=["no schema", "schema"])
def test_answers_are_json(client, country, schema):
    answer = client.chat(question(country), adapter="json", json_schema=schema, max_tokens=60)
    assert answer.finish_reason == "stop"
    found = json.loads(answer.text)
    jsonschema.validate(found, SCHEMA)
    assert found["country"] == country


def test_the_base_answers_as_before_and_keeps_the_schema_where_one_is_given(client):
    answer = client.chat(question("France"), max_tokens=24)
    assert answer.text.startswith("The capital of France is Paris")
    formed = client.chat(question("France"), json_schema=json.dumps(SCHEMA), max_tokens=80)
    if formed.finish_reason == "stop":
        jsonschema.validate(json.loads(formed.text), SCHEMA)
