"""The documents keep to the code: tests they name exist, variables they list are the ones read,
README's Python runs."""

import dataclasses
import json
import re

import pytest
from source_support import ROOT

from dipkernels import DIPConfig

MATHS = (ROOT / "docs" / "maths.md").read_text()
SOURCES = [
    path
    for folder, patterns in {
        "dipkernels": ["*.py"],
        "triton_kernels": ["*.py"],
        "csrc": ["*.h", "*.cpp", "*.cu"],
    }.items()
    for pattern in patterns
    for path in (ROOT / folder).rglob(pattern)
] + [ROOT / "setup.py"]


def test_pages_name_tests_that_exist():
    """By name, by file, and by `file -k word`."""
    defined = {
        path.name: re.findall(r"def (test_\w+)", path.read_text())
        for path in (ROOT / "tests").rglob("*.py")
    }
    every = {name for names in defined.values() for name in names}
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        page = path.read_text()
        assert set(re.findall(r"`(test_\w+)`", page)) <= every, path
        assert set(re.findall(r"\btest_\w+\.py\b", page)) <= defined.keys(), path
        for file, word in re.findall(r"(test_\w+\.py) -k (\w+)", page):
            assert any(word in name for name in defined[file]), (path, file, word)
    assert len(set(re.findall(r"`(test_\w+)`", MATHS))) > 20


def test_code_cites_sections_that_exist():
    sections = set(re.findall(r"^## (\d+)\.", MATHS, re.MULTILINE))
    for path in SOURCES:
        for cited in re.findall(r"maths\.md, sections? ([\d, and]+)", path.read_text()):
            assert set(re.findall(r"\d+", cited)) <= sections, path


def test_environment_lists_every_variable():
    listed = set(re.findall(r"DIPKERNELS_[A-Z_]+", (ROOT / "docs" / "environment.md").read_text()))
    read = set(
        re.findall(r"[\"'](DIPKERNELS_[A-Z_]+)[\"']", "\n".join(p.read_text() for p in SOURCES))
    )
    assert read == listed


def test_trainers_guide_lists_every_field_of_the_config():
    page = (ROOT / "docs" / "guides" / "trainers.md").read_text()
    table = page.split("## DIPConfig")[1].split("\n\n")[1]
    listed = [
        name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(DIPConfig))


@pytest.mark.parametrize(
    "block", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
)
def test_readme_python_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_nothing_names_a_machine():
    """No absolute path of a developer's machine stands in what is published."""
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *SOURCES]:
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp)/", path.read_text()), path


def test_faults_are_planted_in_every_compiled_kernel_of_today():
    page = (ROOT / "docs" / "reliability.md").read_text()
    triton = [path.read_text() for path in (ROOT / "triton_kernels").glob("*.py")]
    kernels = re.findall(r"^def (\w+_kernel)\(", "\n".join(triton), re.MULTILINE)
    cuda = (ROOT / "csrc" / "cuda" / "perturb.cu").read_text()
    kernels += re.findall(r"(\w+_kernel)\(const \w+ p\) \{", cuda)
    assert len(kernels) > 10
    assert set(re.findall(r"^\| (?:CUDA|Triton): (\w+) \|", page, re.MULTILINE)) == set(kernels)


def test_readme_says_the_least_and_the_most_that_a_step_takes():
    readme = " ".join((ROOT / "README.md").read_text().split())
    words = {
        "intel-amx": "{} times the plain step on an Intel Xeon with AMX",
        "intel-avx512": "and {} without; on an AMD",
        "amd-avx512": "on an AMD CPU {} with AVX-512",
        "amd-avx2": "and {} without. m noisy passes",
    }
    for kind, said in words.items():
        page = ROOT / "docs" / ("measured_intel.md" if "intel" in kind else "measured.md")
        # of a Xeon without AMX there are two
        tables = re.findall(
            rf"<!-- models-{kind}[a-z0-9-]*:begin -->(.*?)<!-- models-", page.read_text(), re.DOTALL
        )
        rows = [row.split("|") for row in "".join(tables).splitlines() if " ms " in row]
        ratios = [float(cell.split()[0]) for row in rows for cell in row[4:6]]  # dip; producer
        assert said.format(f"{min(ratios):.2f} to {max(ratios):.2f}") in readme, kind


def test_readme_figures_are_those_of_the_record():
    """Of the tables between marks tests/test_benchmarks.py says so."""
    record = json.loads((ROOT / "benchmarks" / "results" / "amd-0.1.0.json").read_text())
    text = (ROOT / "README.md").read_text()
    for study in record["cost"]["studies"]:
        one, four = (f"{study['training'][f'm = {m}']['ratio']:.2f}" for m in (1, 4))
        assert re.search(rf"{one} times (the plain step )?with m = 1; {four} with m = 4", text), (
            study["name"]
        )
