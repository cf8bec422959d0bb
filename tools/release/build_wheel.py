"""Builds the sdist, and from it the wheel: one for every Python 3.10+ and every torch >= 2.10 of a
platform.

    python tools/release/build_wheel.py  CPU and CUDA kernels: needs nvcc, no GPU
    python tools/release/build_wheel.py --cuda 0  CPU kernels alone
    python tools/release/build_wheel.py --cpu 0 --cuda 0
        # pure Python: the Triton and the reference kernels
    python tools/release/build_wheel.py --machine aarch64 --cuda 0
        # cross-compiled by aarch64-linux-gnu-g++

Needs torch >= 2.10 (its headers; a CPU build does), setuptools, wheel, ninja and g++. Nothing is
downloaded. The wheel is built in a temporary folder from the sdist, so that nothing of the working
tree but the sdist's files is in it; its tag is the lowest manylinux tag that its symbols allow
(audit.py). On a system newer than manylinux_2_28 it is linked through older_glibc.py.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))
import audit
import older_glibc

import setup as build

ROOT = Path(__file__).parents[2]
NOT_SOURCE = (
    ".git",
    ".venv",
    ".compat",
    ".*_cache",
    ".hypothesis",
    ".coverage*",
    "build",
    "dist",
    "out",
    "site",
    "*.egg-info",
)
NOT_SOURCE += ("__pycache__", "*.so", "shared")
COMPILERS = {"x86_64": "g++", "aarch64": "aarch64-linux-gnu-g++"}
MIN_DRIVERS = {"12": "525", "13": "580"}


def backend(step: str, out: Path, folder: Path, environment: dict[str, str]) -> Path:
    """The file that `step` (build_sdist, build_wheel) of setuptools makes of `folder`, as pip
    would, without its isolation."""
    code = f"from setuptools import build_meta; print('made', build_meta.{step}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    for line in done.stdout.splitlines():
        kernels = step == "build_wheel" and line.startswith("dipkernels build:")
        if kernels or done.returncode:
            print(line)
    if done.returncode:
        raise SystemExit(f"{step} failed")
    return out / re.findall(r"^made (.+)$", done.stdout, re.MULTILINE)[-1]


def commit_time() -> str:
    """Seconds since 1970 of SOURCE_DATE_EPOCH or of the last commit: the date of every file in the
    wheel, so that two builds of it are alike."""
    if date := os.environ.get("SOURCE_DATE_EPOCH"):
        return date
    done = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "1704067200"


def glibc() -> tuple[int, ...]:
    return tuple(map(int, platform.libc_ver()[1].split(".")))


def toolkit() -> str:
    """The release of the nvcc that setup.py finds, such as 12.8, and what it means to the user."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        raise SystemExit(
            "--cuda 1: there is no nvcc (NVCC, CUDA_HOME, CUDA_PATH, PATH); --cuda 0 builds a "
            "wheel without CUDA kernels"
        )
    release: str = build.toolkit(nvcc)
    print(
        f"wheel: CUDA {release}, so the CUDA kernels need an NVIDIA driver >= "
        f"{MIN_DRIVERS.get(release.split('.')[0], '?')}"
    )
    return release


def make_sdist(out: Path) -> Path:
    """From a copy: setuptools writes into the folder that it packs."""
    environment = {
        **os.environ,
        "DIPKERNELS_CPU": "1",
        "DIPKERNELS_CUDA": "0",
        "SOURCE_DATE_EPOCH": commit_time(),
    }
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "dipkernels"
        shutil.copytree(
            ROOT,
            copy,
            ignore=shutil.ignore_patterns(*NOT_SOURCE),
        )
        for path in (copy, *copy.rglob("*")):  # whatever the modes of the checkout
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        return backend("build_sdist", out, copy, environment)


def make_wheel(sdist: Path, out: Path, cpu: bool, cuda: bool, machine: str) -> Path:
    environment = {**os.environ, "DIPKERNELS_CPU": str(int(cpu)), "DIPKERNELS_CUDA": str(int(cuda))}
    environment |= {"SOURCE_DATE_EPOCH": commit_time(), "_PYTHON_HOST_PLATFORM": f"linux-{machine}"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.unpack_archive(sdist, folder)
        if cpu or cuda:
            compiler = os.environ.get("CXX") or (
                "g++" if machine == platform.machine() else COMPILERS[machine]
            )
            environment["CXX"] = compiler
            flags = [os.environ.get("LDFLAGS", ""), "-Wl,-s"]
            if machine != platform.machine():
                flags.append(stand_in_for_torch(compiler, folder / "stand-ins"))
            if glibc() > older_glibc.LIMITS["GLIBC"]:
                flags.append(older_glibc.link_flags(compiler, folder / "stand-ins"))
            environment["LDFLAGS"] = " ".join(flags)
        built = backend(
            "build_wheel", folder / "out", next(folder.glob("dipkernels-*")), environment
        )
        return retagged(built, out)


def stand_in_for_torch(compiler: str, folder: Path) -> str:
    """Flags that name libtorch_cpu.so without having one of that machine: torch's symbols stay for
    the loader to find."""
    folder.mkdir(parents=True, exist_ok=True)
    names = filter(audit.STABLE_ABI.fullmatch, audit.exported(torch_library()))
    offered = {name: ("TORCH", "FUNC", 0) for name in names}
    older_glibc.write_stand_in(compiler, folder, "torch_cpu", audit.TORCH, offered, versioned=False)
    return f"-L{shlex.quote(str(folder))}"


def torch_library() -> Path:
    import torch

    return Path(torch.__file__).parent / "lib" / audit.TORCH


def retagged(wheel: Path, out: Path) -> Path:
    """The wheel in `out`, under the tag that its library honestly has."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        if "dipkernels/_C.so" not in archive.namelist():
            return Path(shutil.copy(wheel, out))
        tag = audit.honest_tag(Path(archive.extract("dipkernels/_C.so", folder)))
    command = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, wheel]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": commit_time()}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return Path(shutil.copy(wheel.parent / done.stdout.split()[-1], out))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", type=int, choices=(0, 1), default=1)
    parser.add_argument("--cuda", type=int, choices=(0, 1), default=1)
    parser.add_argument("--machine", choices=sorted(COMPILERS), default=platform.machine())
    parser.add_argument("--toolkit", help="refuse another CUDA toolkit than this, such as 12.8")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--sdist-only", action="store_true")
    arguments = parser.parse_args()
    os.umask(0o022)  # the modes of files are bytes of the wheel
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.cuda and not arguments.sdist_only:
        release = toolkit()
        if arguments.toolkit not in (None, release):
            raise SystemExit(f"--toolkit: expected CUDA {arguments.toolkit}, got nvcc {release}")
    sdist = make_sdist(arguments.out.resolve())
    print(f"wheel: {sdist.name}, {sdist.stat().st_size / 1e3:.0f} kB")
    if arguments.sdist_only:
        return 0
    start = time.perf_counter()
    wheel = make_wheel(
        sdist, arguments.out, bool(arguments.cpu), bool(arguments.cuda), arguments.machine
    )
    seconds = time.perf_counter() - start
    print(
        f"wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.2f} MB, built in {seconds:.0f} s on "
        f"{os.cpu_count()} cores"
    )
    return audit.main([str(wheel)])


if __name__ == "__main__":
    sys.exit(main())
