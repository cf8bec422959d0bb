"""tools/verify/mutations.py: each kind of fault is found in the syntax, what holds no computation
is left alone; every source file has tests that must notice."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools" / "verify"))
import mutants  # noqa: E402
import mutations  # noqa: E402

PYTHON = {
    "y = a + b": {"y = a - b", "y = (a)", "y = (b)"},
    "y = -a": {"y = a"},
    "y = a @ b": {"y = ((b) @ (a))"},
    "y = a < b <= c": {"y = a <= b <= c", "y = a < b < c"},
    "y = x[i]": {"y = x[0]"},
    "y = x[1:n]": {"y = x[1 + 1:n]", "y = x[1:n - 1]"},
    "y = a & m": {"y = a | m", "y = (a)", "y = (m)"},
    "y = f(a, k=2)": {"y = f(a)", "y = f(a, k=3)"},
    "y = min(a, b)": set(),
    "y = f(a, b)": {"y = f(b, a)"},
    "y = fma(a, b, c)": {"y = fma(a, c, b)"},
    "y = a and not b": {"y = ((not b))", "y = ((a))", "y = a and (b)"},
    "y += a": {"y = a", "y -= a", "pass"},
    "x.y = a": {"pass"},
    "f()": {"pass"},
    "for i in range(n): pass": {"for i in range(n - 1): pass"},
    "if a: raise ValueError(b + c)": {"if False: raise ValueError(b + c)"},
    "if a: y = b": {"if False: y = b", "if True: y = b"},
    "y = 0xFF": {"y = 0xfe"},
    "y = True": {"y = False"},
    "y = 2.0": {"y = 2.02"},
    "y: Tensor | None = a": set(),
    "assert a + b": set(),
    "'a' + b": set(),
    "warn(a + b)": set(),
    "y = 'ä' * (a - b)": {"y = 'ä' * (a + b)", "y = 'ä' * ((a))", "y = 'ä' * (((b) - (a)))"},
}

CPP = {
    "y = a + b(c, d);": {"y = a - b(c, d);", "y = a;", "y = a + b(d, c);", ";"},
    "y = -a;": {"y = a;", ";"},
    "if (i < n) y += z[i];": {
        "if (i <= n) y += z[i];",
        "if (false) y += z[i];",
        "if (true) y += z[i];",
        "if (i < n) y = z[i];",
        "if (i < n) y -= z[i];",
        "if (i < n) y += z[0];",
        "if (i < n) y += z[i + 1];",
    },
    "float z[8];": set(),
    "constexpr int kTile = 64;": set(),
    "template <int N = 3>": set(),
    "static_assert(a < b);": set(),
    "// y = a + b": set(),
    '#define A (b + c)\nreport("a + b");': {"#define A (b + c)\n;"},
    "const float* x = y;": set(),
    "return x >> 3 & 0x7u;": {
        "return x << 3 & 0x7u;",
        "return x >> 4 & 0x7u;",
        "return x >> 3 | 0x7u;",
        "return x >> 3 & 0x6u;",
    },
    "void f(int a, float b);": set(),
    "return smaller(a, b);": set(),
    "return a <= b || c >= d;": {
        "return a < b || c >= d;",
        "return a <= b && c >= d;",
        "return a <= b || c > d;",
    },
    "return !a && b;": {"return a && b;", "return !a || b;"},
    "return 0.5f * x;": {"return 0.505f * x;", "return 0.5f;"},
}


def mutated(tmp_path, name, source):
    path = tmp_path / name
    path.write_text(source, encoding="utf-8")
    return {m.applied(source) for m in mutations.mutations(path)}


@pytest.mark.parametrize("source", PYTHON)
def test_faults_of_python(tmp_path, source):
    inside = f"def g():\n    {source}\n"
    got = mutated(tmp_path, "a.py", inside)
    assert got == {f"def g():\n    {after}\n" for after in PYTHON[source]}
    for text in got:
        ast.parse(text)


@pytest.mark.parametrize("source", CPP)
def test_faults_of_cpp(tmp_path, source):
    before, after = "void g() {\n", "\n}\n"
    got = mutated(tmp_path, "a.cpp", before + source + after)
    assert got == {before + text + after for text in CPP[source]}


def test_every_source_file_has_tests_that_must_notice():
    found = {path.relative_to(ROOT).as_posix(): tests for path, tests in mutants.areas(ROOT)}
    folders = {"dipkernels": "*.py", "triton_kernels": "*.py", "csrc": "*.[hc]*"}
    sources = {
        p.relative_to(ROOT).as_posix()
        for name, glob in folders.items()
        for p in (ROOT / name).rglob(glob)
    }
    assert {name for name in sources if not name.endswith(".pyc")} - found.keys() <= set(
        mutants.LEFT_OUT
    )
    assert not set(mutants.LEFT_OUT) & found.keys()
    assert [name for name, tests in found.items() if not tests] == []
    for test in {test for tests in found.values() for test in tests if "::" in test}:
        file, name = test.split("::")
        assert f"class {name}:" in (ROOT / file).read_text(), test
