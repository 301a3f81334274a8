"""How a base's vectors are pooled comes from sentence-transformers' files; others are refused by name."""

from __future__ import annotations

import json

import huggingface_hub.constants
import pytest

from support.web import web_server
from turret_server.engine.pooling import Pooling
from turret_server.errors import ConfigError
from turret_server.model import checkpoint
from turret_server.model.sentence_transformers import VectorDefaults, read_vector_defaults

OLD = {
    name: f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize", "Dense")
}
NEW = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
MODES = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def modules(*kinds, types=OLD):
    return [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "", "type": types[kind]}
        for index, kind in enumerate(kinds)
    ]


def flags(*true):
    """As versions before 6 write a pooling."""
    return {"word_embedding_dimension": 64, **{f"pooling_mode_{mode}": mode in true for mode in MODES}}


@pytest.fixture
def write(tmp_path):
    """Writes the files of a base, by their paths."""

    def write(**files):
        for name, content in {"config.json": {}, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(tmp_path)

    return write


def read(folder, *, is_encoder=True):
    return read_vector_defaults(folder, is_encoder=is_encoder)


def pooled(write, pooling, **files):
    return read(
        write(
            **{"modules.json": modules("Transformer", "Pooling"), "1_Pooling/config.json": pooling}, **files
        )
    )


@pytest.mark.parametrize(("is_encoder", "pooling"), [(True, Pooling.MEAN), (False, Pooling.LAST)])
def test_without_its_files_vectors_are_as_vllms(is_encoder, pooling, write):
    assert read(write(), is_encoder=is_encoder) == VectorDefaults(pooling=pooling, normalize=True)


@pytest.mark.parametrize(
    ("mode", "pooling"),
    [
        ("cls_token", Pooling.CLS),
        ("mean_tokens", Pooling.MEAN),
        ("weightedmean_tokens", Pooling.WEIGHTED_MEAN),
        ("lasttoken", Pooling.LAST),
    ],
)
def test_each_pooling_is_read_as_old_and_new_versions_write_it(mode, pooling, write):
    expected = VectorDefaults(pooling=pooling, normalize=False)
    assert pooled(write, flags(mode)) == expected
    new = {"embedding_dimension": 64, "pooling_mode": pooling.value, "include_prompt": True}
    assert pooled(write, new) == expected
    assert pooled(write, {**new, "pooling_mode": [pooling.value], **flags("max_tokens")}) == expected


def test_a_pooling_without_a_mode_is_the_mean(write):
    assert pooled(write, {"word_embedding_dimension": 64}) == VectorDefaults(
        pooling=Pooling.MEAN, normalize=False
    )
    assert pooled(write, flags()).pooling is Pooling.MEAN


@pytest.mark.parametrize("types", [OLD, NEW])
def test_vectors_are_normalised_where_the_last_module_says_so(types, write):
    folder = write(
        **{
            "modules.json": modules("Transformer", "Pooling", "Normalize", types=types),
            "1_Pooling/config.json": flags("cls_token"),
        }
    )
    assert read(folder) == VectorDefaults(pooling=Pooling.CLS, normalize=True)


def test_the_folders_are_those_that_the_modules_name(write):
    listed = modules("Transformer", "Pooling")
    listed[0]["path"], listed[1]["path"] = "texts", "pooled"
    files = {
        "modules.json": listed,
        "texts/sentence_bert_config.json": {"max_seq_length": 7},
        "pooled/config.json": flags("cls_token"),
    }
    assert read(write(**files)) == VectorDefaults(pooling=Pooling.CLS, normalize=False, max_tokens=7)


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_texts_have_the_length_that_the_base_was_trained_for(name, write):
    files = {f"sentence_{name}_config.json": {"max_seq_length": 256, "do_lower_case": False}}
    assert pooled(write, flags("mean_tokens"), **files).max_tokens == 256
    files = {f"sentence_{name}_config.json": {"max_seq_length": None}}
    assert pooled(write, flags("mean_tokens"), **files).max_tokens is None


@pytest.mark.parametrize(
    ("pooling", "said"),
    [
        (flags("max_tokens"), "one pooling of cls, mean, weightedmean, lasttoken, found max "),
        (flags("mean_sqrt_len_tokens"), "found mean_sqrt_len_tokens "),
        (flags("cls_token", "mean_tokens"), "found cls, mean "),
        ({"pooling_mode": ["lasttoken", "mean"]}, "found lasttoken, mean "),
        ({"pooling_mode": "another"}, "found another "),
        ({**flags("cls_token"), "include_prompt": False}, "include_prompt, since .* found false"),
    ],
)
def test_a_pooling_that_is_not_computed_is_refused_by_name(pooling, said, write):
    found = pooled(write, pooling)
    assert found.pooling is Pooling.MEAN
    assert found.refusal.startswith("1_Pooling/config.json: expected ")
    assert said.partition(" .* ")[0] in found.refusal
    assert found.refusal.endswith("(name the pooling in the request for vectors that are pooled without it)")


@pytest.mark.parametrize(
    "kinds",
    [
        ("Transformer", "Pooling", "Dense"),
        ("Transformer", "Pooling", "Dense", "Normalize"),
        ("Transformer",),
        ("Transformer", "Normalize"),
        ("Pooling",),
        (),
    ],
)
def test_other_modules_are_refused_by_name(kinds, write):
    found = read(write(**{"modules.json": modules(*kinds)}), is_encoder=False)
    assert found.pooling is Pooling.LAST
    assert f"Transformer, Pooling and at most Normalize, found {', '.join(kinds)} (" in found.refusal


def test_texts_that_become_lower_case_are_refused(write):
    found = pooled(write, flags("cls_token"), **{"sentence_bert_config.json": {"do_lower_case": True}})
    assert found.refusal.startswith("do_lower_case: ")


@pytest.mark.parametrize(
    "files",
    [
        {"modules.json": b"{"},
        {"modules.json": {"type": "Transformer"}},
        {"modules.json": [{"idx": 0}]},
        {"modules.json": modules("Transformer", "Pooling")},
        {"modules.json": modules("Transformer", "Pooling"), "1_Pooling/config.json": b"[]"},
        {"modules.json": modules("Transformer", "Pooling"), "1_Pooling/config.json": {"pooling_mode": 7}},
        {
            "modules.json": modules("Transformer", "Pooling"),
            "1_Pooling/config.json": {},
            "sentence_bert_config.json": b"x",
        },
    ],
)
def test_missing_and_broken_files_are_told_in_one_line(files, write):
    with pytest.raises(
        ConfigError, match=r"found modules\.json or a file that it names unreadable: "
    ) as error:
        read(write(**files))
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture
def hub(monkeypatch, tmp_path):
    checkpoint._files_on_hub.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with web_server() as web:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", web.url)
        template = f"{web.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield web
    checkpoint._files_on_hub.cache_clear()


def test_the_files_come_from_the_hub_and_then_from_its_cache(hub, monkeypatch):
    files = {
        "config.json": {},
        "modules.json": modules("Transformer", "Pooling"),
        "1_Pooling/config.json": flags("cls_token"),
        "sentence_bert_config.json": {"max_seq_length": 12},
    }
    listed = [{"rfilename": name} for name in files]
    hub.pages["/api/models/owner/model"] = json.dumps({"id": "owner/model", "siblings": listed}).encode()
    for name, content in files.items():
        data = json.dumps(content).encode()
        hub.pages[f"/owner/model/resolve/main/{name}"] = lambda call, data=data: call.answer(
            200, data, ETag=f'"{hash(data)}"', X_Repo_Commit="0" * 40
        )
    expected = VectorDefaults(pooling=Pooling.CLS, normalize=False, max_tokens=12)
    assert read("owner/model") == expected
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    checkpoint._files_on_hub.cache_clear()
    assert read("owner/model") == expected
