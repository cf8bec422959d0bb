"""benchmarks/gpu_check.py without a GPU: its rehearsal, and that no failure costs more than
itself."""

import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpu_check_support as support
import gpu_expectation
import pytest
import torch
from program_support import PYTHON, printed, program_at, ran
from source_support import ROOT, module_at

PROGRAM = ROOT / "benchmarks" / "gpu_check.py"

import gpu_check  # noqa: E402
from gpucheck import (  # noqa: E402
    child,
    driver,
    kernels,
    layers,
    once,
    producers,
    report,
    sanitizer,
    tools,
)
from gpucheck.record import Record, row_errors, status  # noqa: E402

from dipkernels import backends  # noqa: E402
from dipkernels.ops import registry  # noqa: E402

TOOL = """
# compute-sanitizer as it behaves: runs the command, and says last how much it has found. Its exit
# code is 9 behind a finding, but 1 where the program failed for it.
[ "$*" = --version ] && {{ echo 1.0; exit 0; }}
count=0 code=9
case "$*" in *overrun) count={found} code=1;; *race|*uninitialised) count={found};; esac
while [ "${{1#--}}" != "$1" ]; do shift 2; done
"$@"
ended=$?
echo "========= ERROR SUMMARY: $count errors"
[ $count = 0 ] || exit $code
exit $ended
"""


@pytest.fixture(autouse=True)
def support_on_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(support.__file__).parent))


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "run.json", {"rehearsal": True, "machine": {}, "sections": {}})


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A compute-sanitizer on the path that finds what is planted, or, for found=0, does not."""

    def install(found):
        program_at(tmp_path / "compute-sanitizer", TOOL.format(found=found))
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


def run(record, *names, limit_s=30.0, within_s=60.0):
    """Sections of gpu_check_support, and what the file then says of them."""
    sections = [driver.Section(name, limit_s, f"gpu_check_support:{name}") for name in names]
    driver.run(sections, record, within_s)
    return json.loads(record.path.read_text())["sections"]


def alive(mark: str) -> list[str]:
    return [line for line in printed("ps", "-eo", "args").splitlines() if mark in line]


def children_of(pid: int) -> set[int]:
    """All that it has started, and what those have."""
    lines = printed("ps", "-eo", "pid=,ppid=").splitlines()
    parents = {int(child): int(parent) for child, parent in map(str.split, lines)}
    found = {child for child, parent in parents.items() if parent == pid}
    return found.union(*(children_of(child) for child in found))


# ---- a failure costs itself ----------------------------------------------------------------------


def test_a_section_that_raises_costs_itself_alone(record):
    found = run(record, "raises", "fine")
    assert found["raises"]["status"] == "failed" and "no rows at all" in found["raises"]["error"]
    assert found["fine"]["status"] == "ok"
    assert [row["value"] for row in found["fine"]["rows"]] == [1, 2]
    code, lines = report.verdict(record.data)
    assert code == 1 and lines == ["FAILED raises: ValueError: no rows at all"]
    assert "no rows at all" in report.text(record.data)


@pytest.mark.parametrize(
    "section, word",
    [
        ("one_row_raises", "as broken"),
        ("one_row_dies", "signal 11"),
        ("falls_back", "RuntimeError: Triton cannot compile norm"),
    ],
)
def test_a_row_costs_itself_alone(record, section, word):
    found = run(record, section)[section]
    assert [row["name"] for row in found["rows"]] == ["one", "two", "three"]
    assert ["error" in row for row in found["rows"]] == [False, True, False]
    assert word in found["rows"][1]["error"]
    assert found["status"] == "failed" and report.verdict(record.data)[0] == 1


@pytest.mark.parametrize(
    "section, word",
    [
        ("loses_the_device", "as broken"),
        ("loses_the_device_in_a_variant", "as broken"),
        ("falls_back", "Triton cannot compile norm"),
    ],
)
def test_a_lost_device_or_kernel_costs_one_row(record, section, word):
    """The rows behind it run in a new process: in the old one another backend would run them."""
    rows = run(record, section)[section]["rows"]
    assert word in row_errors(rows[1])[0] and rows[2]["process"] != rows[0]["process"]


def test_a_variant_that_fails_fails_its_section(record):
    found = run(record, "half_a_row")
    assert found["half_a_row"]["status"] == "failed"
    assert report.verdict(record.data)[1] == ["FAILED half_a_row: one: torn: torn apart"]


def test_a_missing_tool_is_never_a_pass(record):
    assert run(record, "missing", "fine")["missing"]["status"] == "missing"
    assert report.verdict(record.data) == (3, ["NOT PROVEN missing: the tool is not installed"])


# ---- time ----------------------------------------------------------------------------------------


def test_a_hung_section_is_ended_with_all_its_processes_and_named(record, monkeypatch):
    end_all, seen, limits, wait = driver.end_all, [], [], subprocess.Popen.wait

    def until_it_hangs(process, timeout=None):
        if timeout is None or "hangs" not in process.args:
            return wait(process, timeout)
        limits.append(timeout)
        assert wait_for(lambda: len(children_of(process.pid)) == 2, 60)
        raise subprocess.TimeoutExpired(process.args, timeout)  # as when it has waited so long

    monkeypatch.setattr(subprocess.Popen, "wait", until_it_hangs)

    def spy(process, mark):
        before = driver.marked(mark)
        end_all(process, mark)
        seen.append((len(before), driver.marked(mark)))

    monkeypatch.setattr(driver, "end_all", spy)
    found = run(record, "hangs", "fine")
    assert len(limits) == 1 and 25 < limits[0] <= 30
    assert seen[0] == (3, [])  # the section and its children, the one in a session of its own too
    assert found["hangs"]["timed_out"] and "its limit" in found["hangs"]["rows"][1]["skipped"]
    assert found["fine"]["status"] == "ok"
    code, lines = report.verdict(record.data)
    assert code == 3 and lines[0].startswith("NOT REACHED hangs: two, three (hangs: ended after")
    assert "not reached: two, three" in report.text(record.data)


def test_the_deadline_names_what_was_not_reached(record):
    found = run(record, "takes_all_time", "fine")["takes_all_time"]
    rows = found["rows"]
    assert found["status"] == "cut short" and "elapsed_s" in rows[0]
    assert 20 < rows[0]["left"] <= 30 - driver.ROOM_S
    assert rows[-1] == {"name": "row 99", "rehearsal": True, "skipped": "no time was left"}
    code, lines = report.verdict(record.data)
    assert code == 3 and "row 99 (no time was left)" in lines[0]


def test_a_section_may_use_what_the_ones_before_left(record):
    found = run(record, "fine", "missing", limit_s=20.0)
    assert found["fine"]["limit_s"] == 20.0 and 20.0 < found["missing"]["limit_s"] <= 40.0


def test_few_sections_share_the_time_of_all():
    (alone,) = gpu_check.chosen(gpu_check.parse(["--only", "layers"]))
    assert alone.limit_s == pytest.approx(gpu_check.WITHIN_S)
    limits = [s.limit_s for s in gpu_check.chosen(gpu_check.parse(["--within", "100"]))]
    assert limits == [s.limit_s for s in gpu_check.SECTIONS]
    left = gpu_check.chosen(gpu_check.parse(["--only", "build,layers,block", "--skip", "block"]))
    assert [s.name for s in left] == ["build", "layers"]


def test_the_page_names_every_section_and_its_limit():
    page = (ROOT / "docs" / "gpu.md").read_text()
    rows = re.findall(r"^\| (\w+) \|.*\| (\d+) s \|$", page, re.MULTILINE)
    assert rows == [(s.name, f"{s.limit_s:g}") for s in (gpu_check.MACHINE, *gpu_check.SECTIONS)]


def test_the_sections_fit_their_time():
    assert sum(s.limit_s for s in gpu_check.SECTIONS) <= gpu_check.WITHIN_S
    assert gpu_check.WITHIN_S + gpu_check.MACHINE.limit_s + gpu_check.PLOT.limit_s < 570
    order = "build tests copy perturb graph block layers averaging crossover producers models"
    assert list(gpu_check.NAMES)[:11] == order.split() and gpu_check.NAMES[-1] == "sanitizer"


# ---- killed --------------------------------------------------------------------------------------

DRIVER = """
import sys; from pathlib import Path
from gpucheck import driver; from gpucheck.record import Record
record = Record(Path(sys.argv[1]), {"rehearsal": True, "machine": {}, "sections": {}})
driver.run([driver.Section(n, 60, "gpu_check_support:" + n) for n in ("fine", "counting")], record, 60)
"""


def driver_command(path, section="counting"):
    return [sys.executable, "-c", DRIVER.replace("counting", section), str(path)]


@pytest.fixture
def driver_environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'benchmarks'}:{os.environ['PYTHONPATH']}"}


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def kill_after(command, rows, rest_s, environment):
    """Start it, kill it with SIGKILL a moment after so many rows. Returns all of the rows that it
    has named."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    said = []
    for line in process.stdout:
        said.append(line)
        if len(said) > rows:
            break
    time.sleep(rest_s)
    process.kill()
    said += process.stdout.readlines()  # ends when every process that holds the pipe has gone
    process.wait()
    return re.findall(r"^(\w+): (.+)$", "".join(said), re.MULTILINE)


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 9))]
)
def test_a_killed_run_keeps_every_finished_row(tmp_path, driver_environment, seed):
    """SIGKILL at a random moment. Rows are named when they are on disk, so every name must be in
    the file."""
    dice = random.Random(seed)
    path = tmp_path / "run.json"
    moment = dice.randrange(400), dice.random() * 0.05
    named = kill_after(driver_command(path), *moment, driver_environment)
    sections = json.loads(path.read_text())["sections"]
    for section, row in named:
        if not row.startswith("ok, "):
            kept = [r for r in sections[section]["rows"] if r["name"] == row]
            assert kept and "value" in kept[0], (section, row)
    assert not alive(str(path))


def test_a_killed_run_takes_everything_with_it(tmp_path, driver_environment):
    """A child of a section in a session of its own too, though nobody is left to end it."""
    command = driver_command(tmp_path / "run.json", "hangs_at_once")
    process = subprocess.Popen(command, env=driver_environment)
    assert wait_for(lambda: len(children_of(process.pid)) >= 3, 30)
    left = children_of(process.pid)
    process.kill()
    process.wait()
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), 30)


def test_sigterm_ends_the_section_too(tmp_path):
    command = [sys.executable, str(PROGRAM), "--dry-run", "--only", "copy", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    assert wait_for(lambda: list(tmp_path.glob("*.json")), 60)
    time.sleep(0.3)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    (path,) = tmp_path.glob("*.json")
    assert not json.loads(path.read_text())["ended"]
    assert wait_for(lambda: not alive(str(path)), 30)  # whatever the driver was about to start


# ---- the rehearsal -------------------------------------------------------------------------------


def rehearse(out, *options):
    command = [PYTHON, PROGRAM, "--dry-run", "--out", out, *options]
    done = ran(*command, env={"OMP_NUM_THREADS": "1"})
    (path,) = out.glob("*.json")
    return done, json.loads(path.read_text()), path


def passed(done, record, skipped=()):
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    for name, section in record["sections"].items():
        assert section["status"] == ("skipped" if name in skipped else "ok"), (name, section)
        assert all(row["rehearsal"] for row in section["rows"]), name
    assert record["rehearsal"] and "No figure" in record["warning"] and record["ended"]


def test_the_rehearsal_passes_and_says_what_it_is(tmp_path):
    done, record, path = rehearse(tmp_path, "--only", "perturb")
    passed(done, record, set(gpu_check.NAMES) - {"perturb"})
    assert path.name.startswith("rehearsal-") and record["machine"]["torch"] == torch.__version__
    text = path.with_suffix(".txt").read_text()
    assert text.startswith("A REHEARSAL") and "P float32 64x24" in text and "cpu" in text
    assert "left out, as asked: build, tests, copy, graph" in done.stdout
    assert "the rehearsal passed" in done.stdout
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "name",
    [
        *("graph", "block", "layers", "crossover", "producers"),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("averaging", "models", "switches")),
    ],
)
def test_every_timed_section_runs(record, monkeypatch, name):
    """In this process; with Triton and in processes of their own: the whole rehearsal."""
    monkeypatch.setattr(layers.peers, "compile_backend", "eager")
    (section,) = [s for s in gpu_check.SECTIONS if s.name == name]
    check = child.Check(record, name, time.monotonic() + 100)
    module, _, function = section.target.partition(":")
    assert child.run(check, getattr(importlib.import_module(module), function)) == 0
    entry = record.section(name)
    assert entry["rows"] and status(entry) == "ok", entry
    assert all("variants" in row for row in entry["rows"])


def test_shapes_start_with_nothing_compiled(check, monkeypatch):
    """Else a later shape meets the limit of recompilations; and meeting it is an error, not eager
    mode in silence."""
    monkeypatch.setattr(layers.peers, "compile_backend", "eager")
    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    for n in (24, 40):
        layers.layer_row(check, "forward", 32, 16, n)
    assert len(resets) == 2 and torch._dynamo.config.fail_on_recompile_limit_hit


@pytest.mark.slow
def test_the_whole_rehearsal_passes(tmp_path, tool):
    tool(found=9)
    (tmp_path / "out").mkdir()
    passed(*rehearse(tmp_path / "out")[:2])


@pytest.mark.parametrize("section, code", [("one_row_raises", 1), ("missing", 3)])
def test_the_exit_code_and_the_last_lines_say_what_is_wrong(
    tmp_path, monkeypatch, capsys, section, code
):
    caches = "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"
    for name in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", *caches):
        monkeypatch.setenv(name, "")  # main sets them, for its children
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("PATH", before := os.environ["PATH"])
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    quick, copy = (
        driver.Section(name, 30, f"gpu_check_support:{function}")
        for name, function in (("machine", "fine"), ("copy", section))
    )
    monkeypatch.setattr(gpu_check, "MACHINE", quick)
    monkeypatch.setattr(gpu_check, "SECTIONS", (copy,))
    monkeypatch.setattr(gpu_check, "NAMES", ("copy",))
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path)]) == code
    assert os.environ["PATH"] == f"{tmp_path}/toolkit/bin:{before}"  # where nvcc lies
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line.startswith(("FAILED copy: two: ValueError", "NOT PROVEN copy: the tool")[code // 3])
    assert last.startswith(
        f"gpu_check: the rehearsal {('FAILED', 'is not whole')[code // 3]}; {tmp_path}"
    )


def test_no_stored_result_is_a_rehearsal():
    assert gpu_check.parse([]).out is None
    assert gpu_check.folder(gpu_check.parse(["--dry-run"])).name == "out"
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert not path.name.startswith("rehearsal")
        assert not json.loads(path.read_text()).get("rehearsal"), path


@pytest.mark.parametrize("arguments", [["--only", "copy,nothing"], ["--skip", "nothing"]])
def test_an_unknown_section_is_refused(arguments):
    done = ran(PYTHON, PROGRAM, "--dry-run", *arguments)
    assert done.returncode == 2 and "expected names out of build, tests" in done.stderr
    assert "got nothing" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = ran(PYTHON, PROGRAM, "--out", tmp_path)
    assert done.returncode == 2 and "no CUDA device" in done.stderr


def test_the_sanitizer_watches_what_tests_gpu_has_compiled(monkeypatch):
    """Else Triton would compile for most of the section's time."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU's cases are others
    kernels, linear = (module_at(f"tests/gpu/test_gpu_{name}.py") for name in ("kernels", "triton"))
    marks = kernels.test_kernels_match_reference.pytestmark
    (shapes,) = [mark.args[1] for mark in marks if mark.args[0] == "shape"]
    assert set(once.SHAPES) <= set(shapes) and once.LINEAR in linear.CASES


def test_a_section_needs_no_package_but_those_that_the_page_names():
    """torch's own aside; the page: docs/gpu.md, "It needs torch for CUDA ..."."""
    others = [
        "bayesian_torch",
        "coverage",
        "hypothesis",
        "matplotlib",
        "pandas",
        "pytest_benchmark",
    ]
    others += ["scipy", "sklearn", "tqdm", "transformers", "triton"]
    targets = [
        s.target.split(":")[0] for s in (gpu_check.MACHINE, *gpu_check.SECTIONS, gpu_check.PLOT)
    ]
    code = f"import importlib, sys\nfor name in {others}: sys.modules[name] = None\n"
    code += f"for target in {targets}: importlib.import_module(target)\n"
    printed(PYTHON, "-c", code, env={"PYTHONPATH": f"{ROOT / 'benchmarks'}{os.pathsep}{ROOT}"})


# ---- what the sections prove ---------------------------------------------------------------------


@pytest.fixture
def check(record):
    return child.Check(record, "tests", time.monotonic() + 100)


def test_a_machine_whose_nvidia_smi_fails_is_checked_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tools._driver() is None
    for script, want in (("echo 580.1; echo 580.1", "580.1"), ("echo no; exit 9", None)):
        program_at(tmp_path / "nvidia-smi", script)
        assert tools._driver() == want


def test_the_gpu_tests_are_found_where_the_user_has_no_name():
    """As in a container that runs under a number."""
    code = "import pwd, sys, pytest; pwd.getpwuid = {}.__getitem__; sys.exit(pytest.main(sys.argv[1:]))"
    command = [PYTHON, "-c", code, "--collect-only", "-q", "tests/gpu/test_gpu_noise.py"]
    done = ran(*command, without=("LOGNAME", "USER", "LNAME"))
    assert "test_words_match_known_answers" in done.stdout, done.stdout + done.stderr


def test_wrong_kernels_are_not_timed(check, monkeypatch):
    right = kernels.projection.perturb
    monkeypatch.setattr(kernels.projection, "perturb", lambda *arguments: right(*arguments) + 0.01)
    with pytest.raises(AssertionError, match="perturb: expected u within"):
        kernels.perturb_row(check, "P", torch.float32, 64, 24)


def test_a_wrong_layer_is_not_timed(check, monkeypatch):
    monkeypatch.setattr(layers.peers, "compile_backend", "eager")
    right = layers.peers.check_linear

    def wrong(name, *arguments):
        right(name, *arguments)
        if name == "dip":
            raise AssertionError("y is off")

    monkeypatch.setattr(layers.peers, "check_linear", wrong)
    variants = layers.layer_row(check, "step", 48, 16, 24)["variants"]
    assert variants.pop("dip") == {"error": "AssertionError: y is off"}
    assert not any(name.startswith("dip ") for name in variants) and "seconds" in variants["linear"]


def test_a_wrong_producer_is_not_timed(check, monkeypatch):
    producers.producer_row(check, "layer", "forward", 9, 24)
    right = registry.kernel

    def wrong(*arguments):
        dx, dweight, *rest = right("norm_bwd", "cpu")(*arguments)
        return dx, dweight + (backends.forced is None), *rest

    choose = lambda op, device: wrong if op == "norm_bwd" else right(op, device)  # noqa: E731
    monkeypatch.setattr(registry, "kernel", choose)
    producers.inputs.cache_clear()
    with pytest.raises(AssertionError, match="layer: gradient 1: expected within"):
        producers.producer_row(check, "layer", "forward", 9, 24)
    monkeypatch.setattr(registry, "kernel", right)
    row = producers.producer_row(check, "gated silu", "step", 9, 24)
    assert set(row["variants"]) == {"f", "fused", "f, P", "f, x + sigma * randn"}
    assert row["variants"]["f, P"]["ratio"] == 1


def test_a_share_of_the_copy_is_of_its_bytes_in_the_same_rounds(check, monkeypatch):
    """Q reads half of what a copy moves: as fast as the copy it has half of its rate."""
    timed = {"copy": {"seconds": 2.0, "ratio": 1.0}, "cpu": {"seconds": 2.0, "ratio": 1.0}}
    monkeypatch.setattr(kernels.timing, "interleave", lambda *a, **k: json.loads(json.dumps(timed)))
    monkeypatch.setattr(kernels, "kinds", lambda check: ("cpu",))
    for form, share in (("P", 1.0), ("Q", 0.5), ("PQ", 1.5)):
        variants = kernels.perturb_row(check, form, torch.float32, 64, 24)["variants"]
        # of two sets
        assert variants["cpu"]["share_of_copy"] == share and variants["cpu"]["seconds"] == 1.0
        assert "share_of_copy" not in variants["copy"]


TESTS = """
import os, pytest
@pytest.mark.parametrize("i", range(6))
def test_passes(i): pass
def test_skips(): pytest.skip("no reason")
def test_fails(): assert 1 == 2
def test_dies(): os._exit(3)
"""


def test_tests_run_in_parts_and_each_is_accounted_for(check):
    """In turn: the first part dies at its end, the second one has a failure."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        Path(folder, "test_some.py").write_text(TESTS)
        relative = os.path.relpath(folder, ROOT)
        assert child.run(check, lambda check: tools.tests(check, relative)) == 0
    rows = {row["name"]: row for row in check.record.section("tests")["rows"]}
    assert rows["part 1 of 2"]["error"].startswith("pytest ended with 3")
    assert rows["part 2 of 2"]["outcomes"] == {"passed": 3, "failure": 1}
    assert "assert 1 == 2" in rows["part 2 of 2"]["error"]
    assert rows["all"]["error"] == "expected 9 results, got 4"


HANGS = """
import time, pytest
@pytest.mark.parametrize("i", range(2))
def test_fails(i): assert 1 == 2
@pytest.mark.parametrize("i", range(2))
def test_hangs(i): time.sleep(600)
"""


def test_tests_for_which_time_runs_out_keep_what_they_found(check, monkeypatch):
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        Path(folder, "test_some.py").write_text(HANGS)
        rows = tools.tests(check, os.path.relpath(folder, ROOT))
        begun, start = [], tools.Shards.start

        def start_and_wait(shards):
            start(shards)
            logs = [results.with_suffix(".txt") for _, results in shards.running.values()]
            begun.append(wait_for(lambda: all("FAILED" in log.read_text() for log in logs), 60))
            check.ends = time.monotonic()

        monkeypatch.setattr(tools.Shards, "start", start_and_wait)
        check.add("part 1 of 2", rows[0][1]())
    assert begun == [True]
    found = check.record.section("tests")["rows"]
    assert {row["name"] for row in found} == {"part 1 of 2", "part 2 of 2"}
    for row in found:
        assert row["skipped"] == "no time was left" and "outcomes" not in row
        assert re.search(r"test_some.py::test_fails\[\d\] FAILED$", row["error"])


def test_results_are_read_with_the_reasons_of_skips(tmp_path):
    case = '<testcase classname="a" name="b">{}</testcase>'
    endings = "", '<skipped message="no GPU"/>', "<failure>why</failure>"
    inside = "".join(map(case.format, endings))
    (tmp_path / "r.xml").write_text(f"<testsuite>{inside}</testsuite>")
    outcomes, failures, reasons = tools.read_results(tmp_path / "r.xml")
    assert outcomes == {"passed": 1, "skipped": 1, "failure": 1}
    assert failures == ["a::b\nwhy"] and reasons == ["a::b: no GPU"]


def test_skipped_tests_prove_nothing_on_a_gpu(check):
    check.record.section("tests")["rows"] = [{"name": "part 1 of 1", "outcomes": {"skipped": 3}}]
    assert "error" not in tools._all_passed(check, 3)
    check.record.data["rehearsal"] = False
    assert "expected passing tests" in tools._all_passed(check, 3)["error"]
    assert "expected 4 results, got 3" in tools._all_passed(check, 4)["error"]


def watched(check, planted="", tool="memcheck"):
    """`echo` stands for a program that sees everything through."""
    return sanitizer.watched(check, tool, ["echo", "done", planted], bool(planted), "done")


def test_a_sanitizer_that_is_missing_or_blind_is_no_pass(check, tool, monkeypatch, tmp_path):
    tool(found=2)
    assert watched(check)["found"] == "nothing"
    for plant in ("overrun", "race"):
        assert watched(check, plant) == {"found": "the planted error"}
    tool(found=0)
    assert "expected the planted error to be found" in watched(check, "overrun")["error"]
    for code, said in ((0, "stopped early"), (0, "done"), (9, "done SUMMARY: 0 errors")):
        error = sanitizer.expect_clean(code, said, "done", "SUMMARY: 0 ")["error"]
        assert "expected no finding and all calls" in error
    (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\necho Device not supported; exit 1\n")
    assert "Device not supported" in watched(check)["missing"]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "not installed" in watched(check)["missing"]


def test_a_sanitizer_counts_no_call_that_torch_makes_to_see_what_a_driver_has(check, monkeypatch):
    """memcheck's own option, and of no other tool."""
    commands = []
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: name)
    run = lambda command, **variables: commands.append(command) or (0, "")  # noqa: E731
    monkeypatch.setattr(sanitizer, "run", run)
    for name in ("memcheck", "racecheck"):
        watched(check, tool=name)
    memcheck, racecheck = map(" ".join, commands)
    assert "--report-api-errors no" in memcheck and "--report-api-errors" not in racecheck


def test_under_torch_a_sanitizer_runs_without_the_allocator_that_hides_an_overrun(
    check, monkeypatch
):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: name)
    monkeypatch.setattr(sanitizer, "run", lambda command, **variables: (0, repr(variables)))
    rows = sanitizer.sanitizer(check)
    assert len(rows) == 2 and all("torch" in name for name, _ in rows)
    for _, call in rows:
        assert "'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'" in call()["error"]


def test_the_tables_of_expectations_are_what_their_command_writes():
    from dipkernels.ops import sizes

    page = gpu_expectation.PAGE.read_text()
    for name, make in gpu_expectation.TABLES.items():
        assert f"<!-- {name}:begin -->\n\n{make()}\n\n<!-- {name}:end -->" in page
    assert gpu_expectation.TILE_N == sizes.FUSED_COLUMNS
    assert f"`FUSED_COLUMNS = {sizes.FUSED_COLUMNS}`" in page
    # Bound by memory on an H100, by nothing known on another GPU.
    assert (
        gpu_expectation.pass_seconds("NVIDIA H100 80GB HBM3", "P", "cuda", 2**26) == 2**28 / 3.0e12
    )
    assert gpu_expectation.pass_seconds("NVIDIA A100", "P", "cuda", 2**26) is None
