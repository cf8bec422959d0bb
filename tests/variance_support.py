"""The variances of a model as if trained, and its noise under a key."""

import copy

import torch
import torch.distributed.fsdp
from torch import nn

import dipkernels as dip
from dipkernels.nn.variance import Variance
from dipkernels.ops import dtensor


class Branches(nn.Module):
    """Layers that read one input."""

    def __init__(self, features):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(features, features) for _ in range(3))

    def forward(self, x):
        return self.q(x) + self.k(x) * self.v(x)


def variances(model):
    return [module for module in model.modules() if isinstance(module, Variance)]


def trained(model, value=-1.0):
    """The model, its variances as if trained."""
    with torch.no_grad():
        for variance in variances(model):
            variance.log_variance.fill_(value)
    return model


def freeze(model):
    for variance in variances(model):
        variance.requires_grad_(False)


def gradients(model):
    """By name and whole, of the model inside DDP; what has none is left out."""
    return {
        name.removeprefix("module."): dtensor.full(p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def noise(model, *args, key=3):
    with dip.fixed_noise(key):
        return model.train()(*args)


def trains_alike_in_shards(model, call):
    """FSDP on this process alone gives the gradients of a plain copy, which is returned."""
    mesh, plain, grads = torch.distributed.init_device_mesh("cpu", (1,)), copy.deepcopy(model), []
    torch.distributed.fsdp.fully_shard(dip.shard_variances(model, mesh=mesh), mesh=mesh)
    for each in (plain, model):
        with dip.fixed_noise(4):
            call(each).square().sum().backward()
        grads.append([p.grad.full_tensor() if each is model else p.grad for p in each.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    return plain


def spoil(*sizes, count=300):
    """Leave memory that is freed full of 77, so that what is not initialised shows."""
    held = [torch.full((n,), 77.0) for n in sizes for _ in range(count)]
    held += [torch.full((2,), 77) for _ in range(count)]
    del held
