"""u = x + sigma * z and its backward pass, against x + sigma * torch.randn_like(x)."""

import peers
import pytest
import torch
from timing import Case

import dipkernels as dip

_SHAPES = [(4096, 1024), (65536, 64), (32, 128)]
_FULL = [Case(dtype, shape) for dtype in (torch.float32, torch.bfloat16) for shape in _SHAPES]
CASES = {
    "cpu": _FULL,
    "cuda": [*_FULL, Case(torch.bfloat16, (8192, 8192))],
    "quick": [Case(torch.float32, (9, 24))],
}
# A copy is the limit: it reads and writes what any noise must.
NAMES = ("copy", "dip", "eager", "eager, compiled", "dropout")


def _inputs(device, case):
    x = torch.randn(case.shape, device=device).to(case.dtype)
    sigma = torch.full(case.shape[-1:], peers.SIGMA, device=device)
    return x, sigma, torch.tensor([peers.KEY, 3], device=device)


def _eager(x, sigma):
    return x + sigma.to(x.dtype) * torch.randn_like(x)


def _function(name, seed):
    if name == "copy":
        return lambda x, sigma: x.clone()
    if name == "dip":
        return lambda x, sigma: dip.functional.perturb(x, sigma, seed)
    if name == "dropout":
        return lambda x, sigma: torch.nn.functional.dropout(x, peers.DROPOUT)
    return (
        torch.compile(_eager, backend=peers.compile_backend, dynamic=False)
        if "compiled" in name
        else _eager
    )


@pytest.mark.parametrize("name", NAMES)
def bench_perturb(name, device, case, timed):
    x, sigma, seed = _inputs(device, case)
    peers.check_perturb(x, sigma, seed)
    function = _function(name, seed)
    with torch.no_grad():
        timed(lambda: function(x, sigma), name, "perturb", bytes_moved=2 * x.nbytes)


@pytest.mark.parametrize("name", NAMES[1:])  # the backward of a copy copies nothing
def bench_perturb_backward(name, device, case, timed):
    """The gradients of x and sigma. Dropout has none of sigma."""
    x, sigma, seed = _inputs(device, case)
    peers.check_perturb(x, sigma, seed)
    x.requires_grad_(True)
    sigma.requires_grad_(True)
    u, du = _function(name, seed)(x, sigma), torch.randn_like(x)
    leaves = [x] if name == "dropout" else [x, sigma]
    if "compiled" in name:  # compiled graphs free what they saved
        function = _function(name, seed)
        timed(
            lambda: torch.autograd.grad(function(x, sigma), leaves, du),
            name,
            "perturb backward",
            includes="forward",
        )
    else:
        timed(
            lambda: torch.autograd.grad(u, leaves, du, retain_graph=True), name, "perturb backward"
        )
