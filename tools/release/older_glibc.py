"""Link against an older glibc than this machine's: stand-ins that offer only the symbol versions of
manylinux_2_28.

A library linked on a new system asks for the newest version of every C function, and then loads on
no older system, though the older versions are still there. The stand-ins written here hold, of each
system library, its symbols at the newest version that the limit allows, so that the linker can
choose no other: what it would choose on a system of that age. What is missing there comes from
libstdc++.a. In a container of that age this is not needed.

    flags = older_glibc.link_flags("g++", folder)       # put before the other libraries
"""

import re
import shlex
import subprocess
from pathlib import Path

import audit

# What manylinux_2_28 allows (auditwheel's policy), and the libraries that the compiled library may
# name.
LIMITS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
LIBRARIES = {name.removeprefix("lib").partition(".")[0]: name for name in sorted(audit.SYSTEM)}
LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
# Read by libstdc++'s headers since glibc 2.32, to skip atomics in a program of one thread: 0,
# "there may be threads", is always true.
COMPAT = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'
TYPES = {"FUNC": "@function", "IFUNC": "@function", "OBJECT": "@object", "TLS": "@tls_object"}


def version(text):
    """("GLIBC", (2, 28)) of GLIBC_2.28; None for a private or a named version."""
    found = re.fullmatch(r"([A-Z]+)_(\d[\d.]*)", text)
    return (found.group(1), tuple(map(int, found.group(2).split(".")))) if found else None


def allowed(text):
    parsed = version(text)
    return parsed is not None and parsed[0] in LIMITS and parsed[1] <= LIMITS[parsed[0]]


def symbols(library):
    """{name: (version, type, size)} of a shared library: each name at its newest allowed
    version."""
    found = {}
    for line in audit.output("readelf", "-W", "--dyn-syms", library).splitlines():
        fields = line.split()
        if len(fields) < 8 or fields[6] == "UND" or fields[3] not in TYPES or fields[4] == "LOCAL":
            continue
        name, _, tag = fields[7].replace("@@", "@").partition("@")
        if not allowed(tag):
            continue
        if name not in found or version(found[name][0])[1] < version(tag)[1]:
            found[name] = (tag, fields[3], int(fields[2], 0))
    return found


def write_stand_in(compiler, folder, short, soname, offered, versioned=True):
    """A shared library of that name with these symbols and nothing behind them; to link against,
    never to load."""
    lines, nodes = [".data"], {}
    for name, (tag, kind, size) in sorted(offered.items()):
        nodes.setdefault(tag, []).append(name)
        if kind == "TLS":
            lines += ['.section .tdata,"awT",@progbits']
        lines += [
            f".globl {name}",
            f".type {name},{TYPES[kind]}",
            f".size {name},{size}",
            f"{name}: .byte 0",
            ".data",
        ]
    source, script = folder / f"{short}.s", folder / f"{short}.map"
    source.write_text("\n".join(lines) + "\n")
    script.write_text(
        "".join(f"{tag} {{ {'; '.join(names)}; }};\n" for tag, names in nodes.items())
    )
    out = folder / f"lib{short}.so"
    options = [f"-Wl,--version-script={script}"] if nodes and versioned else []
    subprocess.run(
        [compiler, "-shared", "-nostdlib", source, "-o", out, f"-Wl,-soname,{soname}", *options],
        check=True,
    )
    return out


def link_flags(compiler, folder):
    """Writes the stand-ins for `compiler`'s target into `folder`; the flags that link against
    them."""
    folder.mkdir(parents=True, exist_ok=True)

    def where(name):
        return audit.output(compiler, f"-print-file-name={name}").strip()

    machine = audit.output(compiler, "-dumpmachine").split("-")[0]
    for short, soname in {**LIBRARIES, "loader": LOADERS[machine]}.items():
        write_stand_in(compiler, folder, short, soname, symbols(where(soname)))
    (folder / "compat.c").write_text(COMPAT)
    compat = folder / "compat.o"
    subprocess.run(
        [compiler, "-x", "c", "-fPIC", "-c", folder / "compat.c", "-o", compat], check=True
    )
    archives = where("libstdc++.a"), where("libc_nonshared.a")
    # Before glibc 2.34 dlopen, threads and timers lay in libraries of their own: name them,
    # whatever this system thinks.
    compat, folder, *archives = (shlex.quote(str(path)) for path in (compat, folder, *archives))
    return (
        f"{compat} -L{folder} -Wl,--no-as-needed -ldl -lpthread -lrt -Wl,--as-needed -lstdc++ -lm "
        f"-lc -lgcc_s -lloader {' '.join(archives)} -lgcc -Wl,-z,defs"
    )


if __name__ == "__main__":
    import sys

    print(link_flags(sys.argv[1], Path(sys.argv[2]).resolve()))
