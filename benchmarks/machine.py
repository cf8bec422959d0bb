"""What a figure was measured on: machine, versions, commit and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from dipkernels import backends

ROOT = Path(__file__).resolve().parent.parent
VENDORS = {"amd": "amd|epyc|ryzen", "intel": "intel|xeon", "arm": "arm|aarch64|neoverse|graviton"}
IN_PLACE = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "tcache_count": 0,
        "mxfast": 0,
        "mmap_max": 0,
        "trim_threshold": 2**31 - 1,
    }.items()
)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in reversed(lines))
    }


def _cpu_name(processor: dict[str, str]) -> str:
    """The processor's name, with the family and model that tell its generation: a virtual machine
    often names none."""
    if "model name" not in processor:
        return platform.processor() or platform.machine()
    return (
        f"{processor['model name']} (family {processor.get('cpu family', '?')}, model "
        f"{processor.get('model', '?')})"
    )


def _instruction_set(processor: dict[str, str]) -> str:
    """The best that torch's kernels use, or AMX where the processor multiplies bfloat16 by it and
    torch is not told to do with less (ATEN_CPU_CAPABILITY)."""
    best = torch.backends.cpu.get_cpu_capability()
    amx = "amx_tile" in processor.get("flags", "").split()
    return "AMX" if amx and best == "AVX512" else best


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: torch.device | str) -> dict:
    """Everything that a stored row carries about where it comes from."""
    device, processor = torch.device(device), _processor()
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": device.type,
        "cpu": _cpu_name(processor),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # over the minute before: others' work as well
        "load_average": round(os.getloadavg()[0], 2),
        "instruction_set": _instruction_set(processor),
        "backend": backends.choose("perturb", device.type).backend,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "bayesian_torch": _version("bayesian-torch"),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def kind_of(found: dict) -> str:
    """The kind of a machine: of the GPU where one was measured ("h100"), else the processor's maker
    ("amd")."""
    if found.get("gpu"):
        words = re.sub(r"nvidia|geforce|tesla|[^a-z0-9]+", " ", found["gpu"].lower()).split()
        numbered = next((i for i, word in enumerate(words) if re.search(r"\d", word)), len(words))
        return "".join(words[: numbered + 1])
    for vendor, pattern in VENDORS.items():
        if re.search(rf"\b({pattern})", found["cpu"].lower()):
            return vendor
    raise ValueError(f"machine: expected a processor of {', '.join(VENDORS)}, got {found['cpu']!r}")


def sentence(found: dict) -> str:
    """One line for tables, plots and documentation."""
    changed = " (modified)" if found["modified"] else ""
    in_place = ", memory in place" if found.get("glibc_tunables") == IN_PLACE else ""
    cores = f"{found['threads']} of {found['cores']} cores"
    cpu = f"{found['cpu']}, {cores}, {found['instruction_set']}{in_place}"
    where = found.get("gpu") or cpu
    return (
        f"{where}; torch {found['torch']}; commit {found['commit']}{changed}; "
        f"{found['date'][:10]}; load average before the run {found['load_average']}"
    )


def restart_in_place() -> None:
    """Start this program again with glibc told to use the same memory again, unless GLIBC_TUNABLES
    says something, if but "".

    Left alone glibc gives large tensors back to the system, and takes their pages anew, or puts
    each beside the last one's place, so that a loop walks through more memory than it uses:
    milliseconds, on whichever variant it hits.
    """
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = IN_PLACE
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
