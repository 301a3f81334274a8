from __future__ import annotations

import json

import grpc
import pytest

from support import scripted_server as script
from turret.v1 import inference_pb2, pooling_pb2


def texts(server) -> list[list[object]]:
    """The inputs of each call."""
    return [
        [each.text if each.WhichOneof("prompt") == "text" else (each.pair.first, each.pair.second) for each in
         request.batch.inputs]
        for request in server.requests
    ]  # fmt: skip


def test_each_argument_is_an_input(turret, server):
    result = turret("embed", "one", "two")
    assert (result.exit_code, result.stdout) == (0, "[0.5, -1.0]\n[0.0, 2.0]\n")
    assert texts(server) == [["one", "two"]]


def test_lines_come_from_a_file_or_are_piped_in(turret, server, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\n\ntwö\n")
    assert turret("embed", "--file", str(path)).exit_code == 0
    assert turret("embed", stdin="one\n\ntwö").exit_code == 0
    assert turret("embed", "--file", "-", stdin="one\n\ntwö").exit_code == 0
    assert texts(server) == [["one", "", "twö"]] * 3


def test_many_lines_are_sent_in_several_calls(turret, server):
    assert turret("classify", "--batch-size", "2", stdin="1\n2\n3\n4\n5\n").exit_code == 0
    assert texts(server) == [["1", "2"], ["3", "4"], ["5"]]


def test_only_line_breaks_end_a_line(turret, server):
    assert turret("embed", stdin="one\x0c\u2028\x85more\r\ntwo\n\n").exit_code == 0
    assert texts(server) == [["one\x0c\u2028\x85more", "two", ""]]


def test_nothing_in_is_nothing_out(turret, server):
    assert turret("embed", stdin="").output == ""
    assert server.requests == []


def test_options_are_sent(turret, server):
    options = ["--adapter", "a=0.5", "--truncate", "--priority", "2", "--cache-salt", "s"]
    options += ["--routing-key", "me", "--no-add-special-tokens"]
    own = ["--pooling", "mean", "--no-normalize", "--dimensions", "8"]
    assert turret("embed", *options, *own, "one").exit_code == 0
    assert turret("tag", *options, "one").exit_code == 0
    batch = pooling_pb2.TextBatch(
        inputs=[pooling_pb2.Input(text="one")],
        adapters=[inference_pb2.AdapterRef(name="a", weight=0.5)],
        truncate=True,
        priority=2,
        cache_salt="s",
        routing_key="me",
        add_special_tokens=False,
    )
    embed = pooling_pb2.EmbedRequest(
        batch=batch, pooling=pooling_pb2.POOLING_MEAN, normalize=False, dimensions=8
    )
    assert server.requests == [embed, pooling_pb2.TagRequest(batch=batch)]


def test_classes_are_labels_and_scores(turret):
    assert turret("classify", "one").stdout == "good\t0.7500\n"
    assert json.loads(turret("classify", "--json", "one").stdout) == {
        "label": "good",
        "scores": {"bad": 0.25, "good": 0.75},
        "logits": {"bad": -1.0, "good": 1.5},
    }


def test_tags_are_spans(turret):
    assert turret("tag", "one").stdout == "PER: Ada\n"
    found = json.loads(turret("tag", "--json", "one").stdout)
    assert found["spans"][0]["text"] == "Ada"
    assert found["tokens"][0]["label"] == "B-PER"


def test_a_text_is_scored_with_each_of_the_others(turret, server):
    assert turret("score", "one", "two", "three").stdout == "0.2500\n0.7500\n"
    assert turret("score", stdin="one\ttwo\none\tthree\n").stdout == "0.2500\n0.7500\n"
    assert turret("classify", "--pairs", "one\ttwo").exit_code == 0
    assert texts(server) == [[("one", "two"), ("one", "three")]] * 2 + [[("one", "two")]]


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("embed", "--file", "-", "one"), "", "Give TEXT or --file, not both."),
        (("embed",), b"\xff", "not UTF-8"),
        (("score", "one"), "", "Give a text and others"),
        (("score",), "one\ttwo\nthree\n", "Input 2: expected two texts with one tab between them, found 0"),
        (("embed", "--pooling", "max", "one"), "", "cls"),
        (("embed", "--file", "missing.txt"), "", "missing.txt"),
        (("embed", "\udcff"), "", "not UTF-8"),
        (("score", "one", "\udcff"), "", "not UTF-8"),
    ],
)
def test_wrong_usage_is_explained(turret, server, arguments, stdin, message):
    result = turret(*arguments, stdin=stdin)
    assert result.exit_code == 2
    assert message in result.stderr
    assert server.requests == []


def test_an_error_has_the_number_of_the_line(turret, server):
    server.failure = script.failure(
        grpc.StatusCode.INVALID_ARGUMENT,
        "inputs[1]: too long",
        reason="PROMPT_TOO_LONG",
        metadata={"input": "1"},
    )
    result = turret("embed", stdin="one\ntwo\n")
    assert (result.exit_code, result.stderr) == (1, "error: input 2: too long (PROMPT_TOO_LONG)\n")


def test_a_full_queue_is_waited_for(turret, server, monkeypatch):
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        server.failure = None

    monkeypatch.setattr("turret_cli.texts.time.sleep", wait)
    server.failure = script.failure(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after=0.5
    )
    assert turret("classify", "one").stdout == "good\t0.7500\n"
    assert waits == [0.5]
    server.failure = script.failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "never", reason="QUOTA_EXCEEDED")
    assert turret("classify", "one").exit_code == 1


def test_lines_that_no_call_takes_together_are_sent_in_several(turret, server):
    long = "x" * (1 << 20)
    assert turret("embed", stdin=f"{long}\n" * 4 + "a\n").exit_code == 0
    assert [len(each) for each in texts(server)] == [3, 2]


def test_a_byte_order_mark_is_no_text(turret, server):
    assert turret("embed", stdin=b"\xef\xbb\xbfone\n").exit_code == 0
    assert texts(server) == [["one"]]


def test_a_span_is_on_one_line(turret, monkeypatch):
    span = pooling_pb2.Span(label="PER", text="Ada\n\tLovelace")
    tags = pooling_pb2.TagResponse(texts=[pooling_pb2.TaggedText(spans=[span])])
    monkeypatch.setattr(script, "TAGS", tags)
    assert turret("tag", "one").stdout == "PER: Ada Lovelace\n"


def test_too_large_a_batch_is_told_the_option(turret, server):
    server.failure = script.failure(
        grpc.StatusCode.INVALID_ARGUMENT,
        "a call has at most 3 inputs; send several calls",
        reason="INVALID_REQUEST",
        metadata={"field": "inputs"},
    )
    assert turret("embed", "one").stderr.endswith(
        "send several calls, with a lower --batch-size (INVALID_REQUEST)\n"
    )
