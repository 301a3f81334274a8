from __future__ import annotations

from collections import Counter
from pathlib import Path
from textwrap import dedent

import pytest

from mutants.mirrors import PACKAGES, draw, modules, stages
from mutants.sites import Mutant, find_sites

_ROOT = Path(__file__).resolve().parents[2]


def _mutants(source, kind):
    code = dedent(source).encode()
    sites = [site for site in find_sites(code) if site.kind == kind]
    return [
        Mutant("x.py", site, variant).apply(code).decode()
        for site in sites
        for variant in range(len(site.variants))
    ]


@pytest.mark.parametrize(
    ("kind", "source", "mutants"),
    [
        ("comparison", "(a) < (b)", ["(a) <= (b)", "(a) >= (b)"]),
        ("comparison", "a is not b", ["a is b"]),
        ("and/or", "a and b and c", ["a or b and c", "a and b or c"]),
        (
            "dropped operand",
            "x = (a or b) and c",
            ["x = ((a or b))", "x = ((c))", "x = (((a))) and c", "x = (((b))) and c"],
        ),
        ("not", "x = not a.b", ["x = (a.b)"]),
        ("condition", "if a.b: pass", ["if (not (a.b)): pass"]),
        ("arithmetic", "x = 'größe', a * (b)", ["x = 'größe', a // (b)"]),
        ("arithmetic", "x -= a", ["x += a"]),
        ("constant", "x = f(0.5, True)", ["x = f(1.5, True)", "x = f(-0.5, True)", "x = f(0.5, False)"]),
        ("comparison", "time.time() - a < b", ["time.time() - a >= b"]),
        ("comparison", "a <= now", ["a > now"]),
        ("constant", "A_SECONDS = 5.0", ["A_SECONDS = 6.0", "A_SECONDS = 4.0"]),
        ("dropped keyword", "x = f(a, b=(1), c=2)", ["x = f(a, c=2)", "x = f(a, b=(1), )"]),
        ("dropped keyword", "x = Thread(target=a, name='b')", ["x = Thread(name='b')"]),
        ("dropped device", "x = torch.ones(a, device=b, dtype=c)", ["x = torch.ones(a, dtype=c)"]),
        ("dropped device", "x = a.to(b, non_blocking=c)", ["x = a.to(b, )"]),
        ("dropped statement", "await a.b()", ["pass"]),
        ("dropped statement", "a.b = c\nd = e", ["pass\nd = e"]),
        ("dropped wrapper", "x = await shield(a)", ["x = await (a)"]),
        ("opposite function", "x = min(a, b)", ["x = max(a, b)"]),
        ("return None", "def f():\n    return a", ["def f():\n    return None"]),
        ("default argument", "def f(a=''): pass", ['def f(a="mutant"): pass']),
        (
            "dropped decorator",
            "@property\n@a(1)\ndef f(): pass",
            ["@a(1)\ndef f(): pass", "@property\ndef f(): pass"],
        ),
        (
            "dropped context manager",
            "with a, b() as c: pass",
            [
                'with __import__("contextlib").nullcontext(), b() as c: pass',
                'with a, __import__("contextlib").nullcontext(b()) as c: pass',
            ],
        ),
        (
            "exception type",
            "try: pass\nexcept (A, b.C): raise D(1) from None",
            [
                "try: pass\nexcept (BufferError, b.C): raise D(1) from None",
                "try: pass\nexcept (A, BufferError): raise D(1) from None",
                "try: pass\nexcept (A, b.C): raise RuntimeError(1) from None",
            ],
        ),
        ("swapped statements", "a.b()\n# why\nc = 1\nd = c", ["c = 1\n# why\na.b()\nd = c"]),
        ("swapped statements", "a.set()\nb.set(c)", ["b.set(c)\na.set()"]),
        ("swapped statements", "a.inc()\na.set(b)", ["a.set(b)\na.inc()"]),
        ("swapped statements", "a.inc()\nb.end(c)", ["b.end(c)\na.inc()"]),
        ("swapped statements", "super().__init__()\nself.a = b()", ["self.a = b()\nsuper().__init__()"]),
    ],
)
def test_each_kind_of_mutation_changes_its_span_and_nothing_else(kind, source, mutants):
    assert _mutants(source, kind) == mutants


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring: 1 < 2."""',
        'raise_(f"{a + 1}")',
        "x: int | None",
        "def f(a: X | Y) -> A | B: pass",
        '__all__ = ["a", "b"][1:]',
        "from a import b",
        "assert a < 1",
        '_log.info("loaded", extra={"n": a + 1})',
        "_log_pages(a, 1)",
        "@dataclass(frozen=True)\nclass A: pass",
        "for a, b in zip(c, d, strict=True): pass",
        'if __name__ == "__main__": main(1)',
        "if TYPE_CHECKING: x = 1",
        "@lru_cache(maxsize=8)\ndef f(): pass",
        "def _prefetch_rows(a): f(a, 0, b=1)",
        "prefetch_line(a, 0, b + 1)",
        "prefetch_ahead = a + 1",
        "def _warm_up(self): a(1, (2, 3))",
        "A_SECONDS = 6.0",
        "def check_integrity(self):\n    a = b + 1",
    ],
)
def test_what_no_test_should_depend_on_is_left_alone(source):
    assert [site for site in find_sites(source.encode()) if site.kind != "dropped statement"] == []


@pytest.mark.parametrize(
    "source",
    [
        "a = b()\nc.d = e()",
        "a = b()\na.c()",
        "a()\nlog.info('x')",
        "a()\n_log_pages(b)",
        "'text'\na()",
        "a.set(b)\nc.labels(d).inc()",
        "prefetch_line(a, b)\na.c()",
        "super().__init__(a)\nself.b = b",
    ],
)
def test_statements_whose_order_cannot_matter_are_not_swapped(source):
    assert _mutants(source, "swapped statements") == []


def test_every_mutant_of_a_module_of_ours_is_python():
    for path in ("server/turret_server/errors.py", "adapters/turret_adapters/formats/fields.py"):
        source = (_ROOT / path).read_bytes()
        for site in find_sites(source):
            for variant in range(len(site.variants)):
                mutated = Mutant(path, site, variant).apply(source)
                compile(mutated, path, "exec")
                assert mutated != source


def test_a_draw_is_the_seed_s_and_uniform_over_the_sites(tmp_path):
    package = tmp_path / "server" / "turret_server"
    package.mkdir(parents=True)
    (package / "few.py").write_text("x = a < b\n")
    (package / "many.py").write_text("x = a < b\n" * 3)

    def files(seed):
        mutants, num_sites = draw(tmp_path, ["server"], count=2, seed=seed, gpu=False)
        assert num_sites == 4
        return [mutant.path for mutant in mutants]

    assert files(7) == files(7)
    counts = Counter(path for seed in range(200) for path in files(seed))
    assert 60 < counts["server/turret_server/few.py"] < 140


def test_the_devices_of_tensors_are_drawn_with_what_a_gpu_runs(tmp_path):
    kernels = tmp_path / "server" / "turret_server" / "kernels"
    for name, source in (("ops.py", "x = torch.ones(a, device=b)\n"), ("gpu/nf4.py", "x = f(a, b=c)\n")):
        (kernels / name).parent.mkdir(parents=True, exist_ok=True)
        (kernels / name).write_text(source)
    assert draw(tmp_path, ["server"], count=9, seed=0, gpu=False) == ([], 0)
    mutants, num_sites = draw(tmp_path, ["server"], count=9, seed=0, gpu=True)
    assert num_sites == 2
    assert {mutant.site.kind for mutant in mutants} == {"dropped device", "dropped keyword"}


def test_generated_files_are_no_modules_and_gpus_have_a_class_of_their_own(tmp_path):
    kernels = tmp_path / "server" / "turret_server" / "kernels"
    for folder in ("gpu", "cpu"):
        (kernels / folder).mkdir(parents=True)
        (kernels / folder / "nf4.py").write_text("x = 1\n")
    (kernels / "table.py").write_text("# Generated by make proto. DO NOT EDIT.\nx = 1\n")
    assert modules(tmp_path, ["server"], gpu=False) == ["server/turret_server/kernels/cpu/nf4.py"]
    assert modules(tmp_path, ["server"], gpu=True) == ["server/turret_server/kernels/gpu/nf4.py"]


def test_the_nearest_tests_run_first_and_each_file_once(tmp_path):
    for name in (
        "server/engine/test_loop.py",
        "server/engine/test_loop_cancel.py",
        "server/engine/test_pacing.py",
        "server/test_errors.py",
        "simulation/test_loads.py",
        "service/test_drain.py",
        "service/test_engine_faults.py",
    ):
        file = tmp_path / "tests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert list(stages(tmp_path, "server/turret_server/engine/loop.py")) == [
        ["tests/server/engine/test_loop.py", "tests/server/engine/test_loop_cancel.py"],
        ["tests/server/engine/test_pacing.py"],
        [
            "tests/service/test_engine_faults.py",
            "tests/simulation/test_loads.py",
            "tests/service/test_drain.py",
        ],
    ]
    # A module and a folder without tests of their own: the tests of the folder above.
    nearest, folder, _ = stages(tmp_path, "server/turret_server/engine/kv/pages.py")
    assert (nearest, folder[0]) == ([], "tests/server/engine/test_loop.py")


def test_every_module_has_tests():
    for gpu in (False, True):
        for module in modules(_ROOT, [], gpu=gpu):
            found = list(stages(_ROOT, module))
            assert any(found), module
            assert all((_ROOT / file).is_file() for stage in found for file in stage)
    assert all((_ROOT / tests).is_dir() for tests in PACKAGES.values())
