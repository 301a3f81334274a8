"""`turret bench` against the real server."""

from __future__ import annotations

import json
import signal
import subprocess
from functools import partial

import pytest
from click.testing import CliRunner, Result

from support.prompts import until
from support.serving import TURRET
from turret_cli.main import main

LATENCIES = {"mean", "p50", "p90", "p99", "max"}
FEW = ("--prompt-tokens", "4-8", "--max-tokens", "5", "--warm-up", "2")


@pytest.fixture
def bench(served):
    def run(*arguments: str) -> Result:
        return CliRunner(env={"TURRET_SERVER": served.address}).invoke(main, ["bench", *FEW, *arguments])

    return run


def test_what_it_says_is_what_the_server_did(bench, served, tmp_path):
    before = served.metric("turret_generated_tokens_total")
    file = tmp_path / "run.json"
    result = bench("--adapters", "lora*", "--requests", "6", "--concurrency", "3", "--output", str(file))
    assert result.exit_code == 0, result.stderr
    assert "6 succeeded, 0 failed" in result.stdout
    found = json.loads(file.read_text())
    assert found["workload"]["concurrency"] == 3
    assert found["interrupted"] is False
    assert (found["succeeded"], found["failed"], found["unfinished"], found["errors"]) == (6, 0, 0, {})
    assert len(found["records"]) == 6
    assert found["generated_tokens"] == sum(len(record["token_seconds"]) for record in found["records"])
    # The server ends a text where the model does, so only it knows how many tokens there were.
    grown = served.metric("turret_generated_tokens_total") - before
    assert found["generated_tokens"] <= grown <= found["generated_tokens"] + 2 * 5
    assert sum(found["adapters"].values()) == 6
    assert all(name.startswith("lora") for name in found["adapters"])
    for name in ("first_token_seconds", "inter_token_seconds", "request_seconds"):
        assert set(found[name]) == LATENCIES
        assert 0 < found[name]["p50"] <= found[name]["p90"] <= found[name]["p99"] <= found[name]["max"]
    assert found["request_seconds"]["max"] <= found["seconds"]


def test_an_open_loop_counts_failures_by_reason(bench, tmp_path):
    file = tmp_path / "run.json"
    # Longer than the model's context: the server refuses them.
    result = bench(
        "--rate", "50", "--requests", "5", "--warm-up", "0", "--prompt-tokens", "5000", "--output", str(file)
    )
    assert result.exit_code == 1
    assert json.loads(file.read_text())["errors"] == {"PROMPT_TOO_LONG": 5}
    assert "0 succeeded, 5 failed (PROMPT_TOO_LONG 5)" in result.stdout


def test_adapters_by_count_by_name_and_none(bench, client, tmp_path):
    file = tmp_path / "run.json"
    names = [adapter.name for adapter in client.list_adapters()]
    for arguments, expected in (
        (("--adapters", "2", "--popularity", "round-robin"), set(names[:2])),
        (("--adapters", names[1]), {names[1]}),
        ((), {""}),
    ):
        assert bench("--requests", "4", "--output", str(file), *arguments).exit_code == 0
        assert set(json.loads(file.read_text())["adapters"]) == expected


def test_a_plot_is_drawn(bench, tmp_path):
    file = tmp_path / "run.svg"
    assert bench("--requests", "4", "--plot", str(file)).exit_code == 0
    assert "<svg" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--adapters", "nobody-*"), "--adapters nobody-*: no adapter of the server matches"),
        (("--adapters", "9999"), "--adapters 9999: the server has"),
        (("--concurrency", "2", "--rate", "1"), "either --concurrency"),
        (("--popularity", "zipf"), "expected uniform, round-robin or zipf:S"),
        (("--prompt-tokens", "9-3"), "expected N or MIN-MAX"),
        (("--plot", "run.jpeg"), "must end in one of"),
        (("--output", "/nowhere/run.json"), "/nowhere/run.json cannot be written: No such file or directory"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_sent(bench, served, arguments, said):
    before = served.metric("turret_prompt_tokens_total")
    result = bench(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert served.metric("turret_prompt_tokens_total") == before


def test_ctrl_c_ends_it_with_what_was_measured(served, tmp_path):
    file = tmp_path / "run.json"
    before = served.metric("turret_requests_total", outcome="ok")
    process = subprocess.Popen(  # noqa: S603 (the command is this test's)
        [TURRET, "bench", *FEW, "--duration", "3600", "--output", str(file), "--server", served.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell ignore SIGINT, and their children would, too.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    until(lambda: served.metric("turret_requests_total", outcome="ok") > before + 10)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    found = json.loads(file.read_text())
    assert found["interrupted"] is True
    assert found["succeeded"] > 0
    assert f"{found['succeeded']} succeeded, 0 failed" in stdout
    until(lambda: served.metric("turret_running_requests") == 0)
