from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from turret_cli.main import main


@pytest.fixture
def turret() -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def loha(base_of: Callable[[str], Path], tmp_path: Path) -> Path:
    from peft import LoHaConfig, get_peft_model  # noqa: PLC0415 (slow, and not for every test)
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(base_of("llama"))
    config = LoHaConfig(r=3, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "loha")
    return tmp_path / "loha"


def test_a_conversion_is_reported_and_its_output_is_valid(turret, base_of, loha, tmp_path):
    out = tmp_path / "new" / "lora"
    result = turret("adapters", "convert", loha, out, "--model", base_of("llama"))
    assert result.exit_code == 0, result.output
    modules, error, wrote = result.stdout.splitlines()
    assert modules == f"3 modules of rank 9, {3 * 9 * (64 + 64):,} parameters"
    assert error.startswith("relative error of the weight updates: at most ")
    assert wrote == f"wrote {out}"
    result = turret("adapters", "validate", out, "--model", base_of("llama"), "--json")
    assert json.loads(result.stdout)["max_rank"] == 9
    assert [place.name for place in out.parent.iterdir()] == ["lora"]
    readable = 0o666 & ~_umask()
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {readable}


def test_a_conversion_refuses_to_overwrite(turret, base_of, loha, tmp_path):
    result = turret("adapters", "convert", loha, tmp_path, "--model", base_of("llama"))
    assert (result.exit_code, result.stdout, result.stderr) == (
        1,
        "",
        f"error: cannot create the folder {tmp_path}: it exists already; choose another OUT\n",
    )


def test_a_conversion_that_fails_leaves_nothing(turret, base_of, adapter_of, tmp_path):
    arguments = [adapter_of("llama", "lora"), tmp_path / "out", "--model", base_of("llama")]
    result = turret("adapters", "convert", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: adapter_config.json: expected 'peft_type' to be ")
    assert not list(tmp_path.iterdir())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_what_is_not_installed_is_named(tmp_path):
    script = "import sys; sys.modules['peft'] = None; from turret_cli.main import main; main()"
    run: Any = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script, "adapters", "convert", ".", "out", "--model", "m"],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        text=True,
    )
    expected = (
        'error: peft is not installed; in Turret\'s source folder, install it with: pip install ".[train]"\n'
    )
    assert (run.returncode, run.stdout, run.stderr) == (1, "", expected)
