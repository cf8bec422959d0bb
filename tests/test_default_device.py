"""What is computed beside a model is where the model is, whatever torch.set_default_device says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dipkernels as dip

X, Y = torch.randn(6, 8), torch.arange(6) % 4


class OwnRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def network():
    return nn.Sequential(OwnRMSNorm(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def certified(model):
    return dip.certify(nn.Sequential(dip.DIPInput(8, device="cpu"), dip.to_plain(model)), X, k=9)


CALLS = {
    "producer_plan": lambda model: dip.producer_plan(dip.to_plain(model), [X]).moved[0],
    "calibrate": lambda model: dip.calibrate(model, [X]),
    "objective": lambda model: dip.objective(
        dip.trajectories(model, X, m=2), Y, F.cross_entropy, model
    ),
    "kl_penalty": dip.kl_penalty,
    "penalty": lambda model: dip.penalty(model, 1.0, 0.1),
    "predict": lambda model: dip.predict(model, X, k=2),
    "analytic": lambda model: dip.predict(model, X, method="analytic"),
    "lipschitz": lambda model: dip.diagnostics.lipschitz(model, X),
    "certify": certified,
    "check": lambda model: dip.check(model, X),
    "metrics": dip.metrics,
}


@pytest.mark.parametrize("call", CALLS)
def test_the_default_device_changes_nothing(call):
    """The meta device stands for a GPU: what is made there has no values for the model."""
    models = [dip.convert(network(), 0.25) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    results = []
    for model, device in zip(models, ("cpu", "meta")):
        with torch.device(device), dip.fixed_noise(3):
            results.append(CALLS[call](model))
    assert getattr(results[1], "device", torch.device("cpu")).type == "cpu"
    assert str(results[0]) == str(results[1])


def test_noise_is_drawn_where_the_input_is():
    model = dip.convert(network(), 0.25)
    with torch.device("meta"):
        first, second = model(X), model(X)
    assert first.device.type == "cpu" and not torch.equal(first, second)


def test_a_model_without_values_takes_noise_where_its_inputs_are_made():
    with torch.device("meta"):
        model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        dip.convert(model, 0.25, place="producer", batches=[torch.randn(2, 8)])
    model.to_empty(device="cpu")
    assert [row.type for row in dip.summary(model)] == ["DIPLayerNorm", "DIPReLU"]
    assert [row.sigma_mean for row in dip.summary(model)] == [0.5, 0.5]
