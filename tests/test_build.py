"""The build: what it says, what it honours, and that a machine without a compiler still gets a
package that works."""

import re
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from program_support import PYTHON, printed, program_at, ran
from source_support import ROOT, module_at

NO_COMPILER = {"PATH": "", "CXX": "", "NVCC": "", "DIPKERNELS_CPU": "", "DIPKERNELS_CUDA": ""}


def python(*arguments, cwd=ROOT, **environment):
    """(exit status, all that it printed)"""
    done = ran(PYTHON, *arguments, cwd=cwd, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def planned(monkeypatch, capsys):
    """What setup.py says of its plan under variables, or why it makes none."""

    def plan(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        module_at("setup.py").plan()
        return capsys.readouterr().out

    return plan


@pytest.mark.parametrize(
    "environment, expected",
    [
        (dict(DIPKERNELS_CUDA="yes"), "DIPKERNELS_CUDA: expected 0, 1 or nothing, got 'yes'"),
        (
            dict(DIPKERNELS_CUDA="1", CXX=shutil.which("g++") or "", PATH="", CUDA_HOME="/none"),
            "there is no nvcc",
        ),
        ({**NO_COMPILER, "DIPKERNELS_CPU": "1"}, "there is no C++ compiler"),
        # once a pure Python install, of which pip showed nothing
        (dict(CXX="ccache g++"), "CXX: expected one command, without arguments"),
        (dict(NVCC="no-such-nvcc"), "that is there, got 'no-such-nvcc'"),
        (dict(DIPKERNELS_CUDA_ARCHS="8.0;9.0"), "as in '80 90', got '8.0;9.0'"),
        (dict(DIPKERNELS_CUDA_ARCHS="sm_90"), "as in '80 90', got 'sm_90'"),
        # once taken for code that runs on sm_91 to sm_99 and newer, where it does not
        (dict(DIPKERNELS_CUDA_ARCHS="80 90a"), "as in '80 90', got '80 90a'"),
        (dict(DIPKERNELS_CUDA_ARCHS="75 90"), "expected 80 or newer, got '75 90'"),
        # ninja's 0 is all at once, which takes the memory
        (dict(MAX_JOBS="0"), "MAX_JOBS: expected a whole number from 1 on, or nothing, got '0'"),
        (dict(MAX_JOBS="four"), "got 'four'"),
        # once the import flushed the denormal numbers of the whole process
        (dict(LDFLAGS="-O2 -ffast-math"), "LDFLAGS: expected no flags of fast arithmetic"),
        (dict(LDFLAGS="-Wl,-z,now -Ofast"), "got '-Wl,-z,now -Ofast'"),
        (dict(LDFLAGS="-funsafe-math-optimizations"), "LDFLAGS: expected no flags"),
        (dict(NVCC_APPEND_FLAGS="-O3 --use_fast_math"), "NVCC_APPEND_FLAGS: expected no flags"),
        (dict(NVCC_PREPEND_FLAGS="-ccbin=g++ -fmad=true"), "NVCC_PREPEND_FLAGS: expected no flags"),
        (dict(NVCC_APPEND_FLAGS="-Xcompiler=-O2,-ffast-math"), "leave them out for this build"),
        (dict(NVCC_APPEND_FLAGS="--ftz true"), "got '--ftz true'"),
        (dict(NVCC_APPEND_FLAGS="-prec-sqrt=false"), "got '-prec-sqrt=false'"),
    ],
)
def test_build_refuses_what_it_cannot_do(environment, expected, planned):
    with pytest.raises(SystemExit, match=re.escape(expected)):
        planned(**environment)


@pytest.mark.parametrize(
    "environment, expected",
    [
        (dict(DIPKERNELS_CUDA="0"), ["CUDA kernels: no (DIPKERNELS_CUDA)", "CPU kernels: yes"]),
        (dict(DIPKERNELS_CPU="0", DIPKERNELS_CUDA="0"), ["CPU kernels: no (DIPKERNELS_CPU=0)"]),
        (
            dict(DIPKERNELS_CUDA="", DIPKERNELS_CUDA_ARCHS=""),
            ["CUDA kernels:", "DIPKERNELS_CUDA=0|1 decides"],
        ),
        (
            dict(DIPKERNELS_CUDA="0", LDFLAGS="-L/home/fmad-ftz/lib -Wl,-z,now -fno-fast-math"),
            ["CPU kernels: yes"],
        ),
        # what nvcc does anyway, and fewer optimizations
        (
            dict(
                NVCC_PREPEND_FLAGS="-fmad=false --ftz false -prec-div=true --prec-sqrt=true",
                NVCC_APPEND_FLAGS="--Ofast-compile=max",
            ),
            ["CPU kernels: yes"],
        ),
        (NO_COMPILER, ["no C++ compiler", "pure Python install"]),
    ],
)
def test_build_says_what_it_builds_and_why(environment, expected, planned):
    output = planned(**environment)
    assert all(text in output for text in expected)


def test_a_compiler_for_another_system_is_none(tmp_path, planned):
    """A Mac's g++ links no library for Linux."""
    compiler = str(program_at(tmp_path / "g++", "echo arm64-apple-darwin23.6.0"))
    assert "no C++ compiler for Linux" in planned(CXX=compiler, DIPKERNELS_CPU="")
    with pytest.raises(SystemExit, match=r"there is no C\+\+ compiler for Linux"):
        planned(CXX=compiler, DIPKERNELS_CPU="1")


def test_a_build_for_aarch64_asks_for_nothing_of_x86_and_fuses_nothing_unasked(
    tmp_path, monkeypatch
):
    """g++ there fuses products into sums unless told not to. Then the means and the norms'
    gradients have other bits than on x86."""
    compiler = str(program_at(tmp_path / "g++", "echo aarch64-linux-gnu"))
    monkeypatch.setenv("DIPKERNELS_CUDA_ARCHS", "90")
    setup = module_at("setup.py")
    text = setup.ninja_file(True, False, compiler, None)
    assert setup.capabilities(compiler) == ["portable"] and "perturb_portable.o" in text
    assert "-ffp-contract=off" in text and "-ffast-math" not in text
    assert not re.search("-m(avx|fma|f16c|arch|cpu)|DIP_HAS_X86|avx", text)


@pytest.fixture
def without_torch(tmp_path):
    """A folder for PYTHONPATH that stands for an environment without torch."""
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    )
    return {"PYTHONPATH": str(tmp_path), "DIPKERNELS_CPU": ""}


@pytest.mark.parametrize("arguments, cuda", [(["egg_info"], ""), (["build_ext"], "0")])
def test_build_without_torch_says_how_to_get_it(without_torch, tmp_path, arguments, cuda):
    """The first is what pip asks first."""
    folders = ["--build-lib", tmp_path, "--build-temp", tmp_path]
    if arguments == ["egg_info"]:
        folders = ["--egg-base", tmp_path]
    given = {"DIPKERNELS_CUDA": cuda, **without_torch}
    status, output = python("setup.py", *arguments, *folders, **given)
    assert status != 0 and "Traceback" not in output
    for said in ("torch is needed", "pip install --no-build-isolation .", "ninja"):
        assert said in output


@pytest.mark.parametrize(
    "module, version, expected",
    [
        ("torch", "2.9.1+cpu", "torch >= 2.10 is needed to build dipkernels, got 2.9.1+cpu"),
        ("setuptools", "65.5.0", "setuptools >= 77 is needed, got 65.5.0"),
    ],
)
def test_build_under_an_old_version_says_so(tmp_path, module, version, expected):
    source = f"__version__ = '{version}'\nExtension = setup = None\n"
    (tmp_path / f"{module}.py").write_text(source)
    given = {"PYTHONPATH": str(tmp_path), "DIPKERNELS_CUDA": ""}
    status, output = python("setup.py", "--version", **given)
    assert status != 0 and expected in output


# ---- the sdist -----------------------------------------------------------------------------------


def test_the_sdist_is_the_whole_source(tmp_path):
    """So that every target of its Makefile runs, and its tests."""
    listed = ran("git", "ls-files")
    if listed.returncode:
        pytest.skip("no git checkout here to compare with")
    printed(PYTHON, "tools/release/build_wheel.py", "--sdist-only", "--out", tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    assert sources <= packed
    for name in packed:
        assert not (name.endswith((".so", ".o")) or ".venv" in name or "shared/" in name), name


def test_the_sdist_of_a_source_that_cannot_be_written_to_is_made_where_one_can(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", list(sys.path))  # build_wheel.py adds its folder
    wheel = module_at("tools/release/build_wheel.py")
    (tmp_path / "source" / "docs").mkdir(parents=True)
    for folder in ("source/docs", "source"):
        (tmp_path / folder).chmod(0o555)
    monkeypatch.setattr(wheel, "ROOT", tmp_path / "source")
    monkeypatch.setattr(wheel, "backend", lambda step, out, folder, environment: modes(folder))

    def modes(folder):
        return [path.stat().st_mode & 0o777 for path in (folder, folder / "docs")]

    assert wheel.make_sdist(tmp_path) == [0o755, 0o755]


# ---- a checkout in any folder --------------------------------------------------------------------

ODD = "a b$HOME:c'd\"e#(f)&"  # means something to ninja, the shell, make and the depfiles
COMPILER = """
# Stands for g++: finds what it is to read, and writes what it is to write.
[ "$1" = -dumpmachine ] && { echo x86_64-linux-gnu; exit 0; }
for word; do
  case "$before" in -o) out=$word ;; -c) [ -f "$word" ] || { echo "no $word" >&2; exit 1; } ;; esac
  case "$word" in -I*) [ -d "${word#-I}" ] || { echo "no ${word#-I}" >&2; exit 1; } ;; esac
  case "$word" in -L*) [ -d "${word#-L}" ] || { echo "no ${word#-L}" >&2; exit 1; } ;; esac
  before=$word
done
mkdir "$out.busy" || exit 1  # another build writes it
sleep 0.02
echo made > "$out"
rmdir "$out.busy"
"""


@pytest.fixture
def odd_checkout(tmp_path):
    """The sources in a folder whose name needs quoting everywhere."""
    folder = tmp_path / ODD
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "dipkernels", "triton_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def build_in(folder, **environment):
    environment = {"DIPKERNELS_CPU": "1", "DIPKERNELS_CUDA": "0", **environment}
    return python("setup.py", "build_ext", "--inplace", cwd=folder, **environment)


@pytest.mark.parametrize("at_once", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_command_of_the_build_finds_its_files_in_any_folder(odd_checkout, tmp_path, at_once):
    compiler = program_at(tmp_path / "c++", COMPILER)
    with ThreadPoolExecutor() as pool:
        for status, output in pool.map(
            lambda _: build_in(odd_checkout, CXX=str(compiler)), range(at_once)
        ):
            assert status == 0, output
    assert (odd_checkout / "dipkernels" / "_C.so").read_text() == "made\n"
    killed = "echo g++: fatal error: Killed signal terminated program cc1plus; exit 1\n"
    compiler.unlink()
    other = program_at(tmp_path / "g++", COMPILER.replace("mkdir", f"{killed}mkdir"))
    status, output = build_in(odd_checkout, CXX=str(other))
    assert status != 0 and "Killed signal" in output and "Traceback" not in output
    assert "memory ran out: set MAX_JOBS=1" in output


def test_the_build_heeds_max_jobs_and_ldflags(odd_checkout, tmp_path):
    one_at_a_time = COMPILER.replace('"$out.busy"', "busy")
    alone = program_at(tmp_path / "c++", one_at_a_time)
    status, output = build_in(odd_checkout, CXX=str(alone), MAX_JOBS="1")
    assert status == 0, output
    status, output = build_in(odd_checkout, CXX=str(alone), MAX_JOBS="1", LDFLAGS="-Lnowhere")
    assert status != 0 and "no nowhere" in output


@pytest.mark.parametrize(
    "flag",
    [
        "-ffast-math",
        "-Ofast",
        "-funsafe-math-optimizations",
        "-freciprocal-math",
        "-ffinite-math-only",
        "-fassociative-math -fno-signed-zeros -fno-trapping-math",
    ],
)
def test_a_compiler_with_fast_arithmetic_of_its_own_compiles_no_kernel(flag):
    """As a wrapper or a vendor's compiler has."""
    for stem in module_at("setup.py").CPU_KERNELS:
        source = ROOT / "csrc" / "cpu" / f"{stem}.cpp"
        done = ran("g++", "-std=c++17", "-E", *flag.split(), source)
        assert done.returncode and "fast arithmetic changes the noise" in done.stderr, stem


def test_a_compiler_may_be_named_relative_to_the_checkout(odd_checkout):
    program_at(odd_checkout / "c++", COMPILER)
    status, output = build_in(odd_checkout, CXX="./c++")
    assert status == 0, output


def test_a_file_system_without_locks_holds_a_checkout(odd_checkout, tmp_path):
    """As Lustre is, where a cluster mounts it without flock."""
    no_locks = "LOCK_EX = 2\ndef flock(file, how): raise OSError(38, 'Function not implemented')\n"
    (tmp_path / "fcntl.py").write_text(no_locks)
    compiler = program_at(tmp_path / "c++", COMPILER)
    status, output = build_in(odd_checkout, CXX=str(compiler), PYTHONPATH=str(tmp_path))
    assert status == 0, output


@pytest.mark.parametrize("text", ["echo no license >&2; exit 1", "echo Cuda compilation tools"])
def test_an_nvcc_that_does_not_work_is_named(odd_checkout, tmp_path, text):
    nvcc, cxx = program_at(tmp_path / "nvcc", text), program_at(tmp_path / "c++", COMPILER)
    status, output = build_in(odd_checkout, CXX=str(cxx), NVCC=str(nvcc), DIPKERNELS_CUDA="1")
    assert status != 0 and "Traceback" not in output
    assert f"NVCC: expected an nvcc that says its release, got '{nvcc}'" in output


def test_an_older_nvcc_compiles_for_what_it_knows(tmp_path, monkeypatch, capsys):
    """Of all architectures; of what was asked for, it is to say that it cannot."""
    nvcc = program_at(tmp_path / "nvcc", "printf 'compute_%s\\n' 75 80 86 87 89 90")
    cuda_archs = module_at("setup.py").cuda_archs
    monkeypatch.delenv("DIPKERNELS_CUDA_ARCHS", raising=False)
    assert cuda_archs(str(nvcc)) == ["80", "86", "89", "90"]
    assert "knows no sm_100 sm_120: left out" in capsys.readouterr().out
    monkeypatch.setenv("DIPKERNELS_CUDA_ARCHS", "90 120")
    assert cuda_archs(str(nvcc)) == ["90", "120"]


@pytest.mark.parametrize("home, found", [("toolkit", "toolkit/bin/nvcc"), ("none", "nvcc")])
@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_is_looked_for_in_cuda_home_then_on_the_path_as_by_torch(
    tmp_path, variable, home, found, planned
):
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    for name, text in (("toolkit/bin/nvcc", ""), ("nvcc", ""), ("c++", COMPILER)):
        program_at(tmp_path / name, text)
    places = {"PATH": str(tmp_path), "CUDA_HOME": "", variable: str(tmp_path / home)}
    compilers = dict(NVCC="", CXX=str(tmp_path / "c++"), DIPKERNELS_CPU="", DIPKERNELS_CUDA="")
    assert f"(nvcc {tmp_path / found}, torch" in planned(**places, **compilers)


@pytest.mark.slow
def test_a_checkout_in_any_folder_builds_and_runs(odd_checkout):
    status, output = build_in(odd_checkout)
    assert status == 0, output[-4000:]
    code = "import dipkernels as dip; print(dip.library.load().path, dip.library.load().error, sep='\\n')"
    status, output = python("-c", code, cwd=odd_checkout)
    assert output.splitlines() == [str(odd_checkout / "dipkernels" / "_C.so"), "None"]


def test_build_without_a_compiler_gives_a_package_that_works(tmp_path):
    left = ROOT / "build" / "lib" / "dipkernels" / "removed.py"  # by an older source
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    install = ["-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    status, output = python(*install, "--target", tmp_path, ROOT, **NO_COMPILER)
    assert status == 0, output
    assert not list(tmp_path.glob("dipkernels/_C*"))
    assert not (tmp_path / "dipkernels" / "removed.py").exists()
    code = """
import sys, warnings
sys.modules["numpy"] = None  # not installed
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dipkernels as dip
    assert dip.__file__.startswith(FOLDER), dip.__file__
    layer = dip.DIPLinear(8, 4)
    for _ in range(3):
        layer(torch.ones(2, 8)).sum().backward()
said = [str(w.message) for w in caught if "reference path" in str(w.message)]
assert len(said) == 1 and "pip install --no-build-isolation --no-deps --force-reinstall ." in said[0], caught
assert layer.log_variance.grad is not None
model = dip.convert(torch.nn.Sequential(torch.nn.Linear(8, 4)))
dip.check(model, torch.ones(2, 8))
dip.check_ranks(model)
print(dip.env_report())
""".replace("FOLDER", repr(str(tmp_path)))
    status, output = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert status == 0 and "no compiled library" in output, output


SOURCE_TREE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]  # as if never installed
import dipkernels, dipkernels.triton_kernels.mixtures as mixtures
print(dipkernels.__file__, mixtures.__file__)
"""


def test_the_source_tree_works_where_it_was_never_installed(tmp_path):
    """As `make gpu-check` runs it."""
    status, output = python("-c", SOURCE_TREE, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert status == 0, output
    assert output.split() == [
        str(ROOT / "dipkernels" / "__init__.py"),
        str(ROOT / "triton_kernels" / "mixtures.py"),
    ]


def test_cuda_sources_see_no_torch():
    headers = {*(ROOT / "csrc").glob("*.h")} - {ROOT / "csrc" / "torch.h"}
    for path in [*headers, *(ROOT / "csrc" / "cuda").glob("*"), *(ROOT / "csrc" / "cpu").glob("*")]:
        assert "torch/" not in path.read_text(), path
