"""tools/verify/mutants.py: every source file has tests that must notice a fault in it."""

import mutants
from source_support import ROOT


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
