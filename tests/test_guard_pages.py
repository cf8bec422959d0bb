"""No kernel touches a byte outside its tensors: exact extents between guard pages, gaps that hold a
pattern.  docs/reliability.md."""

import mmap
import sys

import pytest
import sanitize
import torch
from program_support import PYTHON, needs, printed, program_at, ran
from source_support import ROOT

from dipkernels import library

SEED = torch.tensor([0x0123456789ABCDEF, 3])
needs_compiler = needs("g++")


@pytest.fixture(scope="session")
def guarded():
    return sanitize.build("guard", ROOT / "build" / "tests" / "guard")


def test_two_processes_may_build_the_program_at_once(tmp_path, monkeypatch):
    """No file is written by both, and none but a whole program stands where one is looked for."""
    wrote = tmp_path / "wrote"
    compiler = program_at(
        tmp_path / "c++",
        'for word; do [ "$before" = -o ] && echo made > "$word" '
        f'&& echo "$word" >> {wrote}; before=$word; done; :',
    )
    monkeypatch.setenv("CXX", str(compiler))
    for _ in range(2):
        program = sanitize.build("guard", tmp_path / "guard")
        assert program.read_text() == "made\n"
        program.unlink()
    files = wrote.read_text().split()
    assert len(set(files)) == len(files) > 4 and str(program) not in files


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_stay_inside_their_buffers(guarded, threads):
    """Values, edges and gaps of random cases, on every instruction set: a byte outside is a
    segmentation fault."""
    assert "200 cases of perturb" in sanitize.run(guarded, 400, threads, threads)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_report_a_failed_allocation(guarded, threads):
    """Each allocation of a kernel fails in turn: "out of memory" comes back, whichever thread it
    was."""
    assert "200 cases of perturb" in sanitize.run(guarded, 400, threads, threads, "fail")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_kernels_under_sanitizers(kind, tmp_path):
    program = sanitize.build(kind, tmp_path)
    for mode in ("run", "fail"):
        assert "2000 cases of perturb" in sanitize.run(program, 4000, 7, 4, mode)


# ---- the library, called from torch on tensors at the very edge of what may be read --------------

EDGES = """
import ctypes, itertools, mmap, sys
import torch
from dipkernels.ops.draw import Draw
from dipkernels.ops.perturb import perturb, perturb_bwd, perturb_replay
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

def at_edge(t, end):
    "t's values in memory whose last byte (or first) is the last (or first) that may be touched"
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    inside = -(-max(size, 1) // page) * page
    base = libc.mmap(None, inside + 2 * page, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert libc.mprotect(base + page, inside, 3) == 0
    start = base + page + (inside - size if end else 0)
    out = torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=t.dtype).view(t.shape)
    return out.copy_(t)

if sys.argv[1] == "overrun":
    x = at_edge(torch.zeros(8), True)
    ctypes.memset(x.data_ptr(), 0, 33)
seed = torch.tensor([0x0123456789ABCDEF, 3])
for dtype, (shape, dim), end in itertools.product(
    (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    [((3, 7), -1), ((5, 64), -1), ((2, 513), -1), ((1, 1), -1), ((2, 5, 3), 1), ((2, 9, 130), 1)],
    (False, True),
):
    x, du = torch.randn(2, *shape, dtype=torch.float64).to(dtype)
    sigma = torch.rand(shape[dim])
    where = (dim, 5, 3, 0, 1.0, False)
    want = perturb_replay(du, x, sigma, seed, Draw(*where), None)
    got = perturb_replay(at_edge(du, end), at_edge(x, end), at_edge(sigma, end), at_edge(seed, end), Draw(*where), None)
    assert all(torch.equal(a, b) for a, b in zip(got, want)), (dtype, shape)
    assert torch.equal(perturb(at_edge(x, end), at_edge(sigma, end), seed, Draw(*where), None), want[0])
    assert torch.equal(perturb_bwd(at_edge(du, end), at_edge(sigma, end), seed, Draw(*where)), want[1])
print("inside")
"""


@pytest.mark.skipif(
    not hasattr(mmap, "MAP_ANONYMOUS") or sys.platform != "linux", reason="needs mprotect"
)
@pytest.mark.skipif(
    "portable" not in library.load().cpu_capabilities, reason="needs the compiled library"
)
def test_operations_read_nothing_outside_their_tensors():
    assert printed(PYTHON, "-c", EDGES, "inside") == "inside\n"
    outside = ran(PYTHON, "-c", EDGES, "overrun")
    assert outside.returncode < 0, "the guard page does not guard"
