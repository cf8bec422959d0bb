"""Builds tests/header_module.cpp with pybind11, once for the portable flags and once for all that
this machine offers."""

import functools
import importlib.util
import os
import sysconfig
from pathlib import Path

import pybind11
from program_support import printed

HERE = Path(__file__).parent
FLAGS = {"portable": "", "native": "-march=native"}


@functools.cache
def header_module(kind: str):
    folder = HERE.parent / "build" / "tests" / kind
    folder.mkdir(parents=True, exist_ok=True)
    name = f"header_module_{kind}"  # one name each: an extension module is cached by its name
    out = folder / f"{name}.so"
    sources = [HERE / "header_module.cpp", *(HERE.parent / "csrc").rglob("*.h")]
    if not out.exists() or out.stat().st_mtime < max(s.stat().st_mtime for s in sources):
        flags = f"-std=c++17 -O2 -w -fPIC -shared -fvisibility=hidden -ffp-contract=off -DDIP_MODULE={name} {FLAGS[kind]}".split()
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        own = f"{out}.{os.getpid()}"  # another process may build too: the module appears whole
        command = [os.environ.get("CXX", "g++"), *flags, *includes, str(sources[0]), "-o", own]
        printed(*command)
        os.replace(own, out)
    spec = importlib.util.spec_from_file_location(name, out)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_vectors(name: str) -> list[list[str]]:
    lines = (HERE / "vectors" / name).read_text().splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]
