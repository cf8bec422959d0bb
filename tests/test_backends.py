"""Choosing: pure, printable, forceable, and loud where what was asked for is missing."""

import functools
import importlib.metadata
import re
import sys
import warnings
from types import SimpleNamespace

import fresh_support
import pytest
import torch
from program_support import needs, printed, program_at
from source_support import ROOT

from dipkernels import backend, backends, env_report, functional, library
from dipkernels.backends import Plan, choose
from dipkernels.library import Library
from dipkernels.ops import registry, sizes
from dipkernels.ops.linear import device_of

SEED = torch.tensor([1, 2])
CSRC = ROOT / "csrc"


@pytest.fixture(autouse=True)
def _choices():
    """What a test chose for another installation is forgotten."""
    yield
    registry.choose_all()


def with_library(monkeypatch, **fields):
    found = Library(
        **{"path": "library.so", "cpu_capabilities": ("portable",), "cuda_archs": ("90",), **fields}
    )
    monkeypatch.setattr(library, "load", lambda: found)


def test_choose_prefers_compiled_kernels(monkeypatch):
    with_library(monkeypatch)
    assert choose("perturb", "cpu").backend == "cpu"
    assert choose("perturb", "cuda").backend == "cuda"
    assert choose("perturb", "xpu").backend == "reference"


def test_choose_falls_back_in_order(monkeypatch):
    with_library(monkeypatch, path=None, cpu_capabilities=(), cuda_archs=(), error="not built")
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    assert choose("perturb", "cuda") == Plan("triton", "the library has no CUDA kernels")
    assert choose("perturb", "cpu") == Plan("reference", "not built")
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert choose("perturb", "cuda").backend == "reference"
    with_library(monkeypatch, cpu_capabilities=())
    assert "built without CPU kernels: DIPKERNELS_CPU=1" in choose("perturb", "cpu").why


def test_what_the_cuda_library_lacks_runs_elsewhere(monkeypatch):
    """Of every operation: a kernel in csrc/ for CUDA, one made of other operations, or Triton."""
    found = "".join(path.read_text() for path in CSRC.glob("*_op.cpp"))
    blocks = re.findall(r"_IMPL\(dipkernels, CUDA, m\) \{(.*?)\n\}", found, re.DOTALL)
    carried = set(re.findall(r'm\.impl\("(\w+)"', "".join(blocks)))
    assert {"perturb", "perturb_bwd"} <= carried < registry.SCHEMAS.keys()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    with_library(monkeypatch)
    for op in registry.SCHEMAS:
        made_of_others = has_kernel(f"dipkernels::{op}", "CompositeExplicitAutograd")
        for triton, runs in ((True, "triton"), (False, "reference")):
            monkeypatch.setattr(backends, "has_triton", lambda triton=triton: triton)
            wanted = ("cuda",) if op in carried else (runs, "cuda") if made_of_others else (runs,)
            assert choose(op, "cuda").backend in wanted, op
        if not (op in carried or made_of_others):
            monkeypatch.setattr(backends, "forced", "cuda")
            with pytest.raises(RuntimeError, match="it has no kernel for it; use 'triton'"):
                choose(op, "cuda")
            monkeypatch.setattr(backends, "forced", None)


def test_backend_forces_and_restores():
    want = functional.noise((3, 8), SEED)
    with backend("reference"):
        assert choose("noise", "cpu") == Plan("reference", "asked for")
        assert (functional.noise((3, 8), SEED) - want).abs().max() < 4e-6
        with backend("auto"):
            assert choose("noise", "cpu").backend == "cpu"
        assert choose("noise", "cpu").backend == "reference"
    assert choose("noise", "cpu").backend == "cpu"
    backend("reference")
    assert choose("noise", "cpu").backend == "reference"
    backend("auto")
    assert torch.equal(functional.noise((3, 8), SEED), want)


def test_backend_rejects_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match="backend: expected one of"):
        backend("tpu")
    with_library(monkeypatch, cuda_archs=())
    with pytest.raises(RuntimeError, match="built without CUDA"):
        backend("cuda")
    with_library(monkeypatch, error="it does not load")
    with pytest.raises(RuntimeError, match="it does not load"):
        backend("cpu")
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        backend("triton")


def test_backend_that_cannot_run_on_a_device_raises(monkeypatch):
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        backend("triton"),
        pytest.raises(
            RuntimeError, match="'triton' was asked for, and it cannot run on device 'cpu'"
        ),
    ):
        functional.noise((3, 8), SEED)


def test_reference_path_says_so(monkeypatch):
    with_library(monkeypatch, error="not built")
    with pytest.warns(RuntimeWarning, match="the slow reference path runs: not built"):
        backends.warn_reference()
    with warnings.catch_warnings(), backend("reference"):
        warnings.simplefilter("error")
        backends.warn_reference()


@pytest.fixture
def run_python(tmp_path):
    return functools.partial(fresh_support.run, output=tmp_path / "output")


LAYER = "import dipkernels as d, torch; d.DIPLinear(2, 2)(torch.ones(1, 2))"


@pytest.mark.parametrize(
    "variable, value, code, expected",
    [
        ("BACKEND", "reference", "print(b.choose('noise', 'cpu').why)", "asked for"),
        ("COMPILED_KEEP", "u", "print(b.kept_when_compiled * 3)", "uuu"),
        (
            "COMPILED_KEEP",
            "both",
            LAYER,
            "DIPKERNELS_COMPILED_KEEP: expected one of ('x', 'u', 'bytes')",
        ),
        ("CPU_CAPABILITY", "portable", "print(b.library.cpu_capability())", "portable"),
        (
            "CPU_CAPABILITY",
            "sse9",
            "b.library.cpu_capability()",
            "expected one of ('portable', 'avx2', 'avx512', 'auto') that this machine has, got 'sse9'; unset it",
        ),
        ("CPU_CAPABILITY", "sse9", LAYER, "DIPKERNELS_CPU_CAPABILITY: expected"),
    ],
)
def test_environment_decides_and_errors_name_the_variable(
    run_python, variable, value, code, expected
):
    code = f"import torch, dipkernels.backends as b; {code}"
    status, output = run_python(code, **{f"DIPKERNELS_{variable}": value})
    assert expected in output and (status != 0) == ("expected" in expected)


DISPATCH = """
#include <cstdio>
#include <cstdlib>
#include "launch.h"
#include "cpu/dispatch.h"
namespace dip {
#define KERNEL(op, Args, name) \\
  const char* op##_##name(const Args&, ParallelFor) { return #name; }
#define KERNELS(name) \\
  KERNEL(perturb, PerturbArgs, name) KERNEL(expectation, ExpectationArgs, name) \\
  KERNEL(variance, VarianceArgs, name) KERNEL(samples, SamplesArgs, name) \\
  KERNEL(gate, GateArgs, name) KERNEL(norm, NormArgs, name)
KERNELS(portable)
#ifdef DIP_HAS_X86
KERNELS(avx2) KERNELS(avx512)
#endif
}
// Says what runs, then what each number given sets and what it runs thereafter.
int main(int count, char** given) {
  std::puts(dip::perturb_cpu({}, nullptr));
  for (int i = 1; i < count; ++i) {
    const int refused = dip::set_cpu_capability(std::atoi(given[i]));
    std::printf("%d %s\\n", refused, dip::norm_cpu({}, nullptr));
  }
}
"""
AVX2 = ("avx2", "fma", "f16c")
AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
# The processor has the features that a variable lists.
PROCESSOR = (
    '-D__builtin_cpu_supports(name)=(std::strstr(std::getenv("FEATURES"), "<" name ">") != nullptr)'
)


@pytest.fixture(scope="module")
def dispatch(tmp_path_factory):
    """Compiles csrc/cpu/dispatch.cpp with kernels that say their names, and runs it on a processor
    of given features: the lines that it prints."""
    folder = tmp_path_factory.mktemp("dispatch")
    (folder / "main.cpp").write_text(DISPATCH)
    for name, flags in (("x86", ["-DDIP_HAS_X86", PROCESSOR]), ("other", [])):
        command = ["g++", "-std=c++17", "-w", f"-I{CSRC}", *flags, str(folder / "main.cpp")]
        command += [str(CSRC / "cpu" / "dispatch.cpp"), "-o", str(folder / name)]
        printed(*command)

    def run(program, features, wanted, *numbers):
        listed = "".join(f"<{name}>" for name in features)
        variables = {"DIPKERNELS_CPU_CAPABILITY": wanted, "FEATURES": listed}
        return printed(folder / program, *map(str, numbers), env=variables).splitlines()

    return run


@needs("g++")
class TestDispatch:
    """Which CPU kernels run, on processors other than this one too."""

    @pytest.mark.parametrize("missing", [None, *AVX2, *AVX512])
    def test_the_best_kernels_run_for_which_no_feature_is_missing(self, dispatch, missing):
        best = "portable" if missing in AVX2 else "avx2" if missing else "avx512"
        features = [name for name in (*AVX2, *AVX512) if name != missing]
        for wanted in ("", "auto"):
            # 0 to 2 set a capability, or are refused and change nothing; -1 is the best again
            said = dispatch("x86", features, wanted, 0, 1, 2, -1)
            refused = {"portable": (0, 1, 1), "avx2": (0, 0, 1), "avx512": (0, 0, 0)}[best]
            runs, expected = "portable", [best]
            for name, status in zip(("portable", "avx2", "avx512"), refused):
                runs = runs if status else name
                expected.append(f"{status} {runs}")
            assert said == [*expected, f"0 {best}"]

    @pytest.mark.parametrize("program", ["x86", "other"])
    @pytest.mark.parametrize("features", [(), AVX2, (*AVX2, *AVX512)])
    def test_a_named_capability_runs_or_is_an_error_by_name(self, dispatch, program, features):
        offered = {"portable": ()}
        if program == "x86":
            offered |= {"avx2": AVX2, "avx512": (*AVX2, *AVX512)}
        for wanted in ("portable", "avx2", "avx512", "sse9"):
            (said,) = dispatch(program, features, wanted)
            if wanted in offered and set(offered[wanted]) <= set(features):
                assert said == wanted
            else:
                names = ", ".join(name for name in offered if {*offered[name]} <= {*features})
                says = f"DIPKERNELS_CPU_CAPABILITY: expected auto, {names}, which run here, got "
                assert said == f"{says}'{wanted}'; unset it for the best of them"


# ---- a forced backend that cannot run: the import is quiet, the first call is clear --------------

# What a process imports dipkernels into: the installation lacks it, whatever this one has.
WITHOUT = {
    "library": "import dipkernels.library as b; b.load = lambda: b.Library(error='it was not built')",
    "cpu": "import dipkernels.library as b; b.load = lambda: b.Library(path='_C.so', cuda_archs=('90',))",
    "cuda": "import dipkernels.library as b; b.load = lambda: b.Library(path='_C.so', cpu_capabilities=('portable',))",
    "triton": "import dipkernels.backends as b; b.has_triton = lambda: False",
    "nothing": "pass",
}
FORCED_CALL = """
import sys, types, importlib, importlib.util, warnings
warnings.simplefilter("error")
import torch
# One module alone first, changed, and then the package that asks it.
root = importlib.util.find_spec("dipkernels").submodule_search_locations[0]
package = types.ModuleType("dipkernels")
package.__path__, package.__package__ = [root, root.rsplit("/", 1)[0]], "dipkernels"
sys.modules["dipkernels"] = package
{without}
spec = importlib.util.spec_from_file_location("dipkernels", root + "/__init__.py", submodule_search_locations=package.__path__)
module = importlib.util.module_from_spec(spec)
sys.modules["dipkernels"] = module
spec.loader.exec_module(module)
print("imported")
report = str(module.env_report())
print(report)
print("reported")
try:
    module.DIPLinear(2, 2)(torch.ones(3, 2))
except (RuntimeError, ValueError) as error:
    print("refused:", error)
with module.backend("reference"):
    print(module.DIPLinear(2, 2)(torch.ones(3, 2)).shape)
module.backend("auto")
print("auto:", sys.modules["dipkernels.backends"].choose("perturb", "cpu").why)
"""


@pytest.mark.parametrize(
    "forced, without, why",
    [
        ("triton", "nothing", "it runs on CUDA tensors"),
        ("triton", "triton", "the package triton is not installed"),
        ("cuda", "cpu", "it runs on CUDA tensors"),
        ("cuda", "cuda", "the library was built without CUDA"),
        ("cuda", "library", "it was not built"),
        ("cpu", "library", "it was not built"),
        ("cpu", "cpu", "the library was built without CPU"),
        ("quick", "nothing", None),
    ],
)
def test_a_forced_backend_is_refused_at_the_first_call_and_not_at_import(
    run_python, forced, without, why
):
    code = FORCED_CALL.format(without=WITHOUT[without])
    status, output = run_python(code, DIPKERNELS_BACKEND=forced, TRITON_INTERPRET="")
    assert status == 0, output
    assert "imported" in output and "reported" in output
    (refusal,) = (line for line in output.splitlines() if line.startswith("refused:"))
    if why:
        says = f"backend '{forced}' was asked for by DIPKERNELS_BACKEND, and it cannot run on "
        says += f"device 'cpu' here: {why}"
        assert "unset DIPKERNELS_BACKEND, or call dipkernels.backend('auto'), to let" in refusal
    else:
        known = ("cpu", "cuda", "triton", "reference", "auto")
        says = f"DIPKERNELS_BACKEND: expected one of {known}, got 'quick'"
    assert says in refusal
    kernels = next(line for line in output.splitlines() if line.startswith("kernels on cpu"))
    assert says in kernels  # the report names it too
    assert "torch.Size([3, 2])" in output and "auto:" in output


def test_a_refusal_names_the_device_that_has_no_kernels():
    with (
        backend("cpu"),
        pytest.raises(
            RuntimeError, match="cannot run on device 'xpu' here: it runs on CPU tensors"
        ),
    ):
        choose("perturb", "xpu")
    refusal = registry._refusal(RuntimeError(f"noise: not on {registry.OTHER!r}"))
    with pytest.raises(RuntimeError, match="noise: not on 'cpu'"):
        refusal(SEED)


def test_cpu_capability_rejects():
    with pytest.raises(ValueError, match="cpu_capability: expected one of"):
        library.cpu_capability("mmx")
    assert library.cpu_capability("auto") in library.CAPABILITIES


def test_library_that_does_not_load_says_why(fresh_library, tmp_path):
    (tmp_path / "_C.so").write_text("not a library")
    (tmp_path / "_C.cpython-311-x86_64-linux-gnu.so").touch()  # of another build: it sorts first
    fresh_library.setattr(library, "__file__", str(tmp_path / "library.py"))
    fresh_library.setattr(sys, "path", [])
    found = library.load()
    assert not found.loaded and "torch" in found.error and "2.10" in found.error
    assert found.path == str(tmp_path / "_C.so")
    (tmp_path / "_C.so").unlink()
    library.load.cache_clear()
    assert "was not built" in library.load().error
    with pytest.raises(RuntimeError, match="was not built"):
        library.cpu_capability()
    (tmp_path / "_C.so").write_text("")
    fresh_library.setattr(torch.ops, "load_library", lambda path: None)
    build_info = SimpleNamespace(dip_build_info=lambda: b"cpu=portable\nan older line")
    fresh_library.setattr(library, "c_functions", lambda path: build_info)
    library.load.cache_clear()
    assert "built for interface none, and this source has interface" in library.load().error
    build_info.dip_build_info = lambda: b"interface=0\ncpu=portable\ncuda=\ncompiler=g++"
    library.load.cache_clear()
    assert "built for interface 0, and this source has interface" in library.load().error


def fuses(device, dtype, m, n, k):
    return backends.can_fuse(device) and sizes.is_narrow(dtype, m, n, k)


def test_fuses_narrow_and_small_problems_alone(monkeypatch):
    with_library(monkeypatch)
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    half = torch.bfloat16
    assert fuses("cuda", half, 65536, 128, 4096)  # one tile of columns
    assert not fuses("cuda", half, 65536, 129, 4096)
    assert fuses("cuda", half, 32, 1024, 1024)  # launches dominate
    assert not fuses("cuda", half, 33, 1024, 1024)
    assert not fuses("cuda", torch.float32, 32, 64, 64)
    assert not fuses("cpu", half, 32, 64, 64)
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert not fuses("cuda", half, 32, 64, 64)


FUSED = """
import torch, dipkernels as dip
from dipkernels import functional
from dipkernels.ops import linear as affine
calls = []
linear = affine.linear
affine.linear = lambda *arguments: calls.append(1) or linear(*arguments)
seed, generator = torch.tensor([3, 4]), torch.Generator().manual_seed(0)
tensors = [torch.randn(shape, generator=generator).half() for shape in ((19, 24), (20, 24), (20,), (19, 20))]
log_variance = torch.randn(24, generator=generator) - 3
def run(**options):
    leaves = [t.clone().requires_grad_() for t in (*tensors[:3], log_variance)]
    y = functional.dip_linear(*leaves, seed, log_variance=True, num_samples=2, **options)
    return y, *torch.autograd.grad(y, leaves, tensors[3])
with dip.backend("triton"):
    fused = run()
    assert calls == [1]
    run(keep="u")
    assert calls == [1]
for ours, want in zip(fused, run(), strict=True):
    torch.testing.assert_close(ours, want, rtol=2e-3, atol=2e-2)
print("fused equals two-step")
"""


def test_fused_linear_equals_two_steps(run_python):
    status, output = run_python(FUSED, TRITON_INTERPRET="1")
    assert status == 0 and "fused equals two-step" in output, output


class PTXASError(Exception):
    """Named as Triton's own: that is how a failed compilation is told apart from a caller's
    error."""


def _by_no_name(package):
    raise importlib.metadata.PackageNotFoundError(package)


def test_a_kernel_that_triton_cannot_compile_is_reported_and_another_runs(monkeypatch):
    with_library(monkeypatch)
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    monkeypatch.setattr(backends, "triton_problems", {})
    monkeypatch.setattr(
        importlib.metadata, "version", _by_no_name
    )  # of nightly builds and NVIDIA's
    assert choose("linear", "cuda").backend == "triton"
    said = r"Triton \d.* cannot compile linear: no such instruction"
    with pytest.warns(RuntimeWarning, match=said):
        backends.note_triton_problem("linear", PTXASError("no such instruction\nmore"))
    assert choose("linear", "cuda").backend == "cuda"
    assert not fuses("cuda", torch.float16, 32, 64, 64)
    report = env_report()
    assert "cannot compile linear" in str(report["triton problems"])
    assert re.match(r"\d", report["triton"])
    with pytest.raises(ValueError, match="an argument"):
        backends.note_triton_problem("linear", ValueError("an argument"))
    monkeypatch.setattr(backends, "forced", "triton")
    with pytest.raises(RuntimeError, match="'triton' was asked for, and Triton"):
        backends.note_triton_problem("perturb", PTXASError("no such instruction"))


@pytest.mark.parametrize("failure", ["no compiler", "compiler fails", "no such instruction"])
def test_an_operation_that_triton_cannot_compile_runs_elsewhere(failure, monkeypatch, tmp_path):
    """Without gcc or Python.h too, where it is Triton's own error, whatever its words."""
    if failure != "no such instruction":
        build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if failure == "compiler fails":
        program_at(tmp_path / "gcc", "exit 1")
    monkeypatch.setattr(backends, "triton_problems", {})

    def launcher(*arguments):
        if failure == "no such instruction":
            raise PTXASError(failure)
        build.compile_module_from_src(src=f"// {tmp_path}", name="launcher")

    failing = registry._triton("noise", "perturb")
    module = SimpleNamespace(noise=launcher)
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: module)
    why = f"cannot compile noise: .*(C compiler|exit status 1|{failure})"
    with pytest.warns(RuntimeWarning, match=why):
        z = failing(SEED, (3, 8), -1, 0, 0, 0)
    assert torch.equal(z, functional.noise((3, 8), SEED))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not tried again
        assert torch.equal(failing(SEED, (3, 8), -1, 0, 0, 0), z)


def test_choose_leaves_wide_means_on_a_gpu_to_row_blocks(monkeypatch):
    monkeypatch.setattr(backends, "runs_on", lambda name, device: True)
    wide, narrow, small = (4096, 1024, 1024), (4096, 512, 1024), (8, 4096, 1024)
    for op in ("linear", "linear_bwd"):
        for dtype, shape, runs in (
            (torch.bfloat16, wide, "cuda"),
            (torch.bfloat16, narrow, "triton"),
            (torch.bfloat16, small, "triton"),
            (torch.float32, narrow, "cuda"),
        ):
            assert choose(op, "cuda", sizes.is_wide(dtype, *shape)).backend == runs
    registry.choose_all()
    assert registry.kernel("linear", registry.WIDE) is torch.ops.dipkernels.linear.default
    assert registry.kernel("linear", "cuda") is torch.ops.dipkernels_triton.linear.default
    # no library: Triton's at any width
    monkeypatch.setattr(backends, "runs_on", lambda name, device: name != "cuda")
    assert choose("linear", "cuda", wide=True).backend == "triton"


def test_a_traced_mean_finds_its_kernel_by_looking_it_up(monkeypatch):
    found = {shape: lambda: None for shape in ("narrow", "wide")}
    monkeypatch.setitem(registry._chosen, ("linear", "cuda"), found["narrow"])
    monkeypatch.setitem(registry._chosen, ("linear", registry.WIDE), found["wide"])
    for n, want in ((512, "narrow"), (1024, "wide")):
        x = torch.ones(64, 2048, dtype=torch.bfloat16)
        weight = torch.ones(n, 2048, dtype=torch.bfloat16)

        def step(x, weight, want=want):
            return x + (registry.kernel("linear", device_of("cuda", x, weight)) is found[want])

        assert torch.compile(step, fullgraph=True, backend="eager")(x, weight).eq(2).all()
