"""objective and penalty: METHOD's formula, term by term."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dipkernels.models.convert import convert
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.noise.contexts import fixed_noise
from dipkernels.training.objective import KL, energy_score, kl_penalty, objective, penalty
from dipkernels.training.predict import predict
from dipkernels.training.trajectories import trajectories

OUT = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1])
PLAIN, NOISY = nn.Linear(2, 2), DIPInput(2)


def test_penalty_is_the_formula():
    model = convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 0.25)
    value = penalty(model, 2.0, 0.5)
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(2.0 * 7 * 0.25 - 0.5 * 7 * math.log(0.25))


def test_kl_penalty_is_the_divergence_summed_over_layers_and_averaged_over_features():
    model = convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 0.25)
    assert kl_penalty(model).item() == 0.0
    expected = 0.0
    for layer, gamma in zip(model, (0.04, 0.09)):
        layer.variance.log_prior.fill_(math.log(gamma))
        with torch.no_grad():
            layer.log_variance.normal_()
        pair = [torch.distributions.Normal(0.0, s) for s in (layer.variance.sigma, gamma**0.5)]
        layer.variance.pull.copy_(torch.linspace(0.2, 1, len(layer.variance.pull)))
        expected += (layer.variance.pull * torch.distributions.kl_divergence(*pair)).mean()
    value = kl_penalty(model, 0.7)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value, 0.7 * expected)


def test_alpha_and_beta_are_the_paper_form_of_the_divergence():
    """alpha = w / (2 gamma), beta = w / 2: the gradient of a KL summed over features with weight
    w."""
    layer, gamma, w = DIPInput(6, init_variance=0.3), 0.04, 0.5
    layer.variance.log_prior.fill_(math.log(gamma))
    kl_penalty(layer, w * 6).backward()
    wanted = layer.log_variance.grad.clone()
    layer.zero_grad()
    penalty(layer, w / (2 * gamma), w / 2).backward()
    torch.testing.assert_close(layer.log_variance.grad, wanted)


def test_a_layer_without_features_adds_nothing_to_the_kl_penalty():
    model = convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 0.25)
    model[0].variance.log_prior.zero_()
    torch.testing.assert_close(kl_penalty(nn.ModuleList([*model, DIPInput(0)])), kl_penalty(model))
    assert kl_penalty(DIPInput(0)).item() == 0.0


@pytest.mark.parametrize(
    ("loss", "factor"),
    [
        (lambda out, y, model, kl: objective(out, y, F.mse_loss, model, kl=kl), torch.var),
        (lambda out, y, model, kl: energy_score(out, y) + kl_penalty(model, kl), torch.std),
    ],
)
def test_kl_times_the_spread_of_a_target_pulls_as_for_a_standardised_one(loss, factor):
    net = convert(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)), 0.25)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.variance.log_prior.normal_()
    x, y = torch.randn(9, 3), torch.randn(9, 1)
    y /= y.std()

    def slopes(scale, kl):
        model = copy.deepcopy(net)
        with torch.no_grad():
            model[2].weight *= scale
            model[2].bias *= scale
        with fixed_noise(1):
            loss(trajectories(model, x, m=2), scale * y, model, kl).backward()
        return torch.cat([model[0].log_variance.grad, model[2].log_variance.grad])

    by = factor(100 * y)
    wanted = slopes(1, KL)
    torch.testing.assert_close(slopes(100, KL * by) / by, wanted, rtol=1e-4, atol=1e-6)
    assert (slopes(100, KL) / by - wanted).abs().max() > 0.01  # the pull is missing


class Member(nn.Module):
    """A network whose forward gives its objective, for what swaps its parameters by a call."""

    def __init__(self):
        super().__init__()
        self.net = convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), 0.25)

    def forward(self, x, y):
        return objective(trajectories(self.net, x, m=2), y, F.cross_entropy, self.net)


def test_the_objective_of_stacked_networks_has_the_kl_term_of_each():
    # copies: layers of models that were converted apart warn under one key
    first, x = Member(), torch.randn(5, 3)
    members = [copy.deepcopy(first) for _ in range(3)]
    with torch.no_grad():
        for member in members:
            for p in member.parameters():
                p += torch.randn_like(p) / 4
    parameters, buffers = torch.func.stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")

    def of_one(parameters, buffers):
        return torch.func.functional_call(base, (parameters, buffers), (x, Y))

    with fixed_noise(1):
        losses = torch.vmap(of_one)(parameters, buffers)
        wanted = torch.stack([member(x, Y) for member in members])
    torch.testing.assert_close(losses, wanted)
    losses.sum().backward()
    wanted.sum().backward()
    for name, stacked in parameters.items():
        each = [member.get_parameter(name).grad for member in members]
        torch.testing.assert_close(stacked.grad, torch.stack(each))


def test_the_kl_term_of_a_base_without_values_is_no_silent_zero():
    base = Member().to("meta")
    for call in (kl_penalty, lambda model: penalty(model, 1.0, 1.0)):
        with pytest.raises(ValueError, match=r"^log_variance: .*got none yet.*functional_call"):
            call(base)


def test_the_default_weight_needs_a_model_and_no_alpha():
    model = convert(nn.Linear(4, 3), 0.25)
    model.variance.log_prior.fill_(0.0)
    alone = objective(OUT, Y, F.cross_entropy)
    torch.testing.assert_close(
        objective(OUT, Y, F.cross_entropy, model), alone + KL * kl_penalty(model, 1.0)
    )
    torch.testing.assert_close(objective(OUT, Y, F.cross_entropy, model, kl=0.0), alone)
    form = objective(OUT, Y, F.cross_entropy, model, alpha=0.1, beta=0.2)
    torch.testing.assert_close(form, alone + penalty(model, 0.1, 0.2))


def test_a_shared_variance_counts_once():
    a, b = DIPLinear(4, 4), DIPLinear(4, 4)
    a.variance.log_prior.fill_(0.0)
    b.variance = a.variance
    assert penalty(nn.ModuleList([a, b]), 1.0, 1.0) == penalty(a, 1.0, 1.0)
    assert kl_penalty(nn.ModuleList([a, b])) == kl_penalty(a) > 0
    b.variance = DIPLinear(4, 4).variance
    b.variance.log_variance = a.variance.log_variance
    assert penalty(nn.ModuleList([a, b, a]), 1.0, 1.0) == penalty(a, 1.0, 1.0)


def test_objective_is_the_mean_over_trajectories():
    expected = sum(F.cross_entropy(OUT[i], Y) for i in range(4)) / 4
    torch.testing.assert_close(objective(OUT, Y, F.cross_entropy), expected)
    torch.testing.assert_close(objective(OUT[:1], Y, F.cross_entropy), F.cross_entropy(OUT[0], Y))


def test_objective_adds_its_three_terms():
    model = DIPLinear(4, 3)
    for out, loss_fn, target in ((OUT, F.cross_entropy, Y), (OUT[..., 0], F.mse_loss, Y.float())):
        variance = out.var(0) if out.ndim == 2 else out.var(0).sum(-1)  # unbiased
        parts = objective(out, target, loss_fn) + penalty(model, 0.1, 0.2) + 0.3 * variance.mean()
        weights = {"alpha": 0.1, "beta": 0.2, "lambda_s": 0.3}
        torch.testing.assert_close(objective(out, target, loss_fn, model, **weights), parts)


def test_the_variance_over_trajectories_is_not_torchs_slow_one():
    out = torch.randn(16, 4, 10).transpose(0, 1).requires_grad_()
    with torch.profiler.profile() as trace:
        objective(out, None, lambda o, t: o.sum(), lambda_s=1.0).backward()
    # eight times as long over the first dimension as the same in simple passes
    assert not {"aten::var", "aten::std"} & {event.name for event in trace.events()}


def test_gradients_reach_the_variances_through_every_term():
    model = convert(nn.Linear(6, 3), 0.25)
    x = torch.randn(5, 6)
    model.variance.log_prior.fill_(-2.0)
    objective(torch.zeros(2, 5, 3), Y, F.cross_entropy, model).backward()  # the KL term alone
    assert bool(model.log_variance.grad.all())
    both = {"alpha": 1.0, "beta": 1.0}
    for weights in ({}, {"kl": 0.0}, {"alpha": 1.0}, both, {"lambda_s": 1.0}):
        model.zero_grad()
        out = torch.stack([model(x), model(x)])
        objective(out, Y, F.cross_entropy, model, **weights).backward()
        assert bool(model.log_variance.grad.any())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": 1.0}, ValueError, "^model: expected the model"),
        ({"kl": 0.1}, ValueError, "^model: expected the model"),
        ({"model": PLAIN}, ValueError, "^model: expected DIP layers"),
        ({"model": PLAIN, "alpha": 1.0}, ValueError, "^model: expected DIP layers"),
        ({"model": NOISY, "kl": 0.1, "alpha": 1.0}, ValueError, "^kl: expected none beside alpha"),
        ({"model": NOISY, "beta": 1.0}, ValueError, "^alpha: expected > 0 beside"),
        (
            {"out": OUT[:1], "lambda_s": 1.0},
            ValueError,
            "^lambda_s: expected 0 with one trajectory",
        ),
        ({"out": OUT[0, 0]}, ValueError, r"^out: expected a tensor \[m, B, ...\].*\(3,\)"),
        ({"out": OUT[:0]}, ValueError, "^out: "),
        ({"out": OUT[0]}, ValueError, r"^out: .*B = 5, got shape \(5, 3\).*trajectories"),
        ({"out": {"logits": OUT}}, TypeError, "^out: .*dict; .*dip.kl_penalty"),
        (
            {"loss_fn": lambda o, t: o},
            ValueError,
            r"^loss_fn: expected a scalar tensor, got torch.float32 \(5, 3\); return the mean over",
        ),
        (
            {"loss_fn": lambda o, t: 1.0},
            ValueError,
            "^loss_fn: expected a scalar tensor, got float",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = {"out": OUT, "target": Y, "loss_fn": F.cross_entropy, **change}
    with pytest.raises(error, match=message):
        objective(**given)


def test_bad_input_of_a_penalty_is_named():
    for call in (lambda: penalty(PLAIN, 1, 1), lambda: kl_penalty(PLAIN)):
        with pytest.raises(ValueError, match=r"^model: expected DIP layers"):
            call()
    with pytest.raises(ValueError, match=r"^alpha: expected > 0 beside beta"):
        penalty(NOISY, 0.0, 1.0)


def test_the_penalties_are_float32_whatever_the_default_type():
    model = convert(nn.Sequential(nn.Linear(3, 4)), 0.25)
    torch.set_default_dtype(torch.float64)
    try:
        terms = kl_penalty(model), penalty(model, 1.0, 0.1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [term.dtype for term in terms] == [torch.float32, torch.float32]


# ---- energy_score --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 2), (5,), (5, 2, 3), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_energy_score_is_the_formula_over_all_pairs(shape, dtype):
    torch.manual_seed(0)
    out, y = torch.randn(3, *shape).to(dtype), torch.randn(shape).to(dtype)
    value = energy_score(out, y)
    o, t = out.double().reshape(3, 5, -1), y.double().reshape(5, -1)
    near = torch.stack([(o[s] - t).square().sum(-1).sqrt() for s in range(3)]).mean()
    apart = [(o[s] - o[r]).square().sum(-1).sqrt() for s in range(3) for r in range(3) if s != r]
    assert value.dtype is torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        value.double(), near - torch.stack(apart).mean() / 2, rtol=1e-5, atol=1e-6
    )


def test_energy_score_is_differentiable_where_draws_are_equal():
    out = torch.zeros(3, 4, 2, requires_grad=True)
    energy_score(out, torch.ones(4, 2)).backward()
    assert out.grad.isfinite().all() and (out.grad < 0).all()
    assert energy_score(out[:, :0], torch.ones(0, 2)).isnan()  # no examples: as torch's losses
    leaf = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(energy_score, (leaf, torch.randn(4, 2, dtype=torch.float64)))


def test_energy_score_learns_the_spread_of_the_target_and_the_squared_loss_does_not():
    """y is noise of sigma 0.5 around 0; the model's only randomness is its input noise."""
    spreads = {}
    for name in ("energy", "squared"):
        torch.manual_seed(0)
        model = convert(nn.Linear(1, 1), 0.01)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(300):
            x, y = torch.zeros(128, 1), 0.5 * torch.randn(128, 1)
            out = trajectories(model, x, m=2)
            loss = energy_score(out, y) if name == "energy" else objective(out, y, F.mse_loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spreads[name] = predict(model, torch.zeros(2000, 1), k=1, average=None).std().item()
    assert 0.4 < spreads["energy"] < 0.6 and spreads["squared"] < 0.1


@pytest.mark.parametrize(
    ("out", "target", "error", "message"),
    [
        (torch.zeros(1, 5, 2), torch.zeros(5, 2), ValueError, r"^out: .*m >= 2.*\(1, 5, 2\)"),
        (torch.zeros(3), torch.zeros(3), ValueError, r"^out: .*m >= 2.*\(3,\)"),
        (torch.zeros(3, 5, 2), torch.zeros(5), ValueError, r"^target: .*\(5, 2\).*\(5,\)"),
        (torch.zeros(3, 5), torch.zeros(5, 1), ValueError, r"^target: .*\(5,\).*\(5, 1\)"),
        (torch.zeros(3, 5, 2), torch.zeros(5, dtype=torch.long), TypeError, "^target: .*int64"),
        ([torch.zeros(5, 2)], torch.zeros(5, 2), TypeError, "^out: .*list"),
    ],
)
def test_energy_score_names_bad_input(out, target, error, message):
    with pytest.raises(error, match=message):
        energy_score(out, target)
