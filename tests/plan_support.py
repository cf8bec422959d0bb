"""A small network for convert(place="producer"), and what its plan says."""

import torch
from torch import nn

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A norm that two layers read, an activation, and what the forward of a subclass does with
    them."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.act = nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()
        self.a, self.b, self.head = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 4)

    def between(self, y):
        return y

    def forward(self, x):
        y = self.between(self.norm(self.stem(x)))
        return self.head(self.act(self.a(y) + self.b(y)))


def net(kind=Net):
    torch.manual_seed(0)
    return kind()


def moved(plan):
    return {row.producer: row.layers for row in plan.moved}


def left(plan):
    return {layer: row.reason for row in plan.left for layer in row.layers}


def same_streams(model, other, pairs):
    """Give layers of the model the numbers that those of the other one have."""
    for here, there in pairs.items():
        model.get_submodule(here).number = other.get_submodule(there).number


def having(make=net, **modules):
    def made():
        model = make()
        for name, module in modules.items():
            setattr(model, name, module)
        return model

    return made
