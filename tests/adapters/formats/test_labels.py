"""The names of a head's outputs come from the `config.json` beside the adapter, or it is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from turret_adapters.errors import AdapterError, AdapterFormatError, AdapterSourceError
from turret_adapters.formats.files import LABELS_NAME, MAX_LABELS_BYTES, digest_of_folder
from turret_adapters.formats.labels import read_labels
from turret_adapters.formats.peft import read_adapter
from turret_adapters.spec import HeadTask, Problem

WIDTH = 32
NAMES = {"0": "bad", "1": "so so", "2": "gut 👍"}


@pytest.fixture
def base(base):
    heads = {
        HeadTask.SEQ_CLS: {"score.weight": (0, WIDTH)},
        HeadTask.TOKEN_CLS: {"score.weight": (0, WIDTH)},
        HeadTask.QUESTION_ANS: {"score.weight": (2, WIDTH)},
    }
    return replace(base, heads=heads)


@pytest.fixture
def write(sound, tmp_path):
    """Writes an adapter for a task, and a config.json beside it."""

    def write(config, task="SEQ_CLS", num_labels=3):
        fields = {**sound["LORA"].fields, "task_type": task}
        head = {"base_model.model.score.weight": torch.randn(num_labels, WIDTH)}
        files = replace(sound["LORA"], fields=fields, tensors={**sound["LORA"].tensors, **head})
        files.write(tmp_path)
        data = config if isinstance(config, bytes) else json.dumps(config).encode()
        (tmp_path / "config.json").write_bytes(data)
        return tmp_path

    return write


def head_of(folder, base, weights):
    return read_adapter(folder, base, weights, labels=read_labels(folder)).spec.head


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_labels_and_problem_are_those_of_the_file(task, write, base, weights):
    config = {"id2label": dict(reversed(NAMES.items())), "problem_type": "multi_label_classification"}
    found = head_of(write(config, task), base, weights)
    assert found.labels == tuple(NAMES.values())
    assert found.problem is Problem.MULTI_LABEL


@pytest.mark.parametrize(
    ("config", "num_labels", "problem"),
    [
        ({}, 3, Problem.SINGLE_LABEL),
        ({}, 1, Problem.REGRESSION),
        ({"problem_type": None, "id2label": None}, 1, Problem.REGRESSION),
        ({"id2label": {"0": "LABEL_0"}}, 1, Problem.REGRESSION),
        ({"problem_type": "single_label_classification"}, 1, Problem.SINGLE_LABEL),
        ({"problem_type": "regression"}, 3, Problem.REGRESSION),
    ],
)
def test_what_the_file_does_not_say_is_as_without_it(config, num_labels, problem, write, base, weights):
    found = head_of(write(config, num_labels=num_labels), base, weights)
    assert found.labels == tuple(f"LABEL_{index}" for index in range(num_labels))
    assert found.problem is problem


def test_other_fields_are_ignored_and_not_kept(write):
    said = {"id2label": NAMES, "problem_type": "regression"}
    folder = write({**said, "label2id": 7, "hidden_size": "large", "auto_map": {"AutoModel": "own.Code"}})
    assert json.loads(read_labels(folder)) == said
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "label2id": {"a": 0}}))
    assert read_labels(folder) == b""
    (folder / "config.json").unlink()
    assert read_labels(folder) == b""


@pytest.mark.parametrize("task", [None, "", "CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", ["SEQ_CLS"]])
def test_without_a_head_that_has_labels_the_file_is_not_read(task, write):
    assert read_labels(write(b"no JSON", task)) == b""


def test_the_outputs_for_question_answering_are_start_and_end(write, base, weights):
    assert head_of(write({"id2label": NAMES}, "QUESTION_ANS", 2), base, weights).labels == ("start", "end")


@pytest.mark.parametrize("config", [b"no JSON", b"{}\xff", b"[]"])
def test_a_broken_adapter_config_is_refused_when_it_is_read(config, write, base, weights):
    folder = write({"id2label": NAMES})
    (folder / "adapter_config.json").write_bytes(config)
    assert read_labels(folder) == b""
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json"):
        head_of(folder, base, weights)


def test_files_in_utf_8_may_begin_with_a_mark(write, base, weights):
    folder = write({"id2label": NAMES})
    for path in (folder / "config.json", folder / "adapter_config.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert head_of(folder, base, weights).labels == tuple(NAMES.values())


@pytest.mark.parametrize("num_labels", [0, 2, 4])
def test_labels_of_another_number_are_refused_with_both_numbers(num_labels, write, base, weights):
    folder = write({"id2label": {str(index): f"x{index}" for index in range(num_labels)}})
    expected = rf"config\.json: expected 'id2label' to have 3 labels.*found {num_labels} "
    with pytest.raises(AdapterFormatError, match=expected):
        head_of(folder, base, weights)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (b"{", "a JSON object, found invalid JSON"),
        (b"\xff", "a JSON object, found invalid JSON"),
        (b"[" * 100_000, "a JSON object, found one nested too deeply"),
        (b"[1]", r"a JSON object, found \[1\]"),
        (b'{"id2label": {"0": "a", "0": "b"}}', "is repeated"),
        ({"id2label": ["a", "b", "c"]}, "'id2label' to be an object with the keys 0, 1"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "'id2label' to be an object with the keys 0, 1"),
        ({"id2label": {"0": "a", "1": "b", "02": "c"}}, "'id2label' to be an object with the keys 0, 1"),
        ({"id2label": {"0": "a", "1": 7, "2": "c"}}, "labels that are text, found 7"),
        ({"id2label": {"0": "a", "1": None, "2": "c"}}, "labels that are text, found None"),
        ({"id2label": {"0": "a", "1": "\ud800", "2": "c"}}, r"labels that are text, found '\\ud800'"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "each label in 'id2label' once, found 'a' twice"),
        ({"problem_type": "softmax"}, "'problem_type' to be empty or one of single_label_classification"),
        ({"problem_type": {}}, "'problem_type' to be empty or one of"),
    ],
)
def test_what_is_broken_is_refused_by_name(config, said, write):
    with pytest.raises(AdapterFormatError, match=rf"^config\.json: expected {said}|^config\.json:.*{said}"):
        read_labels(write(config))


def test_a_file_as_large_as_allowed_is_read_and_a_larger_one_is_not(write):
    config = json.dumps({"id2label": NAMES}).encode()
    folder = write(config.ljust(MAX_LABELS_BYTES))
    assert read_labels(folder)
    with (folder / "config.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(AdapterSourceError, match=rf"config\.json: expected at most {MAX_LABELS_BYTES} bytes"):
        read_labels(folder)


def test_a_link_out_of_the_folder_and_what_is_no_file_are_refused(write, tmp_path_factory):
    folder = write({})
    other = tmp_path_factory.mktemp("other") / "config.json"
    other.write_text("{}")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(other)
    with pytest.raises(AdapterSourceError, match="a symbolic link that leaves it"):
        read_labels(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(AdapterSourceError, match=r"config\.json"):
        read_labels(folder)


def test_the_labels_of_a_revision_are_in_its_digest_and_in_its_size(write, base, weights):
    folder = write({"id2label": NAMES})
    without = read_adapter(folder, base, weights, labels=b"").spec
    labels = read_labels(folder)
    (folder / "config.json").unlink()
    assert digest_of_folder(folder).startswith(without.revision)
    (folder / LABELS_NAME).write_bytes(labels)
    found = read_adapter(folder, base, weights).spec
    assert found.head.labels == tuple(NAMES.values())
    assert digest_of_folder(folder).startswith(found.revision)
    assert found.revision != without.revision
    assert found.file_bytes == without.file_bytes + len(labels)


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"id2label": 7}', b'{"problem_type": "x"}', b"{}" * 2])
def test_damaged_labels_of_a_revision_are_refused(damage, write, base, weights):
    folder = write({})
    (folder / LABELS_NAME).write_bytes(damage)
    with pytest.raises(AdapterError):
        read_adapter(folder, base, weights)
