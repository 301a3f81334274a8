from __future__ import annotations

import codecs
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from support import scripted_server as script
from support.prompts import until
from turret.v1 import inference_pb2

TURRET = str(Path(sys.executable).with_name("turret"))


def messages(request) -> list[tuple[str, str]]:
    return [(message.role, "".join(message.content)) for message in request.chat.messages]


def test_each_line_is_a_message_and_the_chat_so_far_is_part_of_the_prompt(turret, server):
    result = turret("chat", "--system", "Be brief.", stdin="Hello\n\n And now? \n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Ahoy, mátey\n" * 2, "")
    first, second = server.requests
    assert messages(first) == [("system", "Be brief."), ("user", "Hello")]
    assert messages(second) == [*messages(first), ("assistant", "Ahoy, mátey"), ("user", "And now?")]


def test_options_reach_the_server(turret, server):
    turret(
        *("chat", "--adapter", "pirate=0.5", "--temperature", "0.5", "--max-tokens", "5"),
        *("--template-arguments", '{"enable_thinking": false}'),
        stdin="Hello\n",
    )
    [request] = server.requests
    assert (request.adapters[0].name, request.adapters[0].weight) == ("pirate", 0.5)
    assert (request.temperature, request.max_tokens) == (0.5, 5)
    assert request.chat.template_arguments == '{"enable_thinking": false}'


def test_commands_change_what_follows(turret, server):
    lines = [
        "one",
        "/adapter poet bard#1=0.5",
        "/system Sing.",
        "two",
        "/adapter",
        "/system",
        "/clear",
        "//three",
    ]
    assert turret("chat", stdin="\n".join(lines)).exit_code == 0
    first, second, third = server.requests
    assert messages(first) == [("user", "one")]
    assert messages(second)[0] == ("system", "Sing.")
    assert messages(second)[-1] == ("user", "two")
    assert [(each.name, each.weight) for each in second.adapters] == [("poet", 1.0), ("bard", 0.5)]
    assert (messages(third), list(third.adapters)) == ([("user", "/three")], [])


def test_a_message_is_answered_again_in_place_of_its_answer(turret, server):
    result = turret("chat", "--seed", "7", stdin="one\n/retry\ntwo\n")
    assert result.stdout == "Ahoy, mátey\n" * 3
    first, again, second = server.requests
    assert messages(again) == messages(first) == [("user", "one")]
    assert (first.seed, second.seed) == (7, 7)
    assert again.seed != 7
    assert messages(second) == [("user", "one"), ("assistant", "Ahoy, mátey"), ("user", "two")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/help", "/retry"),
        ("/nothing", "no command /nothing; /help lists the commands"),
        ("/retry", "there is no message yet"),
        ("/adapter poet=much", "expected NAME[@REVISION][#TASK][=WEIGHT]"),
    ],
)
def test_what_is_no_message_is_not_sent(turret, server, line, said):
    result = turret("chat", stdin=f"{line}\n")
    assert (result.exit_code, result.stdout, server.requests) == (0, "", [])
    assert said in result.stderr


def test_reasoning_is_not_part_of_a_piped_answer(turret, server):
    server.chunks = (inference_pb2.GenerateStreamResponse(reasoning="Hm."), *script.CHUNKS)
    assert turret("chat", stdin="Hello\n").stdout == "Ahoy, mátey\n"


@pytest.mark.parametrize(
    "arguments", [("--n", "2"), ("--template-arguments", "{"), ("--template-arguments", "[]")]
)
def test_wrong_options_are_usage_errors(turret, server, arguments):
    result = turret("chat", *arguments, stdin="Hello\n")
    assert (result.exit_code, server.requests) == (2, [])


def test_input_that_is_no_text_is_a_usage_error(turret, server):
    result = turret("chat", stdin=b"\xff\n")
    assert (result.exit_code, server.requests) == (2, [])


def test_the_first_error_ends_a_chat_that_is_piped_in(turret, server):
    server.failure = script.failure(
        grpc.StatusCode.FAILED_PRECONDITION, "no template", reason="NO_CHAT_TEMPLATE"
    )
    server.chunks = (inference_pb2.GenerateStreamResponse(),)
    result = turret("chat", stdin="one\ntwo\n")
    assert (result.exit_code, len(server.requests)) == (1, 1)
    assert "no template (NO_CHAT_TEMPLATE)" in result.stderr


class Terminal:
    """A chat on a terminal; `shown` is what it has shown so far."""

    def __init__(self, address: str) -> None:
        self._main, other = pty.openpty()
        # Whoever runs the tests in the background may have told them to ignore it, and so their children.
        heeding = ("/usr/bin/env", "--default-signal=INT")
        self.process = subprocess.Popen(  # noqa: S603 (the command is this test's)
            [*heeding, TURRET, "chat"],
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            env=os.environ | {"TURRET_SERVER": address, "TERM": "dumb"},
        )
        os.close(other)
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def write(self, text: str) -> None:
        os.write(self._main, text.encode())

    def wait_for(self, text: str) -> None:
        """Until it is shown, after what was waited for before."""
        while text not in self.shown:
            self._read()
        self.shown = self.shown[self.shown.index(text) + len(text) :]

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_until(self, text: str) -> None:
        """For a prompt: readline takes no notice of a signal between showing it and waiting for keys."""
        while text not in self.shown:
            self.interrupt()
            while select.select([self._main], [], [], 0.2)[0]:
                self._read()
        self.wait_for(text)

    def _read(self) -> None:
        self.shown += self._decoder.decode(os.read(self._main, 1 << 12))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)


@contextmanager
def terminal(address: str) -> Iterator[Terminal]:
    opened = Terminal(address)
    try:
        yield opened
    finally:
        opened.close()


def test_an_interrupt_stops_the_answer_and_not_the_chat(server):
    server.endless = True
    with terminal(server.address) as chat:
        chat.wait_for("> ")
        chat.write("one\n")
        chat.wait_for("Ahoy, Ahoy, ")
        chat.interrupt()
        chat.wait_for("> ")
        until(server.ended.is_set)
        server.endless = False
        chat.write("two\n")
        chat.wait_for("mátey")
        chat.wait_for("> ")
        chat.interrupt_until("Ctrl-D ends")
        chat.wait_for("> ")
        chat.write("\x04")
        assert chat.process.wait() == 0
    [_, second] = server.requests
    (_, one), (role, answer), (_, two) = messages(second)
    assert (one, role, two) == ("one", "assistant", "two")
    assert answer.startswith("Ahoy, Ahoy, ")


def test_an_error_ends_no_chat_on_a_terminal(server):
    server.failure = script.failure(grpc.StatusCode.UNAVAILABLE, "busy", reason="SHUTTING_DOWN")
    server.chunks = (inference_pb2.GenerateStreamResponse(),)
    with terminal(server.address) as chat:
        chat.wait_for("> ")
        chat.write("one\n")
        chat.wait_for("error: busy")
        chat.wait_for("> ")
        server.failure, server.chunks = None, script.CHUNKS
        chat.write("two\n")
        chat.wait_for("mátey")
        chat.wait_for("> ")
        chat.write("\x04")
        assert chat.process.wait() == 0
    assert messages(server.requests[1]) == [("user", "two")]
