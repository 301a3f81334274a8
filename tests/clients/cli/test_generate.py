from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from support import scripted_server as script
from support.prompts import until
from turret.v1 import inference_pb2
from turret_client import Client

HANG_S = 60
"""Only so that a failing test ends."""
TURRET = str(Path(sys.executable).with_name("turret"))


def test_generate_prints_the_text(turret, server):
    result = turret("generate", "Hello")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Ahoy, mátey\n", "")
    assert server.requests == [inference_pb2.GenerateRequest(text="Hello")]


def test_generate_no_stream(turret):
    assert turret("generate", "--no-stream", "Hello").stdout == "Ahoy, mátey\n"


def test_generate_json_is_the_chunks(turret, server):
    lines = turret("generate", "--json", "Hello").stdout.splitlines()
    with Client(server.address) as client:
        assert [json.loads(line) for line in lines] == [
            json.loads(json.dumps(asdict(chunk))) for chunk in client.stream("Hello")
        ]


def test_generate_no_stream_json_is_one_object(turret):
    [line] = turret("generate", "--no-stream", "--json", "Hello").stdout.splitlines()
    assert json.loads(line) == {
        "text": "Ahoy, mátey",
        "token_ids": [7, 8, 9, 2],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "cached_tokens": 2, "generated_tokens": 4},
        "revision": "r1",
        "stop_string": None,
        "stop_token_id": None,
        "choices": [],
        "logprobs": [],
        "prompt_logprobs": [],
        "reasoning": "",
        "tool_calls": [],
    }


def test_generate_json_has_the_bytes_of_tokens_as_numbers(turret, server):
    found = inference_pb2.TokenLogprob(token_id=7, token=b"\xc3", logprob=-0.5, rank=2)
    server.chunks = [inference_pb2.GenerateStreamResponse(logprobs=[found])]
    [line] = turret("generate", "--json", "--logprobs", "0", "Hello").stdout.splitlines()
    assert json.loads(line)["logprobs"] == [
        {
            "token_id": 7,
            "text": "\N{REPLACEMENT CHARACTER}",
            "token": [0xC3],
            "logprob": -0.5,
            "rank": 2,
            "top": [],
        }
    ]


def test_generate_prints_several_answers_one_after_another(turret, server):
    choices = [inference_pb2.Choice(index=index, text=text) for index, text in enumerate("ab")]
    server.generation = inference_pb2.GenerateResponse(text="a", choices=choices)
    assert turret("generate", "--n", "2", "--temperature", "1", "Hello").stdout == "a\n---\nb\n"


def test_generate_sends_biases_and_refuses_others(turret, server):
    assert turret("generate", "--logit-bias", "7=-1.5", "--logit-bias", "9=2", "Hello").exit_code == 0
    assert server.requests == [inference_pb2.GenerateRequest(text="Hello", logit_bias={7: -1.5, 9: 2})]
    wrong = turret("generate", "--logit-bias", "x=1", "Hello")
    assert (wrong.exit_code, "expected ID=F, found 'x=1'" in wrong.stderr) == (2, True)


def test_generate_sends_every_option(turret, server):
    turret(
        *("generate", "--adapter", "pirate", "--max-tokens", "5", "--temperature", "0.5", "--top-p", "0.25"),
        *("--top-k", "40", "--seed", "0", "--stop", "\n", "--stop", "END"),
        *("--stop-token-ids", "5", "--stop-token-ids", "0", "--no-add-special-tokens"),
        *("--tenant", "acme", "--priority", "-3", "--cache-salt", "pepper", "Hello"),
    )
    assert server.tenants == ["acme"]
    assert server.requests == [
        inference_pb2.GenerateRequest(
            text="Hello",
            adapters=[inference_pb2.AdapterRef(name="pirate", weight=1)],
            max_tokens=5,
            temperature=0.5,
            top_p=0.25,
            top_k=40,
            seed=0,
            stop=["\n", "END"],
            priority=-3,
            cache_salt="pepper",
            stop_token_ids=[5, 0],
            add_special_tokens=False,
        )
    ]


@pytest.mark.parametrize(
    ("value", "ref"),
    [
        ("pirate", {"name": "pirate", "weight": 1}),
        ("pirate=0.25", {"name": "pirate", "weight": 0.25}),
        ("many#2", {"name": "many", "weight": 1, "task": 2}),
        ("many#0=-1", {"name": "many", "weight": -1, "task": 0}),
    ],
)
def test_an_adapter_may_have_a_task_and_a_weight(turret, server, value, ref):
    turret("generate", "--adapter", "first", "--adapter", value, "Hello")
    assert list(server.requests[0].adapters)[1:] == [inference_pb2.AdapterRef(**ref)]


@pytest.mark.parametrize("value", ["pirate=much", "many#one", "pirate=", "many#", "many#=1"])
def test_a_task_or_a_weight_that_is_no_number_is_a_usage_error(turret, value):
    result = turret("generate", "--adapter", value, "Hello")
    assert result.exit_code == 2
    assert "NAME[@REVISION][#TASK][=WEIGHT]" in result.stderr


@pytest.mark.parametrize("command", [("generate",), ("prompts", "pin", "rules")])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-dash",), "A prompt that begins with a dash goes after --, at the end."),
        (("--Hello there",), "A prompt that begins with a dash goes after --, at the end."),
        (("--cache-sal", "a", "Hello"), "Did you mean '--cache-salt'? A prompt"),
        (("two", "words"), "Got words after the prompt; quote a prompt of several words."),
        (("three", "of", "them"), "Got words after the prompt; quote a prompt of several words."),
    ],
)
def test_a_prompt_that_click_takes_for_something_else_is_explained(turret, server, command, words, said):
    result = turret(*command, *words)
    assert (result.exit_code, server.requests) == (2, [])
    assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize("command", [("generate",), ("prompts", "pin", "rules", "--file", "/dev/zero")])
def test_a_prompt_without_end_is_not_read_to_its_end(turret, server, command):
    result = turret(*command, stdin=b"a" * (5 << 20))
    assert (result.exit_code, server.requests) == (2, [])
    assert "is larger than 4 MiB, which is the most that servers accept." in " ".join(result.stderr.split())


def test_a_prompt_that_begins_with_a_dash_follows_two(turret, server):
    turret("generate", "--", "-dash")
    assert server.requests == [inference_pb2.GenerateRequest(text="-dash")]


@pytest.mark.parametrize(
    ("stop", "is_explained"),
    [("\\n", True), ("\\r\\n", True), ("\n", False), ("\\nabla", False), ("n", False), ("\\\\", False)],
)
def test_a_stop_string_of_escapes_is_sent_as_it_is_and_explained(turret, server, stop, is_explained):
    result = turret("generate", "--stop", stop, "Hello")
    assert list(server.requests[0].stop) == [stop]
    assert result.stdout == "Ahoy, mátey\n"
    expected = f"note: --stop {stop} is a backslash and a letter; for a line break write --stop $'{stop}'\n"
    assert result.stderr == (expected if is_explained else "")


@pytest.mark.parametrize("arguments", [(), ("-",)])
@pytest.mark.parametrize(
    ("stdin", "prompt"),
    [("Ahoy\n", "Ahoy"), ("Ahoy", "Ahoy"), ("Ah\n\u00f6y\n\n", "Ah\n\u00f6y\n"), ("", "")],
)
def test_generate_reads_standard_input(turret, server, arguments, stdin, prompt):
    turret("generate", *arguments, stdin=stdin)
    assert [request.text for request in server.requests] == [prompt]


def test_generate_asks_for_a_prompt_at_a_terminal(turret, server, monkeypatch):
    monkeypatch.setattr("turret_cli.common.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    result = turret("generate")
    assert (result.exit_code, server.requests) == (2, [])
    assert "PROMPT" in result.stderr


def test_standard_input_that_is_no_text(turret):
    result = turret("generate", stdin=b"\xff\xfe")
    assert result.exit_code == 2
    assert "UTF-8" in result.stderr


def test_an_error_after_some_text_begins_its_own_line(turret, server):
    server.failure = script.failure(grpc.StatusCode.INTERNAL, "broke", reason="GENERATION_FAILED")
    result = turret("generate", "Hello")
    assert result.output == "Ahoy, \nerror: broke (GENERATION_FAILED)\n"


@pytest.mark.parametrize("options", [(), ("--no-stream",), ("--json",)], ids=" ".join)
def test_ctrl_c_cancels_the_request(server, options):
    server.hold = True
    # Whoever runs the tests in the background may have told them to ignore it, and so their children.
    heeding = ("/usr/bin/env", "--default-signal=INT")
    with subprocess.Popen(  # noqa: S603 -- our own command
        [*heeding, TURRET, "generate", "--server", server.address, *options, "Hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert server.began.wait(HANG_S)
        if "--no-stream" not in options:
            # The text comes before the generation has ended, though a pipe takes it.
            assert process.stdout.read(6) == (b'{"text' if options else b"Ahoy, ")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=HANG_S)
    assert server.ended.wait(HANG_S)
    assert (process.returncode, stderr) == (130, b"")


@pytest.fixture
def interrupt_once_it_runs(server) -> Iterator[None]:
    """Sends SIGINT to this process, which stays: nothing but the command ends its call."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    server.hold = True

    main = threading.main_thread().ident

    def interrupt() -> None:
        server.began.wait()
        # An interrupt between the start of a call and the wait would find nothing that cancels the call.
        until(lambda: Path(sys._current_frames()[main].f_code.co_filename).name == "_waiting.py")
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    yield
    server.began.set()
    thread.join()
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupt_once_it_runs")
@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "Hello"),
        ("generate", "--json", "Hello"),
        ("generate", "--no-stream", "Hello"),
        ("adapters", "watch"),
        ("prompts", "pin", "rules", "Hello"),
    ],
    ids=" ".join,
)
def test_a_command_that_ctrl_c_ends_leaves_no_call_behind(turret, server, arguments):
    assert turret(*arguments).exit_code == 130
    assert server.ended.wait(HANG_S)


def test_a_closed_pipe_cancels_the_request(server):
    """As in `turret generate … | head -c1`."""
    server.endless = True
    with subprocess.Popen(  # noqa: S603 -- our own command
        [TURRET, "generate", "--server", server.address, "Hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        stderr = process.stderr.read()
    assert server.ended.wait(HANG_S)
    assert (process.returncode, stderr) == (1, b"")
