"""One stem per operation: every operation has its files in every place, and imports point one
way."""

import ast
import importlib
import re

import pytest
from source_support import ROOT

import dipkernels as dip
from dipkernels import functional, reference
from dipkernels.ops import expectation, gate, linear, norm, perturb, registry

STEMS = {
    "noise": ["csrc/noise.h", "triton_kernels/noise.py"],
    "perturb": ["csrc/cpu/perturb.cpp", "csrc/cuda/perturb.cu", "triton_kernels/perturb.py"],
    "linear": ["dipkernels/ops/row_blocks.py", "triton_kernels/linear.py"],
    "gate": ["csrc/cpu/gate.cpp", "triton_kernels/gate.py"],
    "norm": ["csrc/cpu/norm.cpp", "triton_kernels/norm.py"],
    "expectation": ["csrc/cpu/expectation.cpp", "triton_kernels/expectation.py"],
}
PRODUCERS = ["tests/test_producers.py"]
TESTS = {"gate": PRODUCERS, "norm": PRODUCERS}
TESTS["linear"] = ["tests/test_linear.py", "tests/test_averaging.py"]
# A module may import the ones before it, never one after.
ROWS = """
arguments worlds reference library gpus backends
ops: draw activations pieces sizes registry dtensor perturb row_blocks linear conv expectation gate norm
functional producers
noise: contexts guards seeds
nn: wrappers decay variance inputs tracing layer sharing linear conv input twin norm activation numbering
nn: attention
distributed
models: patterns convertible naming loose_weights weight_readers refused marks probe choose readers gated
models: forms place check spreads parameters summary calibrate
models: convert
training: analytic trajectories predict objective certify
reports
training: tune
diagnostics config testing
integrations: parts peft
integrations.transformers: trl pretrained trainer callback
integrations: lightning accelerate
env_report
"""
ORDER = []
for row in ROWS.split("\n")[1:-1]:
    room, _, modules = row.rpartition(": ")
    ORDER += [f"{room}.{module}".lstrip(".") for module in modules.split()]
ROOMS = ("ops", "noise", "nn", "models", "training", "integrations")


@pytest.mark.parametrize("stem", STEMS)
def test_stems_have_their_files(stem):
    tests = TESTS.get(stem, [f"tests/test_{stem}.py"])
    missing = [path for path in STEMS[stem] + tests if not (ROOT / path).exists()]
    assert not missing


def test_stems_of_operations_are_known():
    for name in registry.SCHEMAS:
        stem = name.removesuffix("_bwd")
        assert any(
            callable(getattr(module, stem, None))
            for module in (perturb, linear, expectation, gate, norm)
        ), name
        assert callable(getattr(reference, name))
    assert callable(functional.noise)
    assert callable(functional.perturb)
    assert callable(functional.dip_linear)


def test_contributing_names_every_file_that_lists_an_operation():
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    steps = contributing.partition("## To add an operation")[2].partition("\n## ")[0]
    sources = [
        *(ROOT / "csrc").rglob("*.*"),
        ROOT / "setup.py",
        ROOT / "dipkernels/ops/__init__.py",
    ]
    lists = [
        path.relative_to(ROOT).as_posix().replace("gate", "<stem>")
        for path in sources
        if re.search(r'gate_op|\bgate_cpu|\(gate,|"gate"|import gate', path.read_text())
    ]
    assert len(lists) > 4
    assert not [path for path in lists if f"`{path}`" not in steps]


def path_of(module):
    return ROOT / "dipkernels" / f"{module.replace('.', '/')}.py"


def relative_imports(module):
    """The modules of the package that this one imports when it runs, by the names in ORDER."""
    package, tree = module.split(".")[:-1], ast.parse(path_of(module).read_text())
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if not (isinstance(node, ast.ImportFrom) and node.level):
            continue
        base = ".".join(
            [*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])]
        )
        for alias in node.names:
            name = f"{base}.{alias.name}".lstrip(".")
            yield name if name in ORDER else base


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_one_way(module):
    allowed = {*ORDER[: ORDER.index(module)], "triton_kernels.mixtures"}
    if module == "env_report":
        allowed.add("")
    if module == "config":
        allowed.add("integrations.peft")  # in a function, for models of PEFT alone
    imported = set(relative_imports(module))
    assert imported <= allowed
    if module == "reference":
        assert not imported


def test_no_module_imports_a_private_name_of_another():
    for module in ORDER:
        for node in ast.walk(ast.parse(path_of(module).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert not [
                    alias.name
                    for alias in node.names
                    if alias.name.startswith("_") and alias.name != "__version__"
                ]


def test_every_module_is_placed():
    folder = ROOT / "dipkernels"
    modules = {
        p.relative_to(folder).with_suffix("").as_posix().replace("/", ".")
        for p in folder.rglob("*.py")
    }
    assert {m for m in modules if not m.split(".")[-1].startswith("__")} == set(ORDER)
    assert {p.parent.name for p in folder.glob("*/__init__.py")} == set(ROOMS)


def test_public_names_are_those_of_their_modules():
    for name in dip.__all__:
        value = getattr(dip, name)
        home = dip._HOME.get(name)
        assert home is None or value is getattr(importlib.import_module(f"dipkernels.{home}"), name)
    assert set(dip.__all__) <= set(dir(dip))
    with pytest.raises(AttributeError, match="module 'dipkernels' has no attribute 'convrt'"):
        dip.convrt  # noqa: B018
