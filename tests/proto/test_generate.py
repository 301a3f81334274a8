from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import generate

ROOT = Path(generate.__file__).parent.parent
# The generated options of the command line import `common.py`.
SOURCES = (
    "pyproject.toml",
    "proto",
    "clients/cli/turret_cli/common.py",
    generate.ASYNC_CLIENT,
    generate.REFERENCE,
)
GENERATED = {
    generate.SERVER_FIELDS,
    generate.CLIENT_OPTIONS,
    generate.CLI_OPTIONS,
    generate.SYNC_CLIENT,
    generate.REFERENCE,
}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the sources, below which generated files go."""
    for source in SOURCES:
        copy = tmp_path / source
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, copy)
    return tmp_path


def add_field(tree: Path, declaration: str) -> dict[str, str]:
    proto = tree / "proto/turret/v1/inference.proto"
    text = proto.read_text()
    proto.write_text(text.replace("\n}\n\n// An adapter of", f"\n{declaration}\n}}\n\n// An adapter of"))
    assert proto.read_text() != text
    return generate.generate(tree)


def test_no_generated_file_is_stale():
    files = generate.generate(ROOT)
    assert set(files) > GENERATED
    assert [name for name, text in files.items() if (ROOT / name).read_text() != text] == []


def test_a_new_field_reaches_every_generated_file(tree):
    files = add_field(
        tree, "// Smallest share. Default: off.\noptional float least = 90 [(rule) = {min: 0, max: 0.5}];"
    )
    assert "least: float | None = None\n" in files[generate.SERVER_FIELDS]
    assert '"least": FieldRule(min=0.0, max=0.5),' in files[generate.SERVER_FIELDS]
    assert "least: Smallest share. From 0 to 0.5. Default: off.\n" in files[generate.CLIENT_OPTIONS]
    assert "    least: float | None\n" in files[generate.CLIENT_OPTIONS]
    assert "click.FloatRange(min=0, max=0.5)" in files[generate.CLI_OPTIONS]
    assert 'help="Smallest share. Default: off."' in files[generate.CLI_OPTIONS]
    assert "| `least` | `--least` | from 0 to 0.5 | off | Smallest share. |\n" in files[generate.REFERENCE]
    assert "least" in files["proto/turret/v1/inference_pb2.py"]


def test_a_map_is_a_mapping_with_bounds_for_its_values(tree):
    files = add_field(
        tree, "// Bias.\nmap<uint32, float> offsets = 90 [(rule) = {min: -1, max: 2, max_items: 3}];"
    )
    declared = "offsets: Mapping[int, float] = field(default_factory=dict)\n"
    assert declared in files[generate.SERVER_FIELDS]
    assert '"offsets": FieldRule(min=-1.0, max=2.0, max_items=3),' in files[generate.SERVER_FIELDS]
    assert "    offsets: Mapping[int, float] | None\n" in files[generate.CLIENT_OPTIONS]
    assert "offsets: Bias. At most 3, each from -1 to 2.\n" in files[generate.CLIENT_OPTIONS]
    option = files[generate.CLI_OPTIONS].partition('"--offsets"')[2].partition("),")[0]
    assert [each.strip() for each in option.split(",")[1:4]] == [
        "multiple=True", "callback=biases", 'metavar="ID=F"',
    ]  # fmt: skip
    assert (
        "| `offsets` | `--offsets` | at most 3, each from -1 to 2 | none | Bias. |\n"
        in files[generate.REFERENCE]
    )


RULES = [
    ("int32", "", "int = 0", "", "IntRange(-2147483648, 2147483647)", "any"),
    ("uint64", "min: 3", "int = 0", "min=3", "IntRange(3, 18446744073709551615)", "at least 3"),
    (
        "optional float",
        "min: 0, exclusive_min: true, max: 1, default_value: 0.5",
        "float = 0.5",
        "min=0.0, max=1.0, exclusive_min=True",
        "FloatRange(min=0, max=1, min_open=True)",
        "above 0, at most 1",
    ),
    ("string", "max_length: 9", 'str = ""', "max_length=9", "", "at most 9 characters"),
    (
        "string",
        "min_length: 1, max_length: 9",
        "str\n",
        "min_length=1, max_length=9",
        "",
        "1 to 9 characters",
    ),
    (
        "repeated string",
        "max_items: 2, min_length: 1, max_length: 9",
        "tuple[str, ...] = ()",
        "min_length=1, max_length=9, max_items=2",
        "multiple=True",
        "at most 2, each 1 to 9 characters",
    ),
]


def test_rules_become_bounds_everywhere(tree):
    declarations = [
        f"// Some.\n{kind} x{index} = {90 + index}{f' [(rule) = {{{rule}}}]' if rule else ''};"
        for index, (kind, rule, *_) in enumerate(RULES)
    ]
    files = add_field(tree, "\n".join(declarations))
    for index, (_, _, declared, rule, option, allowed) in enumerate(RULES):
        name = f"x{index}"
        assert f"    {name}: {declared}" in files[generate.SERVER_FIELDS]
        assert f'"{name}": FieldRule({rule}),\n' in files[generate.SERVER_FIELDS]
        assert option in files[generate.CLI_OPTIONS].partition(f'"--{name}"')[2].partition("click.option")[0]
        assert f"| `{name}` | `--{name}` | {allowed} |" in files[generate.REFERENCE]


def test_a_stale_file_fails_the_check_and_is_named(tree):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 (our own script)
            [sys.executable, str(tree / "proto/generate.py"), *arguments],
            check=False,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "clients/python")},
        )

    for name in GENERATED:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    stale = tree / generate.SYNC_CLIENT
    stale.write_text(stale.read_text() + "# edited\n")
    checked = run("--check")
    assert checked.returncode == 1
    assert checked.stderr == (
        f"These generated files are stale; run `make proto` and commit them:\n  {generate.SYNC_CLIENT}\n"
    )
    assert run().stdout == f"wrote {generate.SYNC_CLIENT}\n"
    assert run("--check").returncode == 0


def test_the_reference_needs_its_markers(tree):
    (tree / generate.REFERENCE).write_text("# Clients\n")
    with pytest.raises(SystemExit, match="markers"):
        generate.generate(tree)
