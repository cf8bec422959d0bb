"""What csrc/perturb_op.cpp hands to the CUDA kernels: the real source, with functions that take
notes in place of the kernels, of torch's streams and of its device guard; no GPU, no nvcc."""

import json
from pathlib import Path

import pytest
import torch
from program_support import PYTHON, needs, printed
from source_support import ROOT

pytestmark = [
    needs("g++"),
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="this torch has streams of its own: tests/gpu"
    ),
]
STAND_INS = """
#include <cstring>
#include "launch.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
namespace {
int64_t scratch = 0;
const char* answer = nullptr;
struct Notes {
  int32_t form, device, guards;  // guards: that are set
  int64_t stream, features, passes;  // passes: 1 writes u, 2 sums
  bool has_scratch;
} notes{};
}
EXPORT void prepare(int64_t bytes, const char* error) { scratch = bytes, answer = error, notes = {}; }
EXPORT Notes taken() { return notes; }
EXPORT int aoti_torch_create_device_guard(int32_t device, void** guard) {
  notes.device = device, ++notes.guards;
  *guard = &notes;
  return 0;
}
EXPORT int aoti_torch_delete_device_guard(void*) { return --notes.guards, 0; }
EXPORT int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(int64_t{1000} + device);
  return 0;
}
namespace dip {
int64_t perturb_cuda_scratch(const PerturbArgs&, const CudaForm&) { return scratch; }
const char* perturb_cuda(const PerturbArgs& a, const CudaForm& form, void* partials, void* stream) {
  notes.form = form.writes_from_end + 2 * form.sums_from_end + 4 * form.one_launch;
  notes.stream = reinterpret_cast<int64_t>(stream);
  notes.features = a.features;
  notes.passes = (a.u.data != nullptr) + 2 * (a.dsigma != nullptr);
  notes.has_scratch = partials != nullptr && notes.guards == 1;
  if (partials) std::memset(partials, 1, scratch);
  return answer;
}
}
"""
# Calls of CPU tensors, sent to the kernels that are registered for CUDA.
CALLS = """
import ctypes, json, sys, torch, dipkernels
path = sys.argv[1]
torch.ops.load_library(path)
library = ctypes.CDLL(path)
names = ("form", "device", "guards", "stream", "features", "passes", "has_scratch")
types = [ctypes.c_int32] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_bool]
class Notes(ctypes.Structure):
    _fields_ = [*zip(names, types)]
library.taken.restype = Notes
library.dip_build_info.restype = ctypes.c_char_p
library.prepare.argtypes = [ctypes.c_int64, ctypes.c_char_p]
x, sigma, seed = torch.ones(3, 5), torch.ones(5), torch.tensor([1, 2])
where = (-1, 0, 0, 0)
arguments = {
    "noise": (seed, [3, 5], *where),
    "perturb": (x, sigma, seed, *where, 1.0, False, None),
    "perturb_bwd": (x, sigma, seed, *where, 1.0, False),
    "perturb_replay": (x, x, sigma, seed, *where, 1.0, False, None),
}
def call(op, scratch=0, error=None):
    library.prepare(scratch, error)
    operation = getattr(torch.ops.dipkernels, op).default
    try:
        operation.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments[op])
    except RuntimeError as failed:
        return str(failed)
    return {name: getattr(library.taken(), name) for name in names}
said = {"ops": {op: call(op) for op in arguments}, "forms": {}}
for bits in range(8):
    library.dip_set_cuda_forms(bits)
    said["forms"][library.dip_cuda_forms()] = call("perturb_bwd")["form"]
said["scratch"] = call("perturb_bwd", 1 << 20)["has_scratch"]
said["error"] = call("perturb", 0, b"the kernels say so")
said["info"] = library.dip_build_info().decode().splitlines()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    (folder / "stand_ins.cpp").write_text(STAND_INS)
    # Its own stand-ins come first, and the source finds it as torch's CUDA library, by this name.
    library = folder / "libtorch_cuda.so"
    command = ["g++", "-std=c++17", "-O0", "-w", "-fPIC", "-shared", "-Wl,-Bsymbolic"]
    command += [f"-Wl,-soname,{library.name}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ['-DDIP_CUDA_ARCHS="90 100"', '-DDIP_CUDA_TOOLKIT="12.8"', f"-I{ROOT / 'csrc'}"]
    installed = Path(torch.__file__).parent
    command += [f"-I{installed / 'include'}", str(folder / "stand_ins.cpp")]
    command += [str(ROOT / "csrc" / "perturb_op.cpp"), f"-L{installed / 'lib'}", "-ltorch_cpu"]
    printed(*command, "-ldl", "-o", library)
    return json.loads(printed(PYTHON, "-c", CALLS, library, env={"TRITON_INTERPRET": ""}))


def test_every_operation_reaches_the_cuda_kernels(said):
    passes = {"noise": 1, "perturb": 1, "perturb_bwd": 2, "perturb_replay": 3}
    assert {op: notes["passes"] for op, notes in said["ops"].items()} == passes
    for notes in said["ops"].values():
        # on the tensors' device, under its guard and on its stream, as the default form
        assert notes["features"] == 5 and notes["form"] == 1 and not notes["has_scratch"]
        assert notes["guards"] == 0 and notes["stream"] == 1000 + notes["device"]


def test_cuda_forms_are_the_bits_that_are_set(said):
    assert said["forms"] == {str(bits): bits for bits in range(8)}


def test_scratch_is_allocated_where_the_kernels_want_some(said):
    assert said["scratch"] is True


def test_what_the_cuda_kernels_say_is_passed_on(said):
    assert "dipkernels: the kernels say so" in said["error"]
    info = dict(line.split("=", 1) for line in said["info"])
    assert info["cuda"] == "90 100" and info["toolkit"] == "12.8" and info["cpu"] == ""
