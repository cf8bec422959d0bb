"""env_report: complete, printable, and never the thing that fails."""

import os
import re
import runpy
import sys

import fresh_support
import pytest
import torch
from program_support import PYTHON, ran
from source_support import ROOT

from dipkernels import backends, library
from dipkernels.env_report import env_report

MODULE = sys.modules["dipkernels.env_report"]


def test_the_report_names_versions_kernels_and_threads():
    report = env_report()
    assert report["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()
    assert {
        "dipkernels",
        "python",
        "triton",
        "numpy",
        "library",
        "kernels on cpu",
        "kernels on cuda",
        "environment",
    } <= set(report)
    assert all(name in str(report) for name in report)


def test_the_report_shows_the_variables_that_are_set(monkeypatch):
    """Those that nothing reads by name, such as a mistyped one."""
    listed = (ROOT / "docs" / "environment.md").read_text()
    for name in set(re.findall(r"^\|.*?`(DIPKERNELS_\w+)`", listed, re.MULTILINE)):
        monkeypatch.setenv(name, "")
    assert "bad variables" not in env_report()
    monkeypatch.setenv("DIPKERNELS_BACKND", "7")
    report = env_report()
    assert report["environment"]["DIPKERNELS_BACKND"] == "7"
    assert "DIPKERNELS_BACKND=7" in str(report)
    (problem,) = report["bad variables"]
    assert problem.startswith("DIPKERNELS_BACKND: expected DIPKERNELS_ and one of ('CPU',")


def test_a_loaded_library_shows_what_it_carries(monkeypatch):
    found = library.Library("/x/_C.so", None, ("portable", "avx2"), ("90",), "g++ 1")
    monkeypatch.setattr(library, "load", lambda: found)
    monkeypatch.setattr(library, "cpu_capability", lambda: "avx2")
    text = str(env_report())
    assert all(word in text for word in ("/x/_C.so", "portable, avx2", "90", "g++ 1"))


def test_a_missing_library_is_said_in_words(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: library.Library(error="it was not built"))
    assert env_report()["library"] == "not loaded: it was not built"


def test_the_report_survives_a_broken_installation(monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(library, "load", broken)
    monkeypatch.setattr(backends, "choose", broken)
    report = env_report()
    assert report["library"] == report["kernels on cpu"] == "RuntimeError: broken"
    assert MODULE._version("no-such-package-here") == "not installed"


def test_a_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a GPU")
    report = env_report()
    assert report["CUDA devices"] == ["a GPU"]
    assert "(" in report["kernels on cuda"]


@pytest.mark.parametrize(
    "triton, runs",
    [(True, "triton (only Triton fuses"), (False, "reference (the CUDA library has no kernel")],
)
def test_an_operation_that_runs_elsewhere_is_shown(monkeypatch, triton, runs):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(
        library, "load", lambda: library.Library("_C.so", None, ("portable",), ("90",), "g++")
    )
    monkeypatch.setattr(library, "cpu_capability", lambda: "portable")
    monkeypatch.setattr(backends, "has_triton", lambda: triton)
    report = env_report()
    assert report["kernels on cuda"].startswith("cuda (")
    assert report["expectation on cuda"].startswith(runs)
    assert "expectation on cpu" not in report
    monkeypatch.setattr(backends, "forced", "cuda")
    assert "has no kernel for it; use 'triton'" in env_report()["expectation on cuda"]


@pytest.mark.parametrize(
    "variable, value, says",
    [
        ("DIPKERNELS_BACKEND", b"\xff\xfe", r"got '\udcff\udcfe'"),
        (
            "DIPKERNELS_COMPILED_KEEP",
            "both",
            "DIPKERNELS_COMPILED_KEEP: expected one of ('x', 'u', 'bytes'), got 'both'",
        ),
        ("DIPKERNELS_CPU_CAPABILITY", "sse9", "DIPKERNELS_CPU_CAPABILITY: expected one of"),
        ("DIPKERNELS_CPU", "on", "DIPKERNELS_CPU: expected one of ('0', '1'), got 'on'"),
        (
            "DIPKERNELS_AUTOTUNE",
            "yes",
            "DIPKERNELS_AUTOTUNE: expected one of ('0', '1'), got 'yes'",
        ),
        ("PYTHONPATH", "a Triton that does not load", "which does not load: ImportError: broken"),
    ],
)
def test_python_m_reports_a_broken_set_up(variable, value, says, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("DIPKERNELS")]:
        monkeypatch.delenv(name)
    if variable != "PYTHONPATH":
        code = "import runpy; runpy.run_module('dipkernels', run_name='__main__')"
        given = {variable: os.fsdecode(value)}
        status, output = fresh_support.run(code, tmp_path / "output", **given)
    else:  # what the start of Python reads
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('broken')")
        value = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        done = ran(PYTHON, "-m", "dipkernels", env={variable: value})
        status, output = done.returncode, done.stdout + done.stderr
    assert status == 0, output
    assert says in output and "environment" in output


def test_python_m_prints_the_report(capsys):
    runpy.run_module("dipkernels", run_name="__main__")
    assert torch.__version__ in capsys.readouterr().out
