"""Is a wheel, or a compiled library, what its name says?  Exit status 1 and one line for each thing
that is not.

    python tools/release/audit.py dist/dipkernels-0.1.0-py3-none-manylinux_2_28_x86_64.whl
    python tools/release/audit.py dipkernels/_C.so

Of the library: what it needs (NEEDED) is on every system of its tag or is libtorch_cpu.so; the
symbol versions fit the tag; it takes from torch the C functions of the stable ABI alone, which a
CPU build and a CUDA build both have; no Python symbols; exports only dip_*; carries no path of the
machine that built it. Of the wheel: its files are the package's own, the tag is the library's,
nothing is pickled.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

SYSTEM = {
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
    "libgcc_s.so.1",
}
LOADERS = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
TORCH = "libtorch_cpu.so"
STABLE_ABI = re.compile(r"(aoti_torch_|torch_)\w+")
LINKER = {
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
    "__gmon_start__",
}  # weak, looked up and never needed
# The newest GLIBCXX and CXXABI of each manylinux tag, as auditwheel's policies have them; none
# below torch's own wheels.
TAGS = {
    (2, 28): ((3, 4, 24), (1, 3, 11)),
    (2, 31): ((3, 4, 28), (1, 3, 12)),
    (2, 34): ((3, 4, 29), (1, 3, 13)),
    (2, 35): ((3, 4, 30), (1, 3, 13)),
    (2, 39): ((3, 4, 33), (1, 3, 15)),
}
PATHS = re.compile(rb"/(?:home|root|tmp|work|build|usr/local|opt|__w|github)/[\w./+-]+")


def output(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-dW", library)))


def undefined(library: Path) -> dict[str, str]:
    """{symbol: its version, or ""}."""
    names = [
        line.split()[-1] for line in output("nm", "-D", "--undefined-only", library).splitlines()
    ]
    return {name.partition("@")[0]: name.partition("@")[2].lstrip("@") for name in names}


def exported(library: Path) -> set[str]:
    return {
        line.split()[-1].partition("@")[0]
        for line in output("nm", "-D", "--defined-only", library).splitlines()
    }


def machine(library: Path) -> str:
    text = output("readelf", "-hW", library)
    return "aarch64" if "AArch64" in text else "x86_64" if "X86-64" in text else "unknown"


def newest(library: Path, family: str) -> tuple[int, ...]:
    versions = [v for v in undefined(library).values() if re.fullmatch(family + r"_\d[\d.]*", v)]
    return max((tuple(map(int, v.rpartition("_")[2].split("."))) for v in versions), default=())


def honest_tag(library: Path) -> str:
    """The lowest manylinux tag, from torch's own on, whose systems have every symbol version that
    the library asks for."""
    glibc, glibcxx, cxxabi = (newest(library, family) for family in ("GLIBC", "GLIBCXX", "CXXABI"))
    for tag, (has_glibcxx, has_cxxabi) in TAGS.items():
        if glibc <= tag and glibcxx <= has_glibcxx and cxxabi <= has_cxxabi:
            return f"manylinux_{tag[0]}_{tag[1]}_{machine(library)}"
    return f"linux_{machine(library)}"


def library_problems(library: Path) -> list[str]:
    problems = [f"needs {name}" for name in sorted(needed(library) - SYSTEM - LOADERS - {TORCH})]
    if TORCH not in needed(library):
        problems.append(f"does not need {TORCH}")
    for name, version in undefined(library).items():
        if name.startswith(("Py", "_Py")):
            problems.append(f"asks for the Python symbol {name}")
        elif not version and name not in LINKER and not STABLE_ABI.fullmatch(name):
            problems.append(f"asks for {name}, which is no function of torch's stable ABI")
    problems += [
        f"exports {name}" for name in sorted(exported(library)) if not name.startswith("dip_")
    ]
    found = {path.decode() for path in PATHS.findall(library.read_bytes())} - KNOWN_PATHS
    problems += [f"carries the path {path}" for path in sorted(found)]
    return problems


# In the static CUDA runtime: where NVIDIA's multi-process service keeps its pipe.
KNOWN_PATHS = {"/tmp/nvidia-mps"}
ROOMS = "integrations|integrations/transformers|models|nn|noise|ops|training|triton_kernels"
PACKAGE = re.compile(rf"dipkernels/(?:(?:{ROOMS})/)?\w+\.py|dipkernels/(?:py\.typed|_C\.so)")
METADATA = re.compile(
    r"dipkernels-[\w.+]+\.dist-info/(?:METADATA|WHEEL|RECORD|top_level\.txt|licenses/[\w.]+|sboms/[\w.-]+)"
)


def wheel_problems(wheel: Path) -> list[str]:
    problems = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        problems += [
            f"has the file {n}"
            for n in names
            if not PACKAGE.fullmatch(n) and not METADATA.fullmatch(n)
        ]
        problems += [
            f"has the path {n}" for n in names if PurePosixPath(n).is_absolute() or ".." in n
        ]
        for name in (
            "dipkernels/__init__.py",
            "dipkernels/py.typed",
            "dipkernels/triton_kernels/noise.py",
        ):
            if name not in names:
                problems.append(f"lacks {name}")
        platform = wheel.stem.rpartition("-")[2]
        if "dipkernels/_C.so" in names:
            library = Path(archive.extract("dipkernels/_C.so", folder))
            problems += [f"_C.so {problem}" for problem in library_problems(library)]
            if platform != honest_tag(library):
                problems.append(f"is tagged {platform}, its library is {honest_tag(library)}")
        elif platform != "any":
            problems.append(f"is tagged {platform} and has no library")
    return problems


def main(paths: list[str]) -> int:
    status = 0
    for path in map(Path, paths):
        problems = wheel_problems(path) if path.suffix == ".whl" else library_problems(path)
        for problem in problems:
            print(f"{path.name} {problem}")
        print(f"{path.name}: {'not as it should be' if problems else 'as it should be'}")
        status |= bool(problems)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
