from __future__ import annotations

from textwrap import dedent

import pytest

from mutants.covering import Covering, record
from mutants.sites import Mutant, find_sites

_MODULE = "server/turret_server/ages.py"
_SOURCE = dedent(
    """\
    def is_adult(age):
        return (
            age >=
            18
        )


    def is_old(age):
        return age > 80


    LIMIT = 1 + 2
    """
)


@pytest.fixture
def tree(tmp_path):
    files = {
        "pyproject.toml": '[tool.hatch.build]\ndev-mode-dirs = ["server"]\n',
        "pytest.ini": "[pytest]\nmarkers = slow\n",
        "server/turret_server/__init__.py": "",
        "adapters/turret_adapters/__init__.py": "",
        _MODULE: _SOURCE,
        "tests/test_adults.py": """\
            import time

            from turret_server.ages import is_adult, is_old


            def test_a_long_life():
                time.sleep(0.5)
                assert is_adult(90)
                assert is_old(90)


            def test_a_short_one():
                assert is_adult(20)
            """,
        "tests/server/test_ages.py": """\
            import time

            import pytest
            from turret_server.ages import is_adult


            @pytest.mark.parametrize("age", [20, 30])
            def test_adults(age):
                time.sleep(1)
                assert is_adult(age)
            """,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(dedent(text))
    return tmp_path


def _mutant(before, after):
    for site in find_sites(_SOURCE.encode()):
        if _SOURCE[site.start : site.end] == before and after in site.variants:
            return Mutant(_MODULE, site, site.variants.index(after))
    raise AssertionError(before)


@pytest.mark.slow
def test_a_mutant_s_tests_are_those_that_run_its_statement(tree):
    record(tree, tree / "record")
    covering = Covering(tree, tree / "record")
    adults = [f"tests/server/test_ages.py::test_adults[{age}]" for age in (20, 30)]
    short, long = "tests/test_adults.py::test_a_short_one", "tests/test_adults.py::test_a_long_life"

    first_by_time = covering.tests(_mutant(">=", ">"), [])
    assert first_by_time[:2] == [short, long]
    assert sorted(first_by_time[2:]) == adults
    assert sorted(covering.tests(_mutant(">=", ">"), ["tests/server/test_ages.py"])[:2]) == adults
    assert covering.tests(_mutant(">", ">="), []) == [long]
    assert covering.tests(_mutant("+", "-"), []) == []


@pytest.mark.slow
def test_a_record_needs_tests_that_run(tree):
    (tree / "tests" / "test_broken.py").write_text("def test_broken():\n    assert False\n")
    record(tree, tree / "record")
    (tree / "pytest.ini").write_text("[pytest]\naddopts = --unknown\n")
    with pytest.raises(RuntimeError, match="pytest ended with status 4 without a mutant"):
        record(tree, tree / "other")
