"""diagnostics: exact on linear and quadratic maps; the noised mean predictor is one fixed smooth
function."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dipkernels import functional
from dipkernels.diagnostics import (
    lipschitz,
    output_variance,
    predictor,
    signal_to_noise,
    smoothness,
)
from dipkernels.models.convert import convert
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.noise import contexts


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_map(outputs=4, features=6, variance=0.25):
    layer = DIPLinear(features, outputs, bias=False, init_variance=variance).double()
    layer.weight.data = torch.randn(outputs, features, generator=generator(), dtype=torch.float64)
    return layer


class Quadratic(nn.Module):
    """f(x) = x^T A x / 2 after a noise layer, [B, 1]: gradient A u, Hessian A."""

    def __init__(self, eigenvalues):
        super().__init__()
        basis = torch.linalg.qr(
            torch.randn(len(eigenvalues), len(eigenvalues), generator=generator()).double()
        )[0]
        self.register_buffer(
            "A", basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
        )
        self.noise = DIPInput(len(eigenvalues), init_variance=0.5)

    def forward(self, x):
        u = self.noise(x)
        return ((u @ self.A) * u).sum(-1, keepdim=True) / 2


@pytest.mark.parametrize("k", [0, 3])
def test_lipschitz_of_a_linear_map_is_its_spectral_norm(k):
    model = linear_map()
    x = torch.randn(5, 6, generator=generator(1), dtype=torch.float64)
    got = lipschitz(model, x, k=k, iterations=300, tolerance=1e-9)
    exact = torch.linalg.matrix_norm(model.weight.detach(), 2)
    torch.testing.assert_close(got, exact.expand(5), rtol=1e-6, atol=0)


def test_lipschitz_of_a_quadratic_map_is_its_gradients_norm():
    model = Quadratic([3.0, 1.0, -2.0])
    x = torch.randn(4, 3, generator=generator(2), dtype=torch.float64)
    torch.testing.assert_close(lipschitz(model, x), (x @ model.A).norm(dim=1))
    # noised: the mean over k passes of A u_s, with the very noise of those passes
    seeds_of_passes = [
        torch.tensor([contexts.signed(7 + s * contexts.GOLDEN), model.noise.number])
        for s in range(3)
    ]
    z = sum(functional.noise((4, 3), seed) for seed in seeds_of_passes) / 3
    mean_u = x + math.sqrt(0.5) * z
    torch.testing.assert_close(
        lipschitz(model, x, k=3, key=7), (mean_u @ model.A).norm(dim=1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("eigenvalues", "magnitude", "largest", "k"),
    [
        ([3.0, 1.0, -2.0], 3.0, 3.0, 0),
        ([1.0, 0.0, -4.0], 4.0, 1.0, 0),
        ([2.0, 0.5, -2.0], 2.0, 2.0, 0),  # a tie in size, in which v^T H v never settles
        ([-3.0, -1.0], 3.0, -1.0, 2),
    ],
)
def test_smoothness_of_a_quadratic_map_is_its_top_eigenvalue(eigenvalues, magnitude, largest, k):
    model = Quadratic(eigenvalues)
    x = torch.randn(4, len(eigenvalues), generator=generator(3), dtype=torch.float64)
    options = {"k": k, "iterations": 200, "tolerance": 1e-9}
    for which, exact in (("magnitude", magnitude), ("largest", largest)):
        got = smoothness(model, x, lambda out: out.squeeze(-1), which=which, **options)
        torch.testing.assert_close(
            got, torch.full((4,), exact, dtype=torch.float64), rtol=1e-5, atol=1e-5
        )


def test_smoothness_agrees_with_the_whole_hessian_on_a_network():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double())
    x, y = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 2, 1])
    got = smoothness(
        model,
        x,
        lambda out: F.cross_entropy(out, y, reduction="none"),
        iterations=3000,
        tolerance=1e-13,
    )
    model.eval()
    for i in range(3):
        hessian = torch.autograd.functional.hessian(
            lambda v, i=i: F.cross_entropy(model(v[None]), y[i : i + 1]), x[i]
        )
        torch.testing.assert_close(
            got[i], torch.linalg.eigvalsh(hessian).abs().max(), rtol=1e-5, atol=1e-7
        )


def test_attention_is_differentiated_and_every_mode_comes_back():
    torch.manual_seed(0)
    model = convert(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.5))
    model.linear1.eval()
    modes = [m.training for m in model.modules()]
    x = torch.randn(2, 3, 8)
    got = lipschitz(model, x, iterations=300, tolerance=1e-7)
    whole = torch.autograd.functional.jacobian(model.eval(), x)
    exact = [torch.linalg.matrix_norm(whole[i, :, :, i].reshape(24, 24), 2) for i in range(2)]
    torch.testing.assert_close(got, torch.stack(exact), rtol=1e-3, atol=1e-4)
    model.train()
    model.linear1.eval()
    assert lipschitz(model, x, k=2, iterations=2).shape == (2,)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


def test_predictor_repeats_itself_and_averages_passes():
    model, x = linear_map(), torch.randn(3, 6, dtype=torch.float64)
    f = predictor(model, 4, key=1)
    assert torch.equal(f(x), f(x))
    assert not torch.equal(f(x), predictor(model, 4, key=2)(x))
    assert torch.equal(predictor(model)(x), F.linear(x, model.weight))
    plain = nn.Linear(6, 4, dtype=torch.float64)
    assert torch.equal(predictor(plain)(x), plain(x))
    torch.testing.assert_close(
        predictor(model, 3, average="probs")(x).sum(-1), torch.ones(3, dtype=torch.float64)
    )


def test_output_variance_of_a_linear_map_is_exact_in_the_limit():
    model = linear_map(variance=0.25)
    x = torch.randn(1, 6, dtype=torch.float64).expand(200, 6)
    torch.manual_seed(0)
    got = output_variance(model, x, k=40, chunk=40).mean(0)  # 200 * 40 draws: 1.6 % standard error
    torch.testing.assert_close(got, 0.25 * model.weight.detach().square().sum(1), rtol=0.08, atol=0)


def test_output_variance_takes_passes_in_chunks():
    model, rows = linear_map(), []
    model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    output_variance(model, torch.randn(3, 6, dtype=torch.float64), k=7, chunk=3)
    assert rows == [9, 9, 3]


def test_signal_to_noise_is_variance_over_variance():
    model = nn.Sequential(
        DIPLinear(3, 3, init_variance=0.04), DIPLinear(3, 2, init_variance=0.01, num_samples=4)
    )
    x = torch.randn(50, 3, generator=generator()) * torch.tensor([1.0, 2.0, 3.0])
    rows = signal_to_noise(model, [x[:20], x[20:]])
    assert rows[0].signal == pytest.approx(x.double().var(0, correction=0).mean().item(), rel=1e-6)
    assert [row.noise for row in rows] == pytest.approx([0.04, 0.0025])
    assert rows[0].decibels == pytest.approx(10 * math.log10(rows[0].signal / 0.04))
    assert str(rows).splitlines()[1].split()[0] == "0"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: lipschitz(m, x.long()), "^x: "),
        (lambda m, x: lipschitz(m, x[0]), "^x: "),
        (lambda m, x: lipschitz(m, x, average="mean"), "^average: "),
        (lambda m, x: lipschitz(lambda v: v.sum(), x), "^model: expected an output"),
        (lambda m, x: lipschitz(nn.Linear(6, 2).double(), x, k=2), "^model: expected DIP layers"),
        (lambda m, x: smoothness(m, x, lambda out: out), "^loss_fn: "),
        (lambda m, x: smoothness(m, x, lambda out: out.sum(), which="top"), "^which: "),
        (lambda m, x: output_variance(m, x, average=None), "^average: "),
        (lambda m, x: signal_to_noise(nn.Linear(6, 2), [x]), "expected DIP layers"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(linear_map(), torch.randn(2, 6, dtype=torch.float64))
