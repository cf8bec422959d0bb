"""The noise contract on a device, over every argument: words, radii and angles are the host's bit
for bit."""

import ctypes
import math
from pathlib import Path

import pytest
import torch
from program_support import find_tool, needs, printed

HERE = Path(__file__).parent
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-shared",
    "-Xcompiler",
    "-fPIC,-ffp-contract=off",
]

pytestmark = needs("nvcc")


def build(folder, arch):
    library = folder / "noise_probe.so"
    options = [*FLAGS, f"-arch=sm_{arch}"]
    printed(find_tool("nvcc"), *options, HERE / "noise_probe.cu", "-o", library)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    major, minor = torch.cuda.get_device_capability()
    return build(tmp_path_factory.mktemp("probe"), f"{major}{minor}")


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


def device_and_host(probe, name, *shape):
    device, host = torch.full(shape, math.nan, device="cuda"), torch.full(shape, math.nan)
    torch.cuda.synchronize()
    assert getattr(probe, f"probe_{name}")(pointer(device)) == 0
    getattr(probe, f"host_{name}")(pointer(host))
    return device.cpu(), host


def test_words_match_known_answers(probe):
    lines = [
        line.split()
        for line in (HERE.parent / "vectors" / "philox4x32.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    table = torch.tensor([[int(word, 16) for word in line] for line in lines], device="cuda")
    counters = table[:, :4].contiguous()
    keys = table[:, 4:6].contiguous()
    out = torch.zeros(len(lines), 4, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    assert probe.probe_words(pointer(counters), pointer(keys), pointer(out), len(lines)) == 0
    assert torch.equal(out, table[:, 6:])


def test_radius_is_the_hosts_on_all_arguments(probe):
    """The corrected reciprocal square root is the IEEE root on all 2^20 radii, so device and host
    agree to the bit."""
    device, host = device_and_host(probe, "radii", 2**20)
    different = torch.nonzero(device != host).flatten()
    assert not len(different), f"{len(different)} radii differ, the first at i = {different[0]}"


def test_cosine_and_sine_are_the_hosts_on_all_angles(probe):
    device, host = device_and_host(probe, "angles", 4096, 2)
    assert torch.equal(device, host)
