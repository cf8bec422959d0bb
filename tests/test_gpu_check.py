"""benchmarks/gpu_check.py, as far as it runs without a GPU: its code on the CPU, and what it does with a failure."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_support
import pytest
import torch

PROGRAM = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.py"


@pytest.fixture
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


def test_dry_run_passes_every_section(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--dry-run", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert {name: result["status"] for name, result in record["sections"].items()} == {
        "build": "skipped", "tests": "ok", "sanitizer": "ok", "copy_bandwidth": "ok",
        "perturb": "ok", "layers": "ok", "averaging": "ok", "graph": "ok", "crossover": "ok", "block": "ok",
    }  # fmt: skip
    assert record["machine"]["torch"] == torch.__version__ and record["machine"]["date"]
    assert "dip cpu" in path.with_suffix(".txt").read_text()


def test_the_page_of_expectations_is_what_its_command_writes():
    from dipkernels import backends

    expectation = cuda_support.gpu_expectation
    assert expectation.PAGE.read_text() == expectation.page()
    assert expectation.TILE_N == backends.FUSED_COLUMNS


def test_a_failing_section_is_recorded_and_the_others_run(gpu_check, monkeypatch):
    def broken(check):
        raise RuntimeError("as broken as it gets")

    def half_broken(check):
        variants = {"fine": lambda i: None, "torn": broken}
        return {"variants": gpu_check.summarize(gpu_check.interleaved(check, variants, 0.1), "fine")}

    monkeypatch.setattr(gpu_check, "SECTIONS", [("a", 5, broken), ("b", 5, half_broken), ("c", 5, lambda check: {})])
    record = gpu_check.run(gpu_check.Check(True, torch.device("cpu")))
    assert [result["status"] for result in record["sections"].values()] == ["failed", "failed", "ok"]
    assert "as broken" in record["sections"]["a"]["error"] and "torn" in record["sections"]["b"]["error"]
    assert "as broken" in gpu_check.summary(record)


def test_a_check_fails_where_the_kernels_are_wrong(gpu_check, monkeypatch):
    from dipkernels import ops

    right = ops.perturb
    monkeypatch.setattr(ops, "perturb", lambda *arguments: right(*arguments) + 0.01)
    check = gpu_check.Check(True, torch.device("cpu"))
    check.section_ends = check.started + 60
    with pytest.raises(AssertionError, match="perturb is off"):
        gpu_check.perturb(check)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr
