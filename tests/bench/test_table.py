"""The benchmark's arithmetic. That it runs is for `make bench ARGS=--quick` to see."""

from __future__ import annotations

import pytest

from bench.layout import TINY_LLAMA
from bench.plan import LLAMA_CPP, PEFT, TURRET, VLLM
from bench.table import markdown, rows
from bench.work import Batch, decode_rate, prefill_rate


def test_requests_that_run_together_are_rated_while_all_of_them_run():
    early = [1.0 + step for step in range(11)]
    late = [2.0 + step for step in range(11)]
    # From 2 to 11, nine tokens of each.
    assert decode_rate([early, late]) == pytest.approx(18 / 9)


def test_requests_that_run_one_after_another_are_rated_by_the_sum_of_their_times():
    first = [1.0, 2.0, 3.0]
    second = [10.0, 10.5, 11.0]
    assert decode_rate([first, second]) == pytest.approx(4 / 3)


def test_prefill_ends_with_the_last_first_token():
    batch = Batch(adapters=(None, None), prompt_tokens=100, max_tokens=1, seed=0)
    assert prefill_rate(batch, [[2.0], [4.0]]) == 50.0


def test_the_1_1_b_shape_has_the_parameters_of_tinyllama():
    assert TINY_LLAMA.num_quantised + TINY_LLAMA.num_unquantised == 1_100_048_384


def decoded(rate: float) -> dict[str, list[float]]:
    return {"decode": [rate, 0.5 * rate, 2 * rate], "outside_steps": [0.04]}


STATE = {
    "command": "make bench",
    "machine": "a machine",
    "versions": "versions",
    "quick": False,
    "rounds": 3,
    "groups": {
        "batch-8": {
            "base": {TURRET: decoded(100.0)},
            "lora": {
                TURRET: decoded(80.0),
                PEFT: decoded(20.0),
                LLAMA_CPP: decoded(50.0),
                VLLM: "not installed",
            },
            "mixed": {TURRET: decoded(72.0)},
            "prefix": {TURRET: decoded(98.0)},
        },
    },
}


def test_a_row_says_the_median_the_ratios_and_whether_the_targets_are_met():
    row = next(rows(STATE["groups"]))
    assert row.cells == ("80.0", "20.0", "50.0", "not installed")
    assert row.result == "4.00 × peft, 1.60 × llama.cpp"
    assert row.met is False  # 1.6 of 2.3; what is not installed is not judged


def test_what_adapters_cost_is_judged_against_the_base_alone():
    _, lora, mixed, prefix = rows(STATE["groups"])
    assert (lora.result, lora.met) == ("20.0% slower", False)
    # 0.0139 − 0.01 against 0.0125 − 0.01 seconds a token.
    assert (mixed.result, mixed.met) == ("cost × 1.56", True)
    assert (prefix.result, prefix.met) == ("2.0% slower", True)


def test_a_table_of_what_has_been_measured_so_far():
    text = markdown(STATE)
    assert "| batch 8, 8 LoRAs of rank 16, decode tokens/s | 80.0 | 20.0 | 50.0 | not installed |" in text
    assert "batch 32" not in text


def test_a_server_that_failed_leaves_its_word_in_the_table():
    failed = "failed: no memory"
    groups = {"batch-8": {name: {TURRET: failed} for name in STATE["groups"]["batch-8"]}}
    [row] = rows(groups)
    assert row.cells == (failed, "–", "–", "–")
    assert row.met is None
