from __future__ import annotations

from textwrap import dedent

import pytest

from mutants.report import report
from mutants.run import Copy, _read_run
from mutants.sites import Mutant, find_sites

_MODULE = "server/turret_server/ages.py"
_SOURCE = b"def is_adult(age: int) -> bool:\n    return age >= 18\n"


@pytest.fixture
def copy(tmp_path):
    """A tree of one module with one test, which knows nothing of the bound."""
    files = {
        "pyproject.toml": '[tool.hatch.build]\ndev-mode-dirs = ["server"]\n[tool.mypy]\nfiles = "server"\n',
        "server/turret_server/__init__.py": "",
        _MODULE: _SOURCE.decode(),
        "tests/server/test_ages.py": """\
            from turret_server.ages import is_adult


            def test_a_child_is_none_and_its_mother_is():
                assert not is_adult(3)
                assert is_adult(40)
            """,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(dedent(text))
    return Copy(tmp_path)


def _mutant(after):
    for site in find_sites(_SOURCE):
        for variant in range(len(site.variants)):
            mutant = Mutant(_MODULE, site, variant)
            if after in mutant.apply(_SOURCE).decode():
                return mutant
    raise AssertionError(after)


@pytest.mark.slow
def test_a_mutant_lives_only_while_its_tests_run(copy):
    killed = copy.judge(_mutant("age < 18"))
    assert killed.killer == "tests/server/test_ages.py::test_a_child_is_none_and_its_mother_is"
    survived = copy.judge(_mutant("age > 18"))
    assert survived.killer == ""
    assert "+    return age > 18" in survived.diff
    assert (copy.root / _MODULE).read_bytes() == _SOURCE
    text = report("seed 0", [killed, survived])
    assert "1 of 2 were killed" in text
    assert "| turret_server | 2 | 1 |" in text
    assert "age > 18" in text.partition("## Survivors")[2]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "killer"), [(_SOURCE, "mypy"), (_SOURCE + b"x: int = None\n", "")])
def test_what_only_types_refuse_is_killed_by_them_where_they_are_valid_without_it(copy, source, killer):
    (copy.root / _MODULE).write_bytes(source)
    (copy.root / "tests/server/test_ages.py").write_text("from turret_server.ages import is_adult\n")
    found = copy.judge(_mutant("return None"))
    assert found.killer == killer
    assert ('expected "bool"' in found.how) == bool(killer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("def test_broken():\n    assert False\n", "tests/server/test_ages_broken.py::test_broken"),
        ("import missing\n", "tests/server/test_ages_broken.py"),
    ],
)
def test_a_test_that_fails_without_the_mutant_as_well_kills_none(copy, text, broken):
    (copy.root / "tests/server/test_ages_broken.py").write_text(text)
    assert copy.judge(_mutant("age > 18")).killer == ""
    assert copy.clean == {broken: False}


@pytest.mark.parametrize(
    ("status", "output", "failed", "how"),
    [
        (0, "tests/a.py::test_b PASSED\n", "", ""),
        (5, "", "", ""),
        (
            1,
            "FAILED tests/a.py::test_b[1 - x] - assert 1 == 2\n",
            "tests/a.py::test_b[1 - x]",
            "assert 1 == 2",
        ),
        (2, "ERROR tests/a.py - ImportError: x\n", "tests/a.py", "ImportError: x"),
        (
            1,
            "tests/a.py::test_b PASSED\ntests/a.py::test_c Timeout (0:04:00)!\n",
            "tests/a.py::test_c",
            "hung",
        ),
        (-11, "tests/a.py::test_b Fatal Python error", "tests/a.py::test_b", "exit status -11"),
        (4, "ImportError while loading conftest", "tests/a.py", "exit status 4"),
    ],
)
def test_how_a_run_ended_is_read_from_what_pytest_says(status, output, failed, how):
    found = _read_run(status, output, ["tests/a.py"])
    assert (found.failed, found.how) == (failed, how)
