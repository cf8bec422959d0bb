"""Builds dipkernels/_C.so: one library of CPU and CUDA kernels through torch's stable ABI, by g++
and nvcc under ninja.

torch's own CUDAExtension refuses to compile CUDA sources under a CPU-only torch; this does not, and
the result has no Python symbols, so that one wheel serves every Python and every torch >= 2.10.
Variables (docs/environment.md): DIPKERNELS_CPU, DIPKERNELS_CUDA, DIPKERNELS_CUDA_ARCHS, MAX_JOBS,
CXX, NVCC, LDFLAGS. A CXX for another machine cross-compiles (tools/release/build_wheel.py).
"""

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import setuptools
from setuptools import Extension, setup

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"setuptools >= 77 is needed, got {setuptools.__version__}: pip install 'setuptools>=77'"
    )
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CUDA_ARCHS = "80 86 89 90 100 120"
FAST = re.compile(
    r"\B--?(ffast-math|Ofast|funsafe-math-optimizations|mdaz-ftz|use_fast_math|"
    r"(fmad|ftz)[= ]+true|prec-(div|sqrt)[= ]+false)(?![\w-])"
)
AVX2 = "-mavx2 -mfma -mf16c"
# The files that are compiled once per instruction set, with their entry points.
CPU_KERNELS = {
    "perturb": ["perturb"],
    "expectation": ["expectation", "variance"],
    "samples": ["samples"],
    "gate": ["gate"],
    "norm": ["norm"],
}
CAPABILITIES = {
    "portable": "",
    "avx2": AVX2,
    "avx512": f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512",
}


def target(compiler):
    """What `compiler` compiles for: x86_64-linux-gnu, aarch64-linux-gnu, ..."""
    done = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True)
    return done.stdout.strip() or f"{platform.machine()}-{platform.system().lower()}"


def is_x86(compiler):
    return target(compiler).startswith("x86_64-")


def toolkit(nvcc):
    """The CUDA toolkit of `nvcc`, such as 12.8: its static runtime decides which driver the library
    needs."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    if found is None:
        raise SystemExit(
            f"NVCC: expected an nvcc that says its release, got {nvcc!r}, which says "
            f"{(done.stdout + done.stderr).strip()!r}; DIPKERNELS_CUDA=0 builds without it, and "
            "build_wheel.py by --cuda 0"
        )
    return found.group(1)


def toolkit_folder(nvcc):
    """Where the toolkit of `nvcc` lies, as nvcc itself says: the one on the PATH is often a link or
    a script."""
    done = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(found.group(1)).resolve() if found else Path(nvcc).resolve().parent.parent


def say(message):
    print(f"dipkernels build: {message}", flush=True)


def wanted(name):
    """True, False, or None where the variable leaves it to the build."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0, 1 or nothing, got {value!r}")
    return None if value == "" else value == "1"


def jobs():
    """The arguments by which ninja runs so many commands at once; 0 would be all of them."""
    value = os.environ.get("MAX_JOBS", "")
    if value and not re.fullmatch("0*[1-9][0-9]*", value):
        raise SystemExit(f"MAX_JOBS: expected a whole number from 1 on, or nothing, got {value!r}")
    return ["-j", value] if value else []


def link_flags():
    """LDFLAGS, as the ninja file has them. gcc's fast arithmetic would, when the library is loaded,
    flush the denormal numbers of the whole process; nvcc reads two variables by itself."""
    for name in ("LDFLAGS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        value = os.environ.get(name, "")
        if FAST.search(value):
            raise SystemExit(
                f"{name}: expected no flags of fast arithmetic, which changes the noise, "
                f"got {value!r}; leave them out for this build"
            )
    return os.environ.get("LDFLAGS", "").replace("$", "$$")


def cuda_archs(nvcc=None):
    """The architectures to compile for: what was asked for, else those of all that `nvcc` knows."""
    value = os.environ.get("DIPKERNELS_CUDA_ARCHS") or CUDA_ARCHS
    archs = value.split()
    # 90a would run on no newer GPU, and no kernel here needs what it adds
    if not archs or not all(re.fullmatch(r"\d+", arch) for arch in archs):
        raise SystemExit(f"DIPKERNELS_CUDA_ARCHS: expected numbers as in '80 90', got {value!r}")
    if any(int(arch) < 80 for arch in archs):
        raise SystemExit(
            f"DIPKERNELS_CUDA_ARCHS: expected 80 or newer, got {value!r}: an older GPU runs "
            "Triton's kernels; build with DIPKERNELS_CUDA=0"
        )
    if nvcc and value == CUDA_ARCHS:
        done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
        known = [arch for arch in archs if f"compute_{arch}" in done.stdout.split()] or archs
        if known != archs:
            say(
                f"this nvcc knows no sm_{' sm_'.join(a for a in archs if a not in known)}: left out"
            )
        archs = known
    return archs


def command(name, default, places=None):
    """The path of a compiler: of the one that the variable `name` asks for, else of `default`, or
    None. places: where to look, in place of PATH."""
    asked = os.environ.get(name)
    found = shutil.which(asked or default, path=places)
    if asked and found is None:
        raise SystemExit(
            f"{name}: expected one command, without arguments, that is there, got {asked!r}; for "
            "ccache put the folder of its compilers first on the PATH"
        )
    return found and os.path.abspath(found)  # ninja runs it in another folder


def find_nvcc():
    """The path of nvcc, or None."""
    # as torch does: asked for, CUDA_HOME goes before the PATH
    path = os.environ.get("PATH", os.defpath)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = (f"{home}/bin", path) if home else (path, "/usr/local/cuda/bin")
    return command("NVCC", "nvcc", os.pathsep.join(places))


def find_torch():
    """torch, whose headers the build reads, or what to do where there is none."""
    steps = "pip install 'torch>=2.10' 'setuptools>=77' ninja && pip install --no-build-isolation ."
    try:
        import torch
    except ImportError:
        raise SystemExit(
            "torch is needed to build dipkernels, for its headers, and an isolated build sees "
            f"none: {steps}"
        ) from None
    if tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        raise SystemExit(
            f"torch >= 2.10 is needed to build dipkernels, got {torch.__version__}: {steps}"
        )
    return torch


def plan():
    """(cpu, cuda, compiler, nvcc): what is built, and why, said aloud."""
    compiler, nvcc = command("CXX", "g++"), find_nvcc()
    cpu, cuda = wanted("DIPKERNELS_CPU"), wanted("DIPKERNELS_CUDA")
    if compiler is None or "linux" not in target(compiler):
        if cpu or cuda:
            raise SystemExit(
                "DIPKERNELS_CPU=1 or DIPKERNELS_CUDA=1 was asked for, but there is no C++ compiler "
                "for Linux (CXX, g++)"
            )
        say(
            "no C++ compiler for Linux (CXX, g++): pure Python install; the slow reference path "
            "and Triton still run"
        )
        return False, False, None, None
    cuda_archs(), jobs(), link_flags()  # what is wrong in them is said before anything is compiled
    if cuda and nvcc is None:
        raise SystemExit(
            "DIPKERNELS_CUDA=1 was asked for, but there is no nvcc (NVCC, CUDA_HOME, CUDA_PATH, "
            "PATH)"
        )
    cpu = cpu is not False
    if cuda is None:
        torch = find_torch()
        cuda = nvcc is not None and torch.version.cuda is not None
        say(
            f"CUDA kernels: {'yes' if cuda else 'no'} (nvcc {nvcc or 'not found'}, torch "
            f"{torch.__version__}); DIPKERNELS_CUDA=0|1 decides"
        )
    else:
        say(f"CUDA kernels: {'yes' if cuda else 'no'} (DIPKERNELS_CUDA)")
    say(
        "CPU kernels: "
        f"{'yes, ' + ' '.join(capabilities(compiler)) if cpu else 'no (DIPKERNELS_CPU=0)'}"
    )
    return cpu, cuda, compiler, nvcc


def capabilities(compiler):
    return list(CAPABILITIES) if is_x86(compiler) else ["portable"]


def kernel_units(compiler):
    """(stem of the file, name of the object, options) of every CPU kernel and instruction set"""
    for name in capabilities(compiler):
        lanes = "Portable" if name == "portable" else f"Twice<{name.capitalize()}>"
        for stem, entries in CPU_KERNELS.items():
            defines = [f"-DDIP_{entry.upper()}={entry}_{name}" for entry in entries]
            isa = CAPABILITIES[name].split()
            yield stem, f"{stem}_{name}", [*isa, f"-DDIP_LANES={lanes}", *defines]


def quoted(text):
    """One word of a shell command inside a ninja file."""
    return shlex.quote(str(text)).replace("$", "$$")


def ninja_file(cpu, cuda, compiler, nvcc):
    """The whole build as text.

    The folder that it lies in has links: source (this checkout), package (where the library goes),
    torch and cuda. Every path is one through them, so that a checkout may lie anywhere: a space, a
    $ or a colon would mean something to ninja, to the shell or to nvcc.
    """
    archs = cuda_archs(nvcc if cuda else None)
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    defines += ["-DDIP_HAS_CPU"] * cpu + ["-DDIP_HAS_X86"] * (cpu and is_x86(compiler))
    if cuda:
        defines.append("'-DDIP_CUDA_ARCHS=\"" + " ".join(archs) + "\"'")
        defines.append("'-DDIP_CUDA_TOOLKIT=\"" + toolkit(nvcc) + "\"'")
    # No contraction: every fused multiply-add of the noise contract is written out.
    # Error messages carry file names: relative ones, so that a library says nothing of where it was
    # built.
    prefix = "-ffile-prefix-map=source/= -ffile-prefix-map=torch/="
    flags = (
        "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno "
        f"-fno-trapping-math {prefix}"
    )
    gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
    gencode += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
    lines = [
        f"rule cxx\n  command = {quoted(compiler)} -MMD -MF $out.d {flags} {' '.join(defines)} "
        "$flags -c $in -o $out"
        "\n  depfile = $out.d\n  deps = gcc",
        f"rule nvcc\n  command = {quoted(nvcc)} -ccbin {quoted(compiler)} -MMD -MF $out.d "
        "-std=c++17 -O3 -fmad=false"
        f" --expt-relaxed-constexpr -Xcompiler -fPIC -Xcompiler -fvisibility=hidden {gencode} -c "
        "$in -o $out"
        "\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {quoted(compiler)} -shared $in -o $out "
        f"-Wl,--version-script=exports.map {link_flags()}"
        " -Ltorch/lib -Wl,--as-needed -ltorch_cpu $libs",
    ]
    units = [("operations.cpp", "operations", "-Itorch/include")]
    if cpu:
        units.append(("cpu/dispatch.cpp", "dispatch", ""))
        for stem, name, options in kernel_units(compiler):
            units.append((f"cpu/{stem}.cpp", name, shlex.join(options)))
    objects = []
    for source, name, extra in units:
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: cxx source/csrc/{source}\n  flags = {extra}")
    libs = ""
    if cuda:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            objects.append(f"cuda_{source.stem}.o")
            lines.append(f"build cuda_{source.stem}.o: nvcc source/csrc/cuda/{source.name}")
        libs = "-Lcuda/lib64 -Lcuda/lib -lcudart_static -lrt -ldl -lpthread"
    lines.append(f"build package/_C.so: link {' '.join(objects)}\n  libs = {libs}")
    return "\n".join(lines) + "\n"


def find_ninja():
    found = shutil.which("ninja")
    if found is None:
        try:
            import ninja
        except ImportError:
            raise SystemExit("ninja is needed to build: pip install ninja") from None
        found = str(Path(ninja.BIN_DIR) / "ninja")
    return found


class FreshModules(build_py):
    """Packs no module that an older source left in the build folder."""

    def run(self):
        super().run()
        made = {Path(name) for name in self.get_outputs(include_bytecode=False)}
        for path in Path(self.build_lib, "dipkernels").rglob("*.py"):
            if path not in made:
                path.unlink()


class NinjaBuild(build_ext):
    def get_ext_filename(self, name):
        # no Python version in it: the library has no Python symbols
        return str(Path(*name.split("."))) + ".so"

    def build_extension(self, ext):
        import fcntl  # Linux alone compiles

        torch = find_torch()
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / "ninja"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            with contextlib.suppress(OSError):  # Lustre may be mounted without locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one checkout take turns
            self.build_in(folder, out, torch)

    def build_in(self, folder, out, torch):
        cpu, cuda, compiler, nvcc = PLAN
        (folder / "exports.map").write_text("{ global: dip_*; local: *; };\n")
        links = {
            "source": ROOT.resolve(),
            "package": out.parent,
            "torch": Path(torch.__file__).resolve().parent,
        }
        if cuda:
            links["cuda"] = toolkit_folder(nvcc)
        for name, target in links.items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target, target_is_directory=True)
        (folder / "build.ninja").write_text(ninja_file(cpu, cuda, compiler, nvcc))
        if subprocess.run([find_ninja(), "-C", str(folder), *jobs()]).returncode:
            raise SystemExit(
                "dipkernels build: a command above failed. Where the compiler was killed, memory "
                "ran out: set MAX_JOBS=1"
            )


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: any Python 3, one platform."""

    def get_tag(self):
        python, abi, tag = super().get_tag()
        return ("py3", "none", tag) if self.distribution.ext_modules else (python, abi, tag)


if __name__ == "__main__":  # tools/release/build_wheel.py and tests read it too
    PLAN = plan()
    setup(
        ext_modules=[Extension("dipkernels._C", [])] if any(PLAN[:2]) else [],
        cmdclass={"build_py": FreshModules, "build_ext": NinjaBuild, "bdist_wheel": PlatformWheel},
    )
