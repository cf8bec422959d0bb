"""certify: the bound is Clopper and Pearson's, the radius is that of a linear classifier, inner
noise is refused."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dipkernels as dip
from dipkernels.training.certify import lower_bound


@pytest.mark.parametrize(
    ("hits", "trials"), [(0, 10), (1, 10), (7, 10), (10, 10), (990, 1000), (50_000, 100_000)]
)
def test_the_lower_bound_is_the_quantile_of_a_beta(hits, trials):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.beta.ppf(1e-3, hits, trials - hits + 1) if hits else 0.0
    assert lower_bound(hits, trials, 0.999) == pytest.approx(expected, rel=1e-6)
    assert hits / trials - 1e-3 < lower_bound(hits, trials, 1e-15) <= 1  # by no confidence at all


def linear(sigma=0.5):
    """Two classes, split at x_0 = 0: the smoothed classifier's true radius is |x_0|."""
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]))
    return dip.convert(model, init_variance=sigma**2)


def test_the_radius_of_a_linear_classifier_is_its_distance_from_below():
    x = torch.tensor([[0.3, 5, 0], [-0.6, 0, 1], [0.0, 1, 1]])
    with dip.fixed_noise(3):
        got = dip.certify(linear(), x, k=20_000, chunk=1000)
    assert got.classes.tolist() == [0, 1, -1]
    assert got.sigma == 0.5
    for radius, true in zip(got.radius.tolist(), (0.3, 0.6, 0.0)):
        assert 0.9 * true <= radius <= true
    assert got.accuracy(torch.tensor([0, 1, 0]), 0.25) == pytest.approx(2 / 3)
    assert got.accuracy(torch.tensor([0, 1, 0]), 0.5) == pytest.approx(1 / 3)
    assert got.accuracy(torch.tensor([1, 1, 0]), 0.0) == pytest.approx(1 / 3)
    assert got.accuracy(torch.tensor([1, 0, -1]), 0.0) == 0  # -1: it abstains, which is no class


def test_the_draws_replay_and_modes_and_bounds_stay():
    model = nn.Sequential(dip.DIPInput(4, init_variance=0.04), nn.Linear(4, 3))
    x = torch.randn(5, 4)
    model.train()
    results = []
    for _ in range(2):
        with dip.fixed_noise(9):
            results.append(dip.certify(model, x, k=100))
    assert torch.equal(results[0].radius, results[1].radius)
    assert all(m.training for m in model.modules())
    # all passes agree: the largest radius that k passes can show
    sure = dip.certify(linear(0.01), torch.tensor([[9.0, 0, 0]]), k=1000, confidence=0.99)
    p = 0.01 ** (1 / 1000)
    assert sure.radius.item() == pytest.approx(
        0.01 * torch.special.ndtri(torch.tensor(p, dtype=torch.float64)).item()
    )


def test_the_passes_that_choose_the_class_do_not_bound_it(monkeypatch):
    """The bound holds for draws that the choice has not seen."""
    chosen, bounding = [1, 1, 1, 0], [1, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    votes = torch.tensor(chosen + bounding)[:, None]
    monkeypatch.setattr(
        importlib.import_module(dip.certify.__module__), "predict", lambda *a, **k: votes
    )
    found = dip.certify(linear(), torch.ones(1, 3), k=10, k0=4, confidence=0.9)
    p = torch.tensor(lower_bound(9, 10, 0.9), dtype=torch.float64)
    assert found.radius.item() == pytest.approx(0.5 * torch.special.ndtri(p).item())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def test_no_more_logits_are_kept_than_of_one_chunk():
    model = nn.Sequential(dip.DIPInput(4), nn.Linear(4, 50))
    with Largest() as largest:
        dip.certify(model, torch.randn(2, 4), k=1000, chunk=16)
    assert 16 * 2 * 50 <= largest.numel <= (64 + 1000) * 2  # of the votes


def test_images_are_noised_at_every_pixel_alike():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 3))
    dip.convert(model, filter=lambda module, name: name == "0")
    assert dip.certify(model, torch.rand(2, 1, 8, 8), k=10, k0=4).classes.shape == (2,)


def spread():
    model = linear()
    with torch.no_grad():
        model.log_variance[1] += 1
    return model


class TwoStems(nn.Module):
    """Two first layers; noised is the first alone. The second reads seen(x)."""

    def __init__(self, seen=lambda x: x):
        super().__init__()
        self.seen = seen
        self.a, self.b, self.relu = dip.DIPLinear(3, 2), nn.Linear(3, 2), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.a(x)) + self.b(self.seen(x))


class Wrapped(nn.Module):
    """Whose output holds the logits by a name."""

    def __init__(self, model, name="logits"):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        return {self.name: self.model(x)}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(3, 2), "^model: expected noise at its input alone.*got 0"),
        (
            lambda: dip.convert(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))),
            "certifies nothing",
        ),
        (
            lambda: nn.Sequential(nn.Linear(3, 3), dip.DIPLinear(3, 2)),
            "^model: expected its DIP layer '1' to read x",
        ),
        (TwoStems, "^model: expected to read x through its DIP layer 'a' alone"),
        (lambda: TwoStems(nn.LayerNorm(3)), "^model: expected to read x through its DIP layer"),
        (lambda: TwoStems(torch.sign), "^model: expected to read x through its DIP layer"),
        (spread, "^model: expected one sigma"),
        (lambda: dip.DIPLinear(3, 2, num_samples=2), "^model: expected num_samples=1"),
        (
            lambda: dip.DIPLinear(3, 1),
            r"^model: expected logits \[B, C\] of C >= 2 .*, got torch.float32 \(32, 1\); of",
        ),
        (lambda: Wrapped(TwoStems()), "^model: expected to read x through its DIP layer"),
        (lambda: Wrapped(dip.DIPLinear(3, 2), "scores"), r"^model: expected logits .*, got dict"),
    ],
)
def test_what_certifies_nothing_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        dip.certify(model(), torch.rand(2, 3) + 0.1, k=50)


def test_logits_that_an_output_holds_are_certified():
    x, found = torch.randn(4, 3), []
    for model in (linear(), Wrapped(linear())):
        with dip.fixed_noise(1):
            found.append(dip.certify(model, x, k=50))
    assert torch.equal(found[0].radius, found[1].radius)


def test_what_works_in_place_behind_the_layer_is_certified():
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = dip.DIPLinear(3, 2)

        def forward(self, x):
            return self.first(x).add_(1) * 2

    found, again = (dip.certify(Behind(), torch.randn(2, 3), k=5) for _ in range(2))
    assert found.sigma == pytest.approx(0.1)
    assert found != again and found in [again, found]  # no tensors are compared


@pytest.mark.parametrize("target", [torch.zeros(2, 1), torch.tensor(0), torch.zeros(3), [0, 0]])
def test_a_target_of_another_shape_is_not_spread_over_the_examples(target):
    found = dip.certify(linear(), torch.randn(2, 3), k=10)
    with pytest.raises(ValueError, match=r"^target: expected a tensor of shape \(2,\)"):
        found.accuracy(target, 0.1)
    for radius, error in (("0.1", TypeError), (-1, ValueError), (float("nan"), ValueError)):
        with pytest.raises(error, match=r"^radius: expected a finite number >= 0"):
            found.accuracy(torch.zeros(2), radius)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[float("nan"), 0, 0]]), "^x: expected finite"),
        (torch.randn(3), "^x: expected a floating tensor"),
        (torch.ones(2, 3, dtype=torch.int64), "^x: expected a floating tensor"),
        ([1.0], "^x: expected a floating tensor"),
    ],
)
def test_a_batch_that_is_none_is_named(x, message):
    with pytest.raises(ValueError, match=message):
        dip.certify(linear(), x)


def test_logits_that_are_nan_are_not_certified():
    model = linear()
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^model: expected logits that are numbers, got NaN"):
        dip.certify(model, torch.randn(2, 3), k=10)


@pytest.mark.parametrize("call", [lambda m, x: m(input=x), lambda m, x: m.forward(x)])
def test_a_layer_is_certified_however_it_is_called(call):
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear()

        def forward(self, x):
            return call(self.layer, x)

    x = torch.randn(4, 3)
    with dip.fixed_noise(1):
        got = dip.certify(Called(), x, k=50)
    with dip.fixed_noise(1):
        assert torch.equal(got.radius, dip.certify(linear(), x, k=50).radius)


class Compares(nn.Module):
    """Normalises by its batch, in eval mode too, or compares the examples of it."""

    def __init__(self, compare):
        super().__init__()
        self.noise, self.head, self.compare = dip.DIPInput(3), nn.Linear(3, 2), compare

    def forward(self, x):
        return self.compare(self.head(self.noise(x)))


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize(
    "compare",
    [
        lambda y: (y - y.mean(0)) / (y.var(0, correction=0) + 1e-5).sqrt(),
        lambda y: (y - y.mean(0)) / y.std(0),
        lambda y: F.batch_norm(y, None, None, training=True) if len(y) > 1 else y,
        lambda y: y - y.flip(0),
        lambda y: y.softmax(0),
        lambda y: F.normalize(y) @ F.normalize(y).T,
    ],
)
def test_a_model_that_compares_the_examples_of_a_batch_is_certified_for_each_alone(compare):
    model, x = Compares(compare), torch.rand(4, 3) + 0.1
    for batch, chunk in ((x, 1), (x, 16), (x[:1], 2)):
        with pytest.raises(ValueError, match="model: expected an answer to each example"):
            dip.certify(model, batch, k=50, chunk=chunk)
    still = Compares(lambda y: y + 0.001 * y.mean(0))
    assert len(dip.certify(still, x, k=50).classes) == 4


@pytest.mark.parametrize("masked", [-float("inf"), torch.finfo(torch.float32).min, -1e4])
def test_a_masked_class_hides_no_comparison_of_examples(masked):
    def compare(y, by):
        return torch.cat([y - by * y.flip(0), torch.full_like(y[:, :1], masked)], 1)

    x = torch.rand(4, 3)
    with pytest.raises(ValueError, match="model: expected an answer to each example"):
        dip.certify(Compares(lambda y: compare(y, 1)), x, k=50)
    assert (dip.certify(Compares(lambda y: compare(y, 0)), x, k=50).classes < 2).all()


def test_a_model_that_draws_in_eval_mode_is_certified():
    """As dropout that stays on does: its draws differ from pass to pass, not with the batch."""

    def draws(y):
        return y + 0.1 * torch.randn_like(y)

    model, x = Compares(draws), torch.rand(4, 3)
    assert len(dip.certify(model, x, k=50).classes) == 4
    with pytest.raises(ValueError, match="model: expected an answer to each example"):
        dip.certify(Compares(lambda y: draws(y - y.flip(0))), x, k=50)
    model.forward = lambda x: draws(model.head(model.noise(x)) + x[:, :2])
    with pytest.raises(ValueError, match="model: expected to read x through its DIP layer"):
        dip.certify(model, x, k=50)


def test_one_example_in_a_pass_of_its_own_is_compared_with_none():
    model, x = Compares(lambda y: y - y.mean(0) + y), torch.rand(1, 3)
    assert len(dip.certify(model, x, k=50, chunk=1).classes) == 1
