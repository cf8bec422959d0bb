"""The recommended recipe, all by default: convert, calibrate, objective and param_groups help
without a setting."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dipkernels as dip

pytest.importorskip("sklearn")
import digits

EPS, NOISE = 0.1, 0.5


def trained(x, y, widths, seed=0, recipe=True, epochs=80, size=100):
    """A network with two hidden layers, without or with the recipe."""
    torch.manual_seed(seed)
    fan_in, hidden, classes = widths
    body = nn.Linear(fan_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
    model = nn.Sequential(*body, nn.Linear(hidden, classes))
    if recipe:
        dip.convert(model)
        dip.calibrate(model, x.split(100))
    optimizer = torch.optim.AdamW(dip.param_groups(model, lr=1e-3))
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(size):
            if recipe:
                out = dip.trajectories(model, x[batch], m=4)
                loss = dip.objective(out, y[batch], F.cross_entropy, model)
            else:
                loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def scores(model, x, y):
    noisy = x + NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    shown = x, digits.pgd(model, x, y, EPS, steps=10), noisy
    return torch.tensor([digits.accuracy(model, each, y) for each in shown])


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_three_lines_help_by_default(seeds):
    gains = []
    for seed in range(seeds):
        x, y, x_test, y_test = digits.load(seed)
        plain, recipe = (
            scores(trained(x, y, (64, 128, 10), seed, r), x_test, y_test) for r in (False, True)
        )
        gains.append(recipe - plain)
    clean, pgd, noise = torch.stack(gains).mean(0).tolist()
    assert clean > -1 and pgd > 10 and noise > 5, (clean, pgd, noise)


@pytest.mark.slow
def test_variances_that_cost_the_fit_shrink_and_others_stay():
    """What one ratio cannot do: the likelihood pulls noise down where it hurts, the prior holds it
    where it does not."""
    torch.manual_seed(0)
    x = torch.randn(600, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()  # needs two features sharply; the other six say nothing
    model = trained(x, y, (8, 64, 2), epochs=60, size=60)
    kept = (model[0].log_variance - model[0].variance.log_prior).detach().div(2).exp()
    assert kept[:2].max() < 0.2 and kept[2:].min() > 0.5, kept
