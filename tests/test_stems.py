"""One stem per operation: every operation has its files in every place, and imports point one way."""

import ast
from pathlib import Path

import pytest

from dipkernels import functional, ops, reference

ROOT = Path(__file__).parent.parent
STEMS = {
    "noise": ["csrc/noise.h", "triton_kernels/noise.py", "tests/test_noise.py"],
    "perturb": ["csrc/cpu/perturb.cpp", "csrc/cuda/perturb.cu", "triton_kernels/perturb.py", "tests/test_perturb.py"],
    "linear": [
        "dipkernels/row_blocks.py",
        "triton_kernels/linear.py",
        "tests/test_linear.py",
        "tests/test_averaging.py",
    ],
    "activation": ["csrc/cpu/activation.cpp", "triton_kernels/activation.py", "tests/test_activation.py"],
}
# A module may import the ones before it, never one after.
ORDER = [
    "worlds",
    "reference",
    "backends",
    "row_blocks",
    "ops",
    "tensor_parallel",
    "expectation",
    "functional",
    "tracing",
    "seeds",
    "decay",
    "inputs",
    "layers",
]
ORDER += ["distributed", "attention", "convertible", "probe", "check", "convert"]
ORDER += ["analytic", "trajectories", "diagnostics", "certify", "objective", "tune", "config", "reports"]
ORDER += ["env_report"]


@pytest.mark.parametrize("stem", STEMS)
def test_stems_have_their_files(stem):
    missing = [path for path in STEMS[stem] if not (ROOT / path).exists()]
    assert not missing


def test_stems_of_operations_are_known():
    assert {name.split("_")[0] for name in ops.SCHEMAS} <= set(STEMS)
    for name in ops.SCHEMAS:
        assert callable(getattr(ops, name)) and callable(getattr(reference, name))
    assert callable(functional.noise) and callable(functional.perturb) and callable(functional.dip_linear)


def relative_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_one_way(module):
    allowed = {*ORDER[: ORDER.index(module)], "triton_kernels"}
    if module == "env_report":
        allowed.add("__version__")
    if module == "config":
        allowed.add("integrations")  # in a function, for models of PEFT alone
    imported = set(relative_imports(ROOT / "dipkernels" / f"{module}.py"))
    assert imported <= allowed
    if module == "reference":
        assert not imported
    if module in ("trajectories", "diagnostics", "objective", "convert"):
        assert "ops" not in imported


def test_every_module_is_placed():
    modules = {p.stem for p in (ROOT / "dipkernels").glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(ORDER)
