"""The wheel and its library: what they need, carry and say; what the loader says when something is
wrong."""

import ast
import ctypes
import importlib
import json
import platform
import re
import shlex
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from program_support import PYTHON, printed, program_at, ran
from source_support import ROOT

from dipkernels import backends, gpus, library
from dipkernels.library import Library

LIBRARY = ROOT / "dipkernels" / "_C.so"
on_linux = pytest.mark.skipif(platform.system() != "Linux", reason="wheels are built on Linux")


def script(name):
    sys.path.insert(0, str(ROOT / "tools" / "release"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


audit, older_glibc = script("audit"), script("older_glibc")


# ---- the library ---------------------------------------------------------------------------------


def test_library_needs_and_exports_nothing_but_its_own():
    assert audit.library_problems(LIBRARY) == []


def test_library_asks_torch_for_functions_that_it_has():
    torch_cpu = Path(torch.__file__).parent / "lib" / audit.TORCH
    asked = {name for name in audit.undefined(LIBRARY) if audit.STABLE_ABI.fullmatch(name)}
    assert len(asked) > 20 and asked <= audit.exported(torch_cpu)


def compiled(folder, source, *flags):
    (folder / "some.c").write_text(source)
    library = folder / "some.so"
    printed("gcc", "-shared", "-fPIC", folder / "some.c", "-o", library, *flags)
    return library


@on_linux
@pytest.mark.parametrize(
    "source, problem",
    [
        (
            "void Py_Initialize(void); void dip_f(void) { Py_Initialize(); }",
            "asks for the Python symbol Py_Initialize",
        ),
        (
            "void c10_secret(void); void dip_f(void) { c10_secret(); }",
            "asks for c10_secret, which is no function of torch's stable",
        ),
        ("void mine(void) {}", "exports mine"),
        ("int deflate(); int dip_f(void) { return deflate(); }", "needs libresolv.so.2"),
        (
            'const char* dip_f(void) { return "/home/me/dipkernels/csrc/ops.cpp"; }',
            "carries the path /home/me/dipkernels/csrc/ops.cpp",
        ),
        ("void dip_f(void) {}", "does not need libtorch_cpu.so"),
    ],
)
def test_audit_finds(tmp_path, source, problem):
    flags = ["-Wl,--no-as-needed", "-l:libresolv.so.2"] if "resolv" in problem else []
    found = audit.library_problems(compiled(tmp_path, source, *flags))
    assert any(line.startswith(problem) for line in found), found


@on_linux
@pytest.mark.skipif(
    platform.libc_ver()[1] < "2.34", reason="a system of that age needs no stand-ins"
)
def test_stand_ins_link_for_an_older_glibc(tmp_path):
    source = "#include <dlfcn.h>\n#include <math.h>\ndouble dip_f(double x) { return dlopen(0, 1) ? exp(x) : 0; }"
    new = compiled(tmp_path, source, "-lm")
    assert audit.newest(new, "GLIBC") >= (2, 34)  # dlopen moved into libc
    flags = older_glibc.link_flags("gcc", tmp_path / "stand ins")
    old = compiled(tmp_path, source, *shlex.split(flags))
    assert audit.newest(old, "GLIBC") <= (2, 28)
    assert audit.honest_tag(old) == f"manylinux_2_28_{platform.machine()}"
    exp = ctypes.CDLL(str(old)).dip_f
    exp.restype, exp.argtypes = ctypes.c_double, [ctypes.c_double]
    assert abs(exp(1.0) - 2.718281828) < 1e-8


# ---- importing -----------------------------------------------------------------------------------

IMPORT = """
import json, os, sys, torch
before = set(sys.modules)
import dipkernels as dip
new = sorted(set(sys.modules) - before)
cuda = torch.cuda.is_initialized()
dip.DIPLinear(8, 4)(torch.ones(2, 8)).sum().backward()
print(json.dumps({"new": new, "cuda": cuda, "files": [f for _, _, files in os.walk(".") for f in files]}))
"""


def test_import_is_light_touches_no_gpu_and_writes_nothing(tmp_path):
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    environment |= dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(tmp_path))
    found = json.loads(printed(PYTHON, "-c", IMPORT, cwd=tmp_path, env=environment))
    # Each of these takes 0.1 to 4 s; the package's own modules together tens of milliseconds
    # (tools/release/smoke.py measures it).
    heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch._export")
    heavy += ("triton", "transformers", "trl", "peft", "lightning", "accelerate", "safetensors")
    heavy += ("matplotlib", "rich", "numpy.testing")
    late = ("integrations", "nn", "models", "training", "config", "reports")
    heavy += tuple(f"dipkernels.{name}" for name in late)  # they wait for their first use
    assert [name for name in found["new"] if name.startswith(heavy)] == []
    assert "dipkernels.ops.perturb" in found["new"]
    assert not found["cuda"] and found["files"] == []


UNPICKLE = {"pickle", "dill", "marshal", "shelve", "joblib"}
FETCH_OR_RUN = UNPICKLE | {"urllib", "requests", "http", "socket", "subprocess"}


def files_of(*folders):
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def calls_and_imports(path):
    """("load", the call) of torch.load(...), ("import", name) of every import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (("import", alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield "import", node.module.split(".")[0]
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            yield f"{owner}.{name}".lstrip("."), ast.unparse(node)


def test_nothing_is_unpickled_fetched_or_run_from_text():
    """No pickle, no download, no eval in the package; torch.load with weights_only=True
    everywhere."""
    for path in files_of("dipkernels", "triton_kernels"):
        found = list(calls_and_imports(path))
        assert {what for kind, what in found if kind == "import"} & FETCH_OR_RUN == set(), path
        assert not {kind for kind, _ in found} & {"eval", "exec", "compile", "os.system"}, path
        # Collectives of objects pickle: SECURITY.md names the two that there are.
        pickled = {call for kind, call in found if kind.endswith(("_object", "_object_list"))}
        assert pickled <= {
            "torch.distributed.all_gather_object(ranks, mine)",
            "torch.distributed.broadcast_object_list(state, src=0)",
        }, path
    for path in files_of("dipkernels", "examples", "studies", "benchmarks", "tools"):
        found = list(calls_and_imports(path))
        loads = [call for kind, call in found if kind == "torch.load"]
        assert [call for call in loads if "weights_only=True" not in call] == [], path
        assert not {what for kind, what in found if kind == "import"} & UNPICKLE, path
        assert [call for _, call in found if "allow_pickle=True" in call] == [], path


def test_building_downloads_nothing():
    """setup.py and what makes a wheel start compilers and git, and neither fetch nor install."""
    release = ROOT / "tools" / "release"
    tools = [release / f"{name}.py" for name in ("build_wheel", "audit", "older_glibc")]
    for path in [ROOT / "setup.py", *tools]:
        imports = {what for kind, what in calls_and_imports(path) if kind == "import"}
        assert imports & (FETCH_OR_RUN - {"subprocess"}) == set(), path
        assert not re.search(
            r"\b(curl|wget|git clone)\b|[\"']pip[\"'], *[\"'](install|download)", path.read_text()
        ), path
    project = (ROOT / "pyproject.toml").read_text()
    # an isolated build gets no torch
    assert re.search(r'^requires = \["setuptools>=\d+", "ninja"\]$', project, re.MULTILINE)


# ---- what the loader says ------------------------------------------------------------------------


def test_torch_too_old_is_named_before_the_library_is_loaded(fresh_library):
    fresh_library.setattr(torch, "__version__", "2.9.1+cpu")
    fresh_library.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    error = library.load().error
    assert "found torch 2.9.1+cpu" in error
    assert "needs torch >= 2.10" in error
    assert "pip install" in error
    assert "\n" not in error


def test_library_that_does_not_load_is_one_line(fresh_library, tmp_path):
    def load(path):
        cause = OSError("undefined symbol: aoti_torch_new\nmore\nlines")
        raise OSError(f"Could not load this library: {path}") from cause  # as torch does

    fresh_library.setattr(torch.ops, "load_library", load)
    error = library.load().error
    assert error.startswith("undefined symbol: aoti_torch_new: found torch")
    assert "--force-reinstall" in error
    assert "\n" not in error


ARCHS = ("80", "86", "89", "90", "100", "120")
WHEEL_12, WHEEL_13 = (
    Library("_C.so", None, ("portable",), ARCHS, "g++", version) for version in ("12.8", "13.0")
)
OLD_DRIVER = "offers CUDA {}|need CUDA {} (driver >= {})|update the driver"


@pytest.mark.parametrize(
    "library, driver, gpu, parts",
    [
        # a static runtime 12.8 runs on the first driver of CUDA 12
        (WHEEL_12, 12000, (9, 0), None),
        (WHEEL_12, 13000, (8, 7), None),  # sm_86's code runs on sm_87
        (WHEEL_12, 11080, (8, 0), OLD_DRIVER.format("11.8", "12.0", 525)),
        (WHEEL_13, 12080, (9, 0), OLD_DRIVER.format("12.8", "13.0", 580)),
        (WHEEL_12, 12080, (7, 5), "GPU 0 is sm_75|sm_80 sm_86|need sm_80 or newer"),
        # older than the PTX, and no code of its own
        (WHEEL_12, 12080, (11, 0), "GPU 0 is sm_110|DIPKERNELS_CUDA_ARCHS=110"),
        (WHEEL_12, 12080, (12, 1), None),
        (WHEEL_12, 13000, (13, 0), None),  # newer than all: from PTX
        (WHEEL_12, 12060, (13, 0), "PTX|must offer CUDA 12.8 and offers 12.6|update the driver"),
        (Library("_C.so", None, (), ("90a",), "g++", "12.8"), 12080, (9, 0), None),
    ],
)
def test_cuda_problem_names_what_was_found_needed_and_to_do(library, driver, gpu, parts):
    problem = gpus.problem_of(library, driver, [gpu])
    if parts is None:
        assert problem is None
    else:
        assert all(part in problem for part in parts.split("|")) and "\n" not in problem, problem


@pytest.fixture
def old_gpu(monkeypatch):
    """A machine whose one GPU is older than what the library was compiled for."""
    monkeypatch.setattr(library, "load", lambda: WHEEL_12)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    driver = SimpleNamespace(cuDriverGetVersion=lambda found: setattr(found._obj, "value", 12080))
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda n: driver if n == "libcuda.so.1" else load(n))
    monkeypatch.setattr(backends, "listeners", [])
    monkeypatch.setattr(backends, "_cuda_problem", None)
    return monkeypatch


@pytest.mark.parametrize("triton, runs", [(True, "triton"), (False, "reference")])
def test_gpu_without_a_kernel_falls_back_once_and_says_so(old_gpu, triton, runs):
    old_gpu.setattr(backends, "has_triton", lambda: triton)
    asked = []
    backends.listeners.append(lambda: asked.append(1))
    with pytest.warns(RuntimeWarning, match=f"{runs} runs on CUDA tensors: GPU 0 is sm_75"):
        backends.check_cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.check_cuda()
    assert len(asked) == 1  # `ops` chooses again
    plan = backends.choose("perturb", "cuda")
    assert plan.backend == runs and "sm_75" in plan.why
    old_gpu.setattr(backends, "forced", "cuda")
    with pytest.raises(RuntimeError, match=r"'cuda' was asked for.* GPU 0 is sm_75"):
        backends.choose("perturb", "cuda")


def test_gpus_of_amd_get_the_reference_and_are_told_so(old_gpu):
    """ROCm's torch calls them "cuda", and compute capability 9.0 is what some of them say."""
    old_gpu.setattr(torch.version, "hip", "7.0")
    old_gpu.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    old_gpu.setattr(backends, "has_triton", lambda: True)
    with pytest.warns(RuntimeWarning, match="reference runs on CUDA tensors: .*AMD.*ROCm"):
        backends.check_cuda()
    for op in ("perturb", "linear", "norm"):
        plan = backends.choose(op, "cuda", wide=True)
        assert plan.backend == "reference" and "ROCm" in plan.why
    assert not backends.can_fuse("cuda")
    for name in ("cuda", "triton"):
        old_gpu.setattr(backends, "forced", name)
        with pytest.raises(RuntimeError, match=f"'{name}' was asked for.*ROCm"):
            backends.choose("perturb", "cuda")


def test_the_report_shows_why_the_cuda_kernels_do_not_run(old_gpu):
    from dipkernels import env_report

    old_gpu.setattr(torch.cuda, "is_available", lambda: True)
    old_gpu.setattr(torch.cuda, "get_device_name", lambda i: "an old GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = env_report()
    assert "GPU 0 is sm_75" in report["kernels on cuda"] and report["CUDA toolkit"] == "12.8"


def test_gpus_are_looked_at_when_torch_initialises_cuda_not_before(monkeypatch):
    queued = []
    monkeypatch.setattr(library, "load", lambda: WHEEL_12)
    monkeypatch.setattr(torch.cuda, "_lazy_call", queued.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: pytest.fail("asked"))
    backends.watch_cuda()
    assert queued == [backends.check_cuda]


def test_a_torch_that_cannot_say_is_left_alone(old_gpu):
    def broken(i):
        raise RuntimeError("no driver")

    old_gpu.setattr(torch.cuda, "get_device_capability", broken)
    assert backends.check_cuda() is None


# ---- building: long ------------------------------------------------------------------------------


def build(out, *arguments):
    command = [PYTHON, ROOT / "tools" / "release" / "build_wheel.py", "--out", out, *arguments]
    printed(*command, cwd=out, umask=0o077)
    return next(out.glob("*.whl"))


def smoke(wheel, folder, expect):
    """The smoke test on the wheel alone, in a folder of its own."""
    printed(PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel)
    code = (ROOT / "tools" / "release" / "smoke.py").read_text()
    (folder.parent / "smoke.py").write_text(code)
    command = [PYTHON, folder.parent / "smoke.py", "--expect", expect]
    said = printed(*command, cwd=folder.parent, env={"PYTHONPATH": str(folder)})
    assert str(folder) in said


def test_a_wheel_is_made_by_the_toolkit_that_was_asked_for_or_not_at_all(tmp_path, monkeypatch):
    """And nvcc is found where the build finds it: in CUDA_HOME and CUDA_PATH too."""
    for folder, text in (("old", "echo Cuda release 11.9, V11.9.1"), ("broken", "exit 1")):
        (tmp_path / folder / "bin").mkdir(parents=True)
        program_at(tmp_path / folder / "bin" / "nvcc", text)
    command = [PYTHON, "tools/release/build_wheel.py", "--toolkit", "12.8", "--out", tmp_path]
    for name in ("NVCC", "PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, "")
    for variable, home, said in (
        ("CUDA_PATH", "old", "--toolkit: expected CUDA 12.8, got nvcc 11.9"),
        ("CUDA_HOME", "old", "--toolkit: expected CUDA 12.8, got nvcc 11.9"),
        ("CUDA_HOME", "broken", "NVCC: expected an nvcc that says its release"),
        ("CUDA_HOME", "none", "--cuda 1: there is no nvcc (NVCC, CUDA_HOME, CUDA_PATH, PATH)"),
        ("NVCC", "none", "NVCC: expected one command, without arguments, that is there"),
    ):
        monkeypatch.setenv(variable, str(tmp_path / home))
        done = ran(*command)
        assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.tar.gz"))


@on_linux
def test_pure_python_wheel_works_and_has_only_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    wheel = build(tmp_path, "--cpu", "0", "--cuda", "0")
    assert wheel.name.endswith("-py3-none-any.whl") and audit.wheel_problems(wheel) == []
    files = zipfile.ZipFile(wheel).infolist()
    assert {f.date_time for f in files} == {(2023, 11, 14, 22, 13, 20)}
    assert {f.external_attr >> 16 & 0o777 for f in files} <= {0o644, 0o664}  # whatever the umask
    names = {f.filename for f in files}
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "dipkernels").rglob("*.py")}
    wanted |= {
        f"dipkernels/triton_kernels/{p.name}" for p in (ROOT / "triton_kernels").glob("*.py")
    }
    assert wanted <= names
    smoke(wheel, tmp_path / "site", "none")


@on_linux
def test_audit_of_a_wheel_finds_files_that_are_not_the_packages(tmp_path):
    wheel = tmp_path / "dipkernels-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (
            "dipkernels/__init__.py",
            "dipkernels/py.typed",
            "dipkernels/triton_kernels/noise.py",
            "triton_kernels/noise.py",
            "x.pth",
        ):
            archive.writestr(name, "")
    assert audit.wheel_problems(wheel) == [
        "has the file triton_kernels/noise.py",
        "has the file x.pth",
    ]
    assert audit.main([str(wheel)]) == 1


@on_linux
@pytest.mark.slow
def test_cpu_wheel_is_honest_reproducible_and_works(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    wheel = build(first, "--cuda", "0")
    assert wheel.name.endswith(f"-py3-none-manylinux_2_28_{platform.machine()}.whl")
    smoke(wheel, tmp_path / "site", "cpu")
    assert build(second, "--cuda", "0").read_bytes() == wheel.read_bytes()
