"""The benchmarks run, check what they time, list what is missing, write what they say. No figure is
judged."""

import contextlib
import json
import platform
import re
import sys
import time
import types

import averaging
import cost
import machine
import models
import networks
import overhead
import peers
import producers as bench_producers
import profile_model
import profile_small_layer
import pytest
import report
import summary
import timing
import torch
from program_support import PYTHON, printed
from source_support import ROOT

import dipkernels as dip
from dipkernels import reference
from dipkernels.nn.layer import DIPLayer

pytestmark = pytest.mark.usefixtures("threads")


def run_quick(tmp_path, *options):
    out = tmp_path / "run.json"
    given = ["--quick", "--threads=1", "--dtypes", "float32", "--out"]
    return out, overhead.main([*given, str(out), *options])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run_quick(tmp_path_factory.mktemp("overhead"))


@pytest.mark.parametrize(
    "some",
    [
        # of the whole models that torch.compile traces, one
        ("-k", "not (model_step and compiled and not MLP)"),
        pytest.param((), marks=pytest.mark.slow),
    ],
    ids=["most", "all"],
)
def test_every_benchmark_runs(some, tmp_path):
    out = tmp_path / "bench.json"
    options = ["-q", "--quick", "--threads=1", f"--benchmark-json={out}", "-p", "no:cacheprovider"]
    # pytest-benchmark stores nothing inside a worker of pytest-xdist.
    printed(PYTHON, "-m", "pytest", "benchmarks", *options, *some, without="PYTEST_XDIST")
    stored = json.loads(out.read_text())
    groups = {bench["group"].split(",")[0] for bench in stored["benchmarks"]}
    wanted = "noise, perturb, perturb backward, layer forward, layer training step, "
    wanted += "block training step, model training step, S = 64 averaged, m = 8 trajectories"
    assert set(wanted.split(", ")) <= groups
    for bench in stored["benchmarks"]:
        assert {"cpu", "torch", "commit", "date", "variant"} <= set(bench["extra_info"])
    timed = {bench["extra_info"]["variant"] for bench in stored["benchmarks"]}
    assert set(peers.NAMES) <= timed | set(stored["missing_peers"])


def test_benchmark_only_among_the_tests_names_the_folder(request):
    assert request.config.getoption("benchmark_only") is False
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    config = types.SimpleNamespace(getoption=lambda name, default: name == "benchmark_only")
    with pytest.raises(pytest.UsageError, match="python -m pytest benchmarks"):
        conftest.pytest_configure(config)


def test_overhead_writes_what_it_measured(quick):
    out, record = quick
    assert out.with_suffix(".svg").stat().st_size > 1000
    stored = json.loads(out.read_text())
    assert {"date", "commit", "cpu", "threads", "torch"} <= set(stored["machine"])
    assert {row["section"] for row in stored["rows"]} == {"linear", "perturb", "samples", "small"}
    rows = [row for row in stored["rows"] if row["section"] == "linear" and "saved_bytes" in row]
    ours, plain = (
        next(row for row in rows if row["variant"] == name) for name in ("dip", "linear")
    )
    assert plain["saved_bytes"] < ours["saved_bytes"] <= plain["saved_bytes"] + 64  # the seed
    assert ours["quartiles"][0] <= ours["ratio"] <= ours["quartiles"][1]
    printed = overhead.text(record)
    assert "48x64x32" in printed and "GB/s" in printed and "nan" not in printed


def test_overhead_compares_with_an_earlier_run(quick, tmp_path, capsys):
    out, record = quick
    earlier = json.loads(out.read_text())
    row = next(row for row in earlier["rows"] if row["variant"] == "dip")
    row["ratio"], row["quartiles"] = row["ratio"] * 100, [value * 100 for value in row["quartiles"]]
    lines = report.moved(record, earlier)
    assert sum(line.startswith("faster") for line in lines) == 1
    assert sum(line.startswith("slower") for line in lines) == 0
    count = sum("ratio" in row for row in record["rows"])
    assert report.moved(record, record) == [f"{count} rows moved within their spread"]
    overhead.main(["--from", str(out), "--against", str(out)])
    assert "rows moved within their spread" in capsys.readouterr().out


def test_a_model_whose_outputs_are_no_numbers_is_not_timed():
    model = peers.build("dip", torch.nn.Linear(8, 8))
    torch.nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(AssertionError, match=r"output: expected within .* got nan"):
        peers.check_converted(model, torch.ones(4, 8))


def test_overhead_times_nothing_that_is_wrong(monkeypatch, tmp_path):
    right = reference.standard_normal
    monkeypatch.setattr(
        reference, "standard_normal", lambda *args, **kwargs: -right(*args, **kwargs)
    )
    with pytest.raises(AssertionError, match="y: expected within"):
        run_quick(tmp_path)
    assert not list(tmp_path.iterdir())


def test_overhead_lists_a_missing_peer(monkeypatch):
    monkeypatch.setitem(sys.modules, "bayesian_torch.layers", None)
    missing = peers.build("flipout", torch.nn.Linear(8, 8))
    assert isinstance(missing, peers.Missing) and "pip install" in missing.reason
    run = overhead.Run(torch.device("cpu"), True)
    monkeypatch.setattr(overhead, "LAYERS", ("linear", "dip", "flipout"))
    overhead.linear_case(run, torch.float32, (8, 8, 8))
    assert [row["missing"] for row in run.rows if row["variant"] == "flipout"] == [
        missing.reason
    ] * 2
    assert "flipout: bayesian-torch is not installed" in overhead._missing(run.rows)


@pytest.mark.parametrize("case", [*models.CASES, *networks.MODELS["quick"]], ids=str)
def test_the_eager_peer_has_noise_where_dip_has(case):
    with torch.device("meta"):
        plain = case.make()
        ours = [m for m in peers.build("dip", plain).modules() if isinstance(m, DIPLayer)]
        eager = peers.build("eager", plain).modules()
    assert len(ours) == sum(isinstance(m, peers.EagerNoise) for m in eager) > 0


def test_interleaving_gives_ratios_within_rounds(monkeypatch):
    slowness = iter(range(1, 1000))  # the machine slows down from call to call
    clock = {"base": 1.0, "double": 2.0, "slow": 9.0}

    def seconds(call, times, device, which):
        return clock[call()] * (1 + 1e-4 * next(slowness))

    monkeypatch.setattr(timing, "seconds", seconds)
    calls = {name: lambda name=name: name for name in clock} | {"broken": lambda: 1 / 0}
    options = {"rounds": (9, 9), "always": ("double",), "seldom": 4}
    timed = timing.interleave(calls, "base", torch.device("cpu"), **options)
    assert timed["base"]["ratio"] == 1.0
    assert timed["double"]["ratio"] == pytest.approx(2, rel=1e-3)
    assert timed["slow"]["ratio"] == pytest.approx(9, rel=1e-3)
    assert (timed["double"]["rounds"], timed["slow"]["rounds"]) == (9, 3)
    assert timed["broken"]["error"].startswith("ZeroDivisionError")


def test_a_short_call_follows_an_untimed_one(monkeypatch):
    """Calls that no clock sees: three at the start, and of a short variant one more before each
    turn."""
    calls, timed = {"short": 0, "long": 0}, {"short": 0, "long": 0}

    def call(name):
        calls[name] += 1

    def seconds(call, times, device, which):
        name = call.__name__
        timed[name] += times
        for _ in range(times):
            call()
        return {"short": 1e-3, "long": 1.0}[name]

    variants = {name: lambda name=name: call(name) for name in calls}
    for name, variant in variants.items():
        variant.__name__ = name
    monkeypatch.setattr(timing, "seconds", seconds)
    timing.interleave(
        variants, "short", torch.device("cpu"), budget_s=0, rounds=(5, 5), always=("long",)
    )
    assert calls["short"] - timed["short"] == 3 + 5
    assert calls["long"] - timed["long"] == 3


@pytest.mark.slow
def test_memory_stays_in_place(tmp_path):
    """A program that restarts gets the same memory for every tensor, without a page fault; one that
    may not restart does not."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import resource, sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import torch, machine\n"
        "machine.restart_in_place()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "places = set()\n"
        "for _ in range(12):\n"
        "    before, seed = faults(), torch.randint(9, (2,))\n"
        "    tensors = [torch.empty(size << 20, dtype=torch.uint8).fill_(1) for size in (8, 8, "
        "64)]\n"
        "    places.add(tuple(tensor.data_ptr() for tensor in tensors))\n"
        "    del tensors\n"
        "print(sys.argv[1], len(places), faults() - before)\n"
    )
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc's allocator")
    command = PYTHON, script, "argument"
    assert printed(*command, without="GLIBC_TUNABLES").split() == ["argument", "1", "0"]
    assert int(printed(*command, env={"GLIBC_TUNABLES": ""}).split()[2]) > 0


def test_a_call_within_a_context_is_timed_inside_it_and_enters_it_once():
    entered, ran = [], []

    @contextlib.contextmanager
    def context():
        entered.append(1)
        yield

    timing.seconds(timing.Within(context, lambda: ran.append(1)), 5, torch.device("cpu"))
    assert len(entered) == 1 and len(ran) == 5


def test_inputs_take_turns():
    seen = []
    call = timing.rotate(lambda a, b: seen.append((a, b)), [1, 2], [3, 4])
    for _ in range(3):
        call()
    assert seen == [(1, 3), (2, 4), (1, 3)]
    with pytest.raises(ValueError, match="shorter"):
        timing.rotate(print, [1, 2], [3])()


def test_a_graph_holds_a_call_for_each_input_and_keeps_every_result(monkeypatch):
    """On a stand-in for torch.cuda: warm first, then one capture of all; replaying launches nothing
    else."""
    log = []
    cuda = types.SimpleNamespace(
        Stream=lambda: types.SimpleNamespace(wait_stream=lambda other: log.append("wait")),
        current_stream=lambda: types.SimpleNamespace(wait_stream=lambda other: log.append("wait")),
        stream=lambda side: contextlib.nullcontext(),
        CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: log.append("replay")),
        graph=lambda graph: contextlib.nullcontext(log.append("capture")),
    )
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    call = timing.captured(lambda x: log.append(x) or [x], [1, 2, 3], device=torch.device("cuda"))
    assert log == ["wait", 1, 2, 1, 2, "wait", "capture", 1, 2, 3]
    del log[:]
    assert call() == [[1], [2], [3]] and log == ["replay"]


def test_enough_inputs_exceed_the_cache(monkeypatch):
    device = torch.device("cuda")
    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    sets = {size: timing.sets_beyond_cache(size << 20, device) for size in (1, 8, 128)}
    assert sets == {1: 64, 8: 19, 128: 2}  # 1 MiB: as many as are allowed, which do not


def test_memory_counts_what_a_call_holds():
    x = torch.ones(1000, requires_grad=True)
    assert timing.saved_bytes(lambda: (x * 2).exp(), [x]) == 4000
    assert timing.saved_bytes(lambda: x * x, [x]) == 0
    assert (
        timing.peak_bytes(lambda: torch.ones(1000) + torch.ones(1000), torch.device("cpu")) == 12000
    )


def test_peak_of_a_step_counts_its_gradients():
    x, dy, cpu = torch.ones(1000, requires_grad=True), torch.ones(1000), torch.device("cpu")
    step = timing.backward_step(lambda: x * 2, dy, [x])
    assert 8000 <= timing.peak_bytes(step, cpu) < 8100  # y and dx
    assert x.grad is None

    # the profiler knows the size of what it saw allocated
    with torch.profiler.profile(profile_memory=True):
        gradients = [torch.ones(1000), torch.ones(1000)]  # for the first call and the measured one
    with pytest.raises(ValueError, match=r"call: expected one that frees nothing .* 4000 bytes"):
        timing.peak_bytes(gradients.pop, cpu)


def test_peak_is_asked_for_again_where_the_profiler_returns_nothing(monkeypatch):
    from torch import profiler

    real, asked = profiler.profile, []

    class Empty(real):
        def __exit__(self, *error):
            super().__exit__(*error)
            asked.append(self)
            if len(asked) == 1:
                self.profiler.kineto_results = types.SimpleNamespace(events=lambda: [])

    monkeypatch.setattr(profiler, "profile", Empty)
    assert timing.peak_bytes(lambda: torch.ones(1000), torch.device("cpu")) == 4000
    assert len(asked) == 2


def test_documents_are_filled_between_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n")
    for _ in range(2):
        report.fill(page, "a", "new")
        assert page.read_text() == "before\n<!-- a:begin -->\n\nnew\n\n<!-- a:end -->\nafter\n"
    with pytest.raises(ValueError, match=r"page\.md: expected one line '<!-- b:begin -->'"):
        report.fill(page, "b", "new")
    marks = "overhead-cpu small-layer averaging models-amd-avx512 models-amd-avx2 producers"
    for mark in [*marks.split(), "profile-model", "models-compiled-amd-avx512"]:
        assert report.has_place(report.page_of({"cpu": "AMD EPYC"}), mark)
    marks = marks.replace(
        "models-amd-avx512 models-amd-avx2", "models-intel-amx models-intel-avx512"
    )
    for mark in [*marks.split(), "profile-model"]:
        assert report.has_place(report.page_of({"cpu": "Intel(R) Xeon(R)"}), mark)
    assert report.has_place(ROOT / "README.md", "models-intel-amx")
    assert report.has_place(ROOT / "docs" / "cost.md", "cost")


OF_INTEL = [("intel", "measured_intel", program) for program in ("overhead", "models")]


@pytest.mark.parametrize(
    "kind, page, program",
    [
        ("amd", "measured", "overhead"),
        ("amd", "measured", "models"),
        ("amd", "measured", "models-compiled"),
        ("amd", "cost", "cost"),
        *OF_INTEL,
    ],
)
def test_tables_of_a_page_are_those_of_the_record(kind, page, program):
    """Every figure between the marks comes from the release's record, which git keeps; the runs it
    does not."""
    (path,) = (ROOT / "benchmarks" / "results").glob(f"{kind}-*.json")
    run = report.load(path, program)
    texts = {"overhead": overhead.text, "cost": cost.text}
    texts["models"] = texts["models-compiled"] = lambda run: models.table(run["rows"])
    assert texts[program](run) in (ROOT / "docs" / f"{page}.md").read_text()
    if (kind, program) == ("amd", "overhead"):
        assert overhead.short_text(run) in (ROOT / "README.md").read_text()
    if (kind, program) == ("intel", "models"):
        assert texts[program](run) in (ROOT / "README.md").read_text()


def rows_of(program, run):
    """The cells of the rows that a page shows of a run."""
    if program == "averaging":
        return [*run["analytic"], *run["mean"]]
    if program == "producers":
        names = ("dtype", "shape", "kind", "what")
        return [[*(row[n] for n in names), *bench_producers.cells(row)] for row in run["rows"]]
    return [[*row[:3], f"{row[3]:.1f}", row[4]] for row in run["layers"]]


@pytest.mark.parametrize(
    "kind, page, program",
    [("amd", "measured", "averaging")]
    + [("intel", "measured_intel", name) for name in ("averaging", "producers", "small-layer")],
)
def test_rows_of_a_page_are_those_of_the_record(kind, page, program):
    (path,) = (ROOT / "benchmarks" / "results").glob(f"{kind}-*.json")
    run, text = report.load(path, program), (ROOT / "docs" / f"{page}.md").read_text()
    text = re.sub(" +", " ", text.split(f"<!-- {program}:begin -->")[1].split("<!--")[0])
    assert machine.sentence(run["machine"]) in text
    for row in rows_of(program, run):
        assert re.sub(" +", " ", f"| {' | '.join(row)} |") in text


def test_records_are_small_and_whole(tmp_path, quick):
    out, _ = quick
    runs = []
    for number in range(3):
        run = json.loads(out.read_text()) | {"quick": False}
        run["machine"] = run["machine"] | {
            "date": f"2026-01-0{number + 1}T00:00:00+00:00",
            "cpu": "AMD EPYC",
        }
        for row in run["rows"]:
            if "ratio" in row:
                row["ratio"] *= number + 1
        runs.append(tmp_path / f"{number}.json")
        runs[-1].write_text(json.dumps(run))
    only_linear = json.loads(runs[2].read_text())
    only_linear["rows"] = [row for row in only_linear["rows"] if row["section"] == "linear"]
    only_linear["machine"]["date"] = "2026-01-04"
    (tmp_path / "part.json").write_text(json.dumps(only_linear))
    path = summary.main(
        [*map(str, runs), str(tmp_path / "part.json"), "--out", str(tmp_path / "record.json")]
    )
    found = json.loads(path.read_text())
    assert (found["release"], found["kind"]) == (dip.__version__, "amd")
    # the newest of the whole runs
    assert found["overhead"]["machine"]["date"].startswith("2026-01-03")
    ratios = found["overhead, run by run"]["ratios"]
    first, second, third, part = next(ratios[key] for key in ratios if key.startswith("linear"))
    assert second == pytest.approx(2 * first, rel=1e-2) and third == part
    assert next(ratios[key] for key in ratios if key.startswith("small"))[3] is None
    # a row a line
    assert len(path.read_text().splitlines()) < len(found["overhead"]["rows"]) + len(ratios) + 40
    whole = json.loads(runs[2].read_text())
    # of its digits: rounding 404.95 twice may give another last one
    assert overhead.text(report.load(path, "overhead")) == overhead.text(summary.rounded(whole))
    assert overhead.text(report.load(runs[2], "overhead")) == overhead.text(whole)
    with pytest.raises(ValueError, match=r"record\.json: expected a run of cost, found release"):
        report.load(path, "cost")


@pytest.mark.parametrize(
    "best, flags, expected",
    [
        ("AVX512", "avx512f amx_bf16 amx_tile", "AMX"),
        ("AVX512", "avx512f", "AVX512"),
        ("AVX2", "avx512f amx_bf16 amx_tile", "AVX2"),  # ATEN_CPU_CAPABILITY=avx2
    ],
)
def test_a_machine_is_told_by_what_torch_uses_of_it(best, flags, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: best)
    monkeypatch.setattr(machine, "_processor", lambda: {"model name": "P", "flags": flags})
    assert machine.describe("cpu")["instruction_set"] == expected


def test_records_refuse_what_means_nothing(quick):
    _, record = quick
    with pytest.raises(ValueError, match="expected full runs"):
        summary.summarise([record])
    full = [
        record | {"quick": False, "machine": record["machine"] | {"cpu": cpu}}
        for cpu in ("AMD EPYC", "Intel Xeon")
    ]
    with pytest.raises(ValueError, match="one kind of machine, got amd, intel"):
        summary.summarise(full)
    with pytest.raises(ValueError, match="expected a processor of amd, intel, arm"):
        machine.kind_of({"cpu": "abacus"})
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA GeForce RTX 4090": "rtx4090"}
    names["NVIDIA A100-SXM4-80GB"] = "a100"
    assert {name: machine.kind_of({"gpu": name, "cpu": ""}) for name in names} == names
    told = {"name": "P", "traceback": "long", "said": "much"}
    told["variants"] = {"copy": {"seconds": 1.23456789}}
    here = {"gpu": "H100", "date": "1", "cpu": ""}
    run = {"program": "gpu_check", "machine": here, "sections": {"perturb": {"rows": [told]}}}
    (row,) = summary.summarise([run])["gpu_check"]["sections"]["perturb"]["rows"]
    assert row == {"name": "P", "variants": {"copy": {"seconds": 1.23457}}}


@pytest.mark.slow
def test_cost_study_runs(tmp_path):
    out = tmp_path / "cost.json"
    record = cost.main(["--quick", "--threads=1", "--out", str(out)])
    for name in ("training", "prediction", "buys"):
        assert (tmp_path / f"cost_{name}.svg").stat().st_size > 1000
    for study in record["studies"]:
        training, prediction = study["training"], study["prediction"]
        plain = prediction["plain"]
        assert training["m = 4"]["flops"] > 3 * training["plain"]["flops"]
        assert prediction["k = 4"]["flops"] == 4 * plain["flops"]
        for figure in ("flops", "peak_bytes"):
            assert prediction["k = 0"][figure] == plain[figure]


def test_profile_of_a_small_layer_runs(tmp_path, capsys):
    out = tmp_path / "small.json"
    rows = profile_small_layer.main(["--quick", "--threads=1", "--out", str(out)])
    stored = json.loads(out.read_text())
    assert stored["program"] == "small-layer" and stored["parts"] == rows
    assert {row[1] for row in rows} == {"forward", "backward"}
    assert "op P: dispatcher and kernel" in capsys.readouterr().out


@pytest.mark.slow
def test_averaging_is_timed(tmp_path, monkeypatch):
    few = {name: averaging.ACTIVATIONS[name] for name in ("relu", "gelu")}
    monkeypatch.setattr(averaging, "ACTIVATIONS", few)
    for size, value in (("M", 8), ("K", 64), ("N", 64)):
        monkeypatch.setattr(averaging, size, value)
    monkeypatch.setattr(averaging, "WIDE", [(16, 32, 128, 2)])
    out = tmp_path / "averaging.json"
    options = ["--rounds", "2", "--threads", "1", "--dtypes", "float32", "--out"]
    analytic, mean = averaging.main([*options, str(out)])
    stored = json.loads(out.read_text())
    assert stored["program"] == "averaging" and stored["mean"] == mean
    assert [row[1] for row in analytic] == ["relu", "gelu"]
    standard, wide = "8 x 64 x 64", "16 x 32 x 128"
    expected = [(standard, "8", "relu"), (standard, "8", "gelu"), (wide, "2", "gelu")]
    assert [(row[0], row[1], row[3]) for row in mean] == expected
    assert [float(row[6]) for row in mean] == [1.0] * 3  # kept for backward: x and h, as one draw


def test_whole_models_are_timed_with_noise_at_the_input_and_in_the_producer(
    tmp_path, capsys, monkeypatch
):
    out = tmp_path / "models.json"
    options = ["--quick", "--rounds=2", "--threads=1", "--dtypes=float32", "--only=MLP", "--out"]
    here = machine.describe("cpu")
    monkeypatch.setattr(machine, "describe", lambda device: here | {"cpu": "abacus"})
    rows = models.main([*options, str(out)])
    assert [row["variant"] for row in rows] == list(models.VARIANTS)
    assert all(row["ratio"] > 0 for row in rows)
    assert json.loads(out.read_text())["program"] == "models"
    monkeypatch.setattr(peers, "compile_backend", "eager")
    rows = models.main([*options, str(out), "--compiled"])
    assert [row["variant"] for row in rows] == list(models.COMPILED)
    assert json.loads(out.read_text())["program"] == "models-compiled"
    assert "| plain, compiled |" in capsys.readouterr().out
    monkeypatch.setattr(machine, "describe", lambda device: here | {"instruction_set": "SVE"})
    with pytest.raises(SystemExit):
        models.main(["--docs"])
    assert "--docs: expected a place for this kind of processor" in capsys.readouterr().err


@pytest.mark.parametrize(
    "program, options, expected",
    [
        (overhead, "--quick", "a full run"),
        (cost, "--quick", "a full run"),
        (bench_producers, "--quick", "a full run"),
        (profile_small_layer, "--quick", "a full run"),
        (models, "--quick", "a full run"),
        (averaging, "--rounds 4", "a full run"),
        (averaging, "--skip mean", "a full run"),
        (models, "--dtypes float32", "a full run"),
        (bench_producers, "--shapes 8x8", "a full run"),
        (overhead, "--shapes 8x8x8", "a full run"),
        (profile_model, "--rounds 1", "a full run of at least 5 rounds"),
    ],
)
def test_documents_get_no_figures_of_a_part(program, options, expected, capsys):
    with pytest.raises(SystemExit):
        program.main([*options.split(), "--docs"])
    assert f"--docs: expected {expected}" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["4x4", "0x1x1", "axbxc"])
def test_overhead_refuses_a_bad_shape(argument, capsys):
    with pytest.raises(SystemExit):
        overhead.main(["--shapes", argument])
    assert "--shapes" in capsys.readouterr().err


def test_producers_benchmark_checks_times_and_prints(tmp_path, capsys):
    out = tmp_path / "producers.json"
    options = ["--quick", "--clock", "processor", "--dtypes", "float32", "--only", "rms"]
    rows = bench_producers.main([*options, "gated silu", "--out", str(out)])
    assert json.loads(out.read_text())["program"] == "producers"
    assert [(row["kind"], row["what"]) for row in rows] == [
        (kind, what) for kind in ("rms", "gated silu") for what in ("forward", "forward + backward")
    ]
    assert all("ratio" in row[name] for row in rows for name in ("f", "P", "f, P", "fused"))
    shown = capsys.readouterr().out
    assert "over the slower of f, P" in shown and "processor time" in shown


def test_a_models_profile_counts_every_operation_once():
    """A step's own times add up to the outermost spans and the gaps between them."""
    span = lambda name, start, end: types.SimpleNamespace(  # noqa: E731
        name=lambda: name, start_ns=lambda: start, duration_ns=lambda: end - start
    )
    spans = [span("a", 0, 10), span("b", 2, 5), span("c", 3, 4), span("[memory]", 3, 3)]
    got = profile_model.own_times([*spans, span("d", 14, 20)])
    assert got == [["a", 7], ["b", 2], ["c", 1], [profile_model.HOST, 4], ["d", 6]]


def test_a_models_profile_names_the_noise(capsys):
    # all rows: which are the largest is a matter of time
    totals = profile_model.main(["--quick", "--only", "ViT", "--rounds", "1", "--rows", "1000"])
    assert totals["dip, producer"]["dipkernels::norm"][1] == 3
    assert totals["dip"]["dipkernels::norm"][1] == 0 == totals["linear"]["dipkernels::perturb"][1]
    assert "dipkernels::norm" in capsys.readouterr().out


def test_processor_time_does_not_count_waiting():
    """The least of several: a thread of an earlier product may still spin in the first one."""
    wait, device = lambda: time.sleep(0.02), torch.device("cpu")
    assert timing.seconds(wait, 1, device) >= 0.02
    assert min(timing.seconds(wait, 1, device, "processor") for _ in range(10)) < 0.005
