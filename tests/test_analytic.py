"""predict(method="analytic"): the exact mean of a network, or why there is none.  docs/maths.md,
section 7."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dipkernels as dip
from dipkernels import functional
from dipkernels.nn.activation import QuickGELU

SEED = torch.tensor([91, 4])


def mlp(activation):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(8, 32),
        activation,
        nn.Dropout(0.1),
        nn.Linear(32, 32),
        activation,
        nn.Linear(32, 4),
    )


def one_hidden(activation, width, classes):
    torch.manual_seed(0)
    layers = nn.Linear(8, width), activation, nn.Linear(width, classes)
    return dip.convert(nn.Sequential(*layers), init_variance=0.3)


class _GeluTanh(nn.Module):
    def forward(self, x):
        return (
            0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
        )


class _InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(torch.sigmoid(1.702 * x))


def compared(model, x):
    """How far the exact means are from those of 4000 passes, in standard errors, and from the plain
    network's outputs: the largest of each."""
    exact = dip.predict(model, x, method="analytic", average="logits")
    outs = dip.predict(model, x, k=4000, chunk=1000, average=None)
    errors = (outs.mean(0) - exact).abs() / (outs.std(0) / 4000**0.5).clamp(min=1e-3)
    return errors.max(), (dip.predict(model, x, k=0, average="logits") - exact).abs().max()


@pytest.mark.parametrize(
    "activation, kind",
    [
        *((nn.ReLU(), "relu"), (nn.ReLU(inplace=True), "relu"), (nn.SiLU(), "silu")),
        *((nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.Tanh(), "tanh")),
        # by formulas of their own
        *((QuickGELU(), "quick_gelu"), (_InPlace(), "quick_gelu"), (_GeluTanh(), "gelu_tanh")),
    ],
)
def test_analytic_prediction_is_each_layers_own_mean(activation, kind):
    model = dip.convert(mlp(activation), init_variance=0.3)
    x = torch.randn(6, 8)
    want = x
    for layer in (model[0], model[3]):
        how = {"log_variance": True, "activation": kind, "estimator": "analytic"}
        want = functional.dip_linear(
            want, layer.weight, layer.bias, layer.log_variance, SEED, **how
        )
    want = F.linear(want, model[5].weight, model[5].bias)
    assert torch.equal(dip.predict(model, x, method="analytic", average="logits"), want.detach())
    assert model.training
    with torch.inference_mode():
        got = dip.predict(model, x, method="analytic")
    assert torch.equal(got, want.detach().softmax(-1))


class _Dropout(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x, 0.1, self.training)


@pytest.mark.parametrize("call", [F.dropout, torch.dropout])
def test_analytic_prediction_goes_through_dropout_before_an_activation(call):
    model, x = one_hidden(nn.GELU(), 16, 3), torch.randn(6, 8)
    want = dip.predict(model, x, method="analytic")
    dropped = nn.Sequential(model[0], _Dropout(call), *model[1:])
    assert torch.equal(dip.predict(dropped, x, method="analytic"), want)


class _Beside(nn.Module):
    """An activation of its own, and what else reads the layer's output."""

    def __init__(self, own, other):
        super().__init__()
        self.a, self.own, self.other = nn.Linear(8, 8), own, other

    def forward(self, x):
        h = self.a(x)
        return self.own(h) + self.other(h)


@pytest.mark.parametrize(
    "own, other, kinds",
    [
        (QuickGELU(), nn.ReLU(), ("quick_gelu", "relu")),
        (_InPlace(), nn.Identity(), ("quick_gelu", "quick_gelu")),  # which it has written there
    ],
)
def test_analytic_prediction_knows_what_is_read_beside_an_activation_of_its_own(own, other, kinds):
    model, x = dip.convert(_Beside(own, other), init_variance=0.3), torch.randn(6, 8)
    got = dip.predict(model, x, method="analytic", average="logits")
    v = model.a.weight.square() @ model.a.log_variance.exp()
    mu = F.linear(x, model.a.weight, model.a.bias)
    want = sum(functional.expectation(mu, v, kind) for kind in kinds)
    torch.testing.assert_close(got, want.detach())


def test_analytic_prediction_knows_a_layer_whose_forward_is_called_by_itself():
    class Direct(nn.Sequential):
        def forward(self, x):
            for module in self:
                x = module.forward(x)
            return x

    model, x = dip.convert(mlp(nn.ReLU()), init_variance=0.3), torch.randn(6, 8)
    got, want = (dip.predict(m, x, method="analytic") for m in (Direct(*model), model))
    assert torch.equal(got, want)


class _Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        return self.net(x)


def test_analytic_prediction_follows_layers_inside_a_module_with_noise_before_it():
    plain, x = nn.Sequential(_Normed()), torch.randn(6, 8)
    model = dip.convert(copy.deepcopy(plain), 0.3, before=["0"], batches=[x])
    got = dip.predict(model, x, method="analytic")
    assert torch.equal(got, dip.predict(dip.convert(plain, 0.3), x, method="analytic"))
    assert not torch.equal(got, dip.predict(plain, x, k=0))


@pytest.mark.parametrize(
    "layer", [dip.DIPConv1d, dip.DIPConv2d, dip.DIPConv3d, nn.ConvTranspose1d, nn.ConvTranspose3d]
)
def test_analytic_prediction_goes_through_convolutions(layer):
    """Linear, so the mean is the plain network's."""
    width = int(layer.__name__[-2])
    x = torch.randn(5, 2, *[3] * width)
    model = nn.Sequential(layer(2, 4, 1), nn.Flatten(), nn.Linear(4 * 3**width, 3))
    if layer.__module__.startswith("torch."):
        dip.convert(model, before={"0": 1}, batches=[x])
    got = dip.predict(model, x, method="analytic", average="logits")
    torch.testing.assert_close(got, model.eval()(x))


class _Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return F.relu(x @ self.weight.T)


def test_analytic_prediction_refuses_an_activation_inside_a_module_with_noise_before_it():
    """Its answer would be the plain network's."""
    x = torch.randn(6, 8)
    model = dip.convert(nn.Sequential(_Expert()), 0.3, before=["0"], batches=[x])
    with pytest.raises(ValueError, match="that of '0' goes into relu, and its variance"):
        dip.predict(model, x, method="analytic")


def test_analytic_prediction_of_one_hidden_layer_is_algorithm_2_without_its_error():
    """One noised layer before the activation and an affine one after: the logits' mean is exact."""
    errors, effect = compared(one_hidden(nn.GELU(), 32, 4), torch.randn(5, 8))
    assert errors <= 4.5 and effect > 0.01


class _Summed(nn.Module):
    """An activation behind a sum that has the outputs of one or two layers in it."""

    def __init__(self, form):
        super().__init__()
        self.a, self.b, self.form = nn.Linear(8, 8), nn.Linear(8, 8), form

    def forward(self, x):
        return self.form(x, self.a(x), self.b(x))


@pytest.mark.parametrize(
    "form",
    [
        lambda x, a, b: F.relu(x + a),
        lambda x, a, b: F.gelu(a - b.view(a.shape)),
        lambda x, a, b: torch.tanh(1 - (a + x).clone()),
        lambda x, a, b: F.relu(a.add_(b)),
    ],
)
def test_analytic_prediction_of_a_sum_before_an_activation_is_exact(form):
    torch.manual_seed(0)
    errors, effect = compared(dip.convert(_Summed(form), init_variance=0.5), torch.randn(5, 8))
    assert errors <= 4.5 and effect > 0.05


@pytest.mark.parametrize(
    "form",
    [
        lambda x, a, b: F.relu((a + x) + (a + b)),
        lambda x, a, b: F.relu(torch.cat([a, b], -1).chunk(2, -1)[0]),
        lambda x, a, b: F.relu(x * a),
        lambda x, a, b: F.relu(torch.add(a, b, alpha=2)),
        lambda x, a, b: F.relu(a.mT),
    ],
)
def test_analytic_prediction_refuses_what_is_computed_before_an_activation(form):
    model = dip.convert(_Summed(form), init_variance=0.5)
    with pytest.raises(ValueError, match="'a' goes into relu, and its variance is not"):
        dip.predict(model, torch.randn(5, 8), method="analytic")
    shared = dip.convert(_Summed(lambda x, a, b: F.relu(a + b)), share=[["a", "b"]])
    with pytest.raises(ValueError, match="'a' goes into relu, and its variance is not"):
        dip.predict(shared, torch.randn(5, 8), method="analytic")


def test_analytic_prediction_of_layers_with_their_own_activation_and_samples():
    plain = one_hidden(nn.ReLU(), 16, 3)
    x = torch.randn(5, 8)
    want = dip.predict(plain, x, method="analytic", average="logits")
    inside = nn.Sequential(
        dip.DIPLinear(8, 16, activation="relu", estimator="mean", num_samples=4),
        dip.DIPLinear(16, 3),
    )
    for ours, theirs in zip(inside, (plain[0], plain[2]), strict=True):
        ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(dip.predict(inside, x, method="analytic", average="logits"), want)


def test_analytic_prediction_goes_through_transformer_blocks():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.1, activation="gelu", norm_first=True, batch_first=True
    )
    dip.convert(block, init_variance=0.2)
    x = torch.randn(2, 5, 16)
    got = dip.predict(block, x, method="analytic", average=None)
    plain = dip.predict(block, x, k=0, average=None)
    assert got.shape == plain.shape == (1, 2, 5, 16) and not torch.allclose(got, plain, atol=1e-3)

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + self.down(F.silu(self.gate(x)) * self.up(x))

    # gate and up draw apart, so the mean of the product is the product of the means
    assert compared(dip.convert(Gated(), init_variance=0.3), torch.randn(3, 8))[0] <= 4.5


class _OwnMish(nn.Module):
    def forward(self, x):
        return x * torch.tanh(2 * torch.log(1 + torch.exp(x)))


@pytest.mark.parametrize(
    "activation, match",
    [
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Softplus(), "softplus"),
        (nn.ELU(), "elu"),
        (_OwnMish(), "exp"),
        (nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU()), "relu, and its variance"),
    ],
)
def test_analytic_prediction_refuses_what_it_has_no_closed_form_for(activation, match):
    model, x = nn.Sequential(nn.Linear(8, 8), activation, nn.Linear(8, 2)), torch.randn(3, 8)
    if isinstance(activation, nn.Sequential):
        model, x = activation, torch.randn(3, 1, 8)
    dip.convert(model)
    with pytest.raises(ValueError, match=f"that of '0' goes into ({match})"):
        dip.predict(model, x, method="analytic")
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(
    "between",
    [nn.Identity, lambda: nn.BatchNorm1d(8), lambda: nn.LayerNorm(8), lambda: nn.Linear(8, 8)],
)
@pytest.mark.parametrize("noisy", [lambda: dip.DIPLinear(8, 8), lambda: dip.DIPInput(8)])
def test_analytic_prediction_refuses_an_activation_further_behind(noisy, between):
    """Its answer would be the plain network's."""
    model, x = nn.Sequential(noisy(), between(), nn.ReLU()), torch.randn(3, 8)
    if isinstance(model[0], dip.DIPLinear) and isinstance(model[1], (nn.Identity, nn.BatchNorm1d)):
        dip.predict(model, x, method="analytic", average="logits")  # right behind, or by columns
    else:
        with pytest.raises(ValueError, match="that of '0' goes into relu, and its variance"):
            dip.predict(model, x, method="analytic", average="logits")


@pytest.mark.parametrize(
    "act",
    [F.elu, F.glu, F.hardswish, F.leaky_relu, F.logsigmoid, F.mish, F.softplus, torch.sigmoid],
)
@pytest.mark.parametrize("sums", [False, True])
def test_analytic_prediction_refuses_what_has_no_mean_further_behind(act, sums):
    class Further(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = dip.DIPLinear(8, 8), dip.DIPLinear(8, 8)

        def forward(self, x):
            return act(self.a(x) + self.b(x) if sums else F.layer_norm(self.a(x), (8,)))

    with pytest.raises(ValueError, match=f"that of 'a' goes into {act.__name__}"):
        dip.predict(Further(), torch.randn(3, 8), method="analytic", average="logits")


def test_analytic_prediction_goes_through_what_an_index_chooses():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(8, 3), nn.Parameter(torch.randn(3, 8, 4))

        def forward(self, x):
            chosen = self.experts[self.gate(x).softmax(-1).argmax(-1)]
            return torch.relu(torch.einsum("bi,bio->bo", x, chosen))

    model, x = (
        dip.convert(Switch(), filter=lambda m, name: name == "gate").eval(),
        torch.randn(5, 8),
    )
    y = dip.predict(model, x, method="analytic", average="logits")
    assert torch.equal(y, model(x))


def test_analytic_prediction_of_layers_that_are_called_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner = nn.Conv1d(1, 1, 1), dip.DIPLinear(8, 8, activation="relu")
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            u = self.conv(input=x[:, None])[:, 0]
            return self.head(input=self.inner(input=u))

    model, x = dip.convert(ByKeyword()), torch.randn(3, 8)
    got = dip.predict(model, x, method="analytic", average="logits")
    u = F.conv1d(x[:, None], model.conv.weight, model.conv.bias)[:, 0]
    v = model.inner.weight.square() @ model.inner.log_variance.exp()
    h = dip.functional.expectation(F.linear(u, model.inner.weight, model.inner.bias), v, "relu")
    torch.testing.assert_close(got, F.linear(h, model.head.weight, model.head.bias))


def test_analytic_prediction_refuses_bad_arguments():
    plain, x = mlp(nn.ReLU()), torch.randn(3, 8)
    noisy = dip.convert(mlp(nn.ReLU()))
    for model, options, match in (
        (noisy, {"method": "exact"}, r"method: expected one of \('sample', 'analytic'\), got"),
        (noisy, {"method": "analytic", "k": 4}, "k, chunk: expected none with method='analytic'"),
        (plain, {"method": "analytic"}, "model: expected DIP layers"),
    ):
        with pytest.raises(ValueError, match=match):
            dip.predict(model, x, **options)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_analytic_prediction_takes_linear_layers_whose_weight_is_transposed(num_samples):
    """transformers' Conv1D."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    plain = nn.Sequential(nn.Linear(8, 16), nn.GELU("tanh"), nn.Linear(16, 4))
    transposed = nn.Sequential(conv1d(16, 8), nn.GELU("tanh"), conv1d(4, 16))
    with torch.no_grad():
        for ours, theirs in zip(transposed[::2], plain[::2]):
            ours.weight.copy_(theirs.weight.t())
            ours.bias.copy_(theirs.bias)
    x, answers = torch.randn(3, 5, 8), []
    for model in (plain, transposed):
        dip.convert(model, {"0": torch.linspace(0.1, 2, 8), "*": 0.3}, num_samples=num_samples)
        answers.append(dip.predict(model, x, method="analytic", average="logits"))
    torch.testing.assert_close(*answers)
    assert not torch.allclose(answers[0], dip.predict(plain, x, k=0, average="logits"), atol=1e-3)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("form", [nn.Identity, lambda: nn.BatchNorm1d(16)])
def test_analytic_prediction_of_a_batch_norm_is_that_of_the_layer_it_can_be_folded_into(
    affine, form
):
    norm = nn.BatchNorm1d(16, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    linear, head, x = nn.Linear(8, 16), nn.Linear(16, 3), torch.randn(64, 8)
    net = nn.Sequential(linear, norm, form(), nn.ReLU(inplace=True), head)
    for _ in range(20):
        net(3 * x + 1)  # statistics
    folded = copy.deepcopy(linear)
    for each in [m for m in net if isinstance(m, nn.BatchNorm1d)]:
        slope = (each.running_var + each.eps).rsqrt() * (1 if each.weight is None else each.weight)
        shift = 0 if each.bias is None else each.bias
        with torch.no_grad():
            folded.weight.mul_(slope[:, None])
            folded.bias.sub_(each.running_mean).mul_(slope).add_(shift)
    answers = []
    for model in (net, nn.Sequential(folded, nn.ReLU(), copy.deepcopy(head))):
        dip.convert(model, {"0": torch.linspace(0.1, 2, 8), "*": 0.3})
        answers.append(dip.predict(model, x, method="analytic", average="logits"))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers[0], dip.predict(net, x, k=0, average="logits"), atol=1e-2)
