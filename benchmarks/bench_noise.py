"""z, standard normals: dipkernels.functional.noise against torch.randn."""

import peers
import pytest
import torch
from timing import Case

import dipkernels as dip
from dipkernels import reference

_FULL = [
    Case(torch.float32, (4096, 1024)),
    Case(torch.float32, (65536, 64)),
    Case(torch.float32, (32, 128)),
]
CASES = {
    "cpu": _FULL,
    "cuda": [*_FULL, Case(torch.float32, (8192, 8192))],
    "quick": [Case(torch.float32, (9, 24))],
}


@pytest.mark.parametrize("name", ["dip", "torch.randn", "torch.randn, compiled"])
def bench_noise(name, device, case, timed):
    seed = torch.tensor([peers.KEY, 3], device=device)

    def randn():
        return torch.randn(case.shape, device=device)

    if name == "dip":
        rows, columns = min(case.shape[0], 256), case.shape[1]
        want = reference.noise(seed, (rows, columns), -1, case.shape[0] - rows, 0, 0)
        assert (dip.functional.noise(case.shape, seed)[-rows:] - want).abs().max() <= 4e-6
        call = lambda: dip.functional.noise(case.shape, seed)  # noqa: E731
    else:
        call = torch.compile(randn, backend=peers.compile_backend) if "compiled" in name else randn
    timed(call, name, "noise")
