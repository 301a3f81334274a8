"""An upload announces the files that the server wants of a folder."""

from __future__ import annotations

import pytest

from turret_client._upload import AdapterFolder


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ('{"task_type": "SEQ_CLS"}', True),
        ('\ufeff{"task_type": "TOKEN_CLS"}', True),
        ('{"task_type": "QUESTION_ANS"}', False),
        ('{"task_type": "CAUSAL_LM"}', False),
        ('{"task_type": {}}', False),
        ("{}", False),
        ("[]", False),
        ("no JSON", False),
        ("[" * 100_000, False),
    ],
)
def test_labels_are_sent_with_a_head_that_has_some(config, labels, tmp_path):
    (tmp_path / "adapter_config.json").write_text(config, encoding="utf-8")
    for name in ("adapter_model.safetensors", "tokenizer.json", "config.json", "README.md"):
        (tmp_path / name).write_bytes(b"bytes")
    start = AdapterFolder("sent", tmp_path, None).start().start
    assert [file.name for file in start.tokenizer] == [*(["config.json"] * labels), "tokenizer.json"]
