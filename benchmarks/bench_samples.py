"""S samples averaged in a layer, and m trajectories through a network."""

import copy

import networks
import peers
import pytest
import timing
import torch
from timing import Case
from torch import nn

import dipkernels as dip

_CASE = Case(torch.float32, (512, 1024, 1024))
CASES = {
    "cpu": [_CASE],
    "cuda": [_CASE, Case(torch.bfloat16, (8192, 1024, 1024))],
    "quick": [Case(torch.float32, (8, 16, 16))],
}


class _MeanOf(nn.Module):
    """The mean of S passes, as a user writes it."""

    def __init__(self, module: nn.Module, samples: int) -> None:
        super().__init__()
        self.module, self.samples = module, samples

    def forward(self, x):
        return sum(self.module(x) for _ in range(self.samples)) / self.samples


@pytest.mark.parametrize("samples", [1, 4, 16, 64])
@pytest.mark.parametrize("name", peers.NAMES)
def bench_samples(name, samples, device, case, build, timed):
    plain, x, dy = peers.inputs_of(case.shape, case.dtype, device)
    if name == "dip":
        layer = copy.deepcopy(plain)
        module = dip.convert(layer, init_variance=peers.VARIANCE, num_samples=samples)
        peers.check_dip_linear(module, x, dy)
    else:
        module = build(name, plain)
        peers.check_linear(name, module, plain, x, dy)
        if name != peers.PLAIN:
            module = _MeanOf(module, samples)
    saved = timing.saved_bytes(lambda: module(x), list(module.parameters()))
    group = f"S = {samples} averaged, training step"
    timed(timing.training_step(module, x, dy), name, group, samples=samples, saved_bytes=saved)


@pytest.mark.parametrize("m", [1, 2, 4, 8])
@pytest.mark.parametrize("name", peers.NAMES)
def bench_trajectories(name, m, device, case, build, timed):
    """m passes folded into the batch of a two-layer network; nn.Linear's are the m copies of the
    batch alone."""
    batch, k, n = case.shape
    model = build(name, networks.mlp(k, n, n).to(device, case.dtype))
    x = torch.randn(max(1, batch // 4), k, device=device, dtype=case.dtype)
    if name == "dip":
        peers.check_converted(model, x)
    if name == peers.PLAIN:
        call = lambda: model(x.repeat_interleave(m, 0)).square().mean().backward()  # noqa: E731
    else:
        call = lambda: dip.trajectories(model.__call__, x, m=m).square().mean().backward()  # noqa: E731

    def step():
        model.zero_grad(set_to_none=True)
        call()

    timed(step, name, f"m = {m} trajectories, training step", trajectories=m)
