"""calibrate and summary: what a layer reads, the start and the pull of its variance, and a table."""

import functools
import math
import statistics
from collections import UserDict

import pytest
import torch
import torch.distributed.fsdp
from test_convert import Net, X
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from warning_support import warned

import dipkernels as dip
from dipkernels.models import spreads
from dipkernels.models.calibrate import calibrate
from dipkernels.models.convert import convert
from dipkernels.models.summary import Summary, summary
from dipkernels.nn.conv import DIPConv2d
from dipkernels.nn.input import DIPInput
from dipkernels.nn.numbering import dip_layers
from dipkernels.noise.contexts import noise_off

pytestmark = pytest.mark.filterwarnings("error::dipkernels.DIPConversionWarning")


def test_calibrate_sets_sigma_to_ratio_times_the_spread():
    model = convert(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)))
    scale = torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0])
    # offsets far from zero, uneven batches: a naive E[x^2] - E[x]^2 in float32 would lose this
    x = 1000 + torch.randn(101, 5) * scale
    rows = calibrate(model, x.split(17), ratio=0.2, per="feature")
    hidden = model.eval()[0](x).detach()
    for layer, read, tolerance in ((model[0], x, 1e-5), (model[1], hidden, 1e-4)):
        want = 0.2 * read.double().std(0, correction=0)
        torch.testing.assert_close(layer.variance.sigma.double(), want, rtol=tolerance, atol=0)
    assert rows[0].ratio == pytest.approx(0.2, rel=1e-4)


def test_calibrate_copies_a_large_input_to_float64_in_parts():
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype is torch.float64:
                self.largest = max(self.largest, out.numel())
            return out

    model = convert(nn.Sequential(nn.Conv2d(3, 2, 3)))
    x = torch.randn(40, 3, 60, 60) + torch.arange(3.0)[:, None, None]
    with Sizes() as sizes:
        calibrate(model, [x], ratio=1)
    assert 0 < sizes.largest <= spreads.PART < x.numel()
    spread = x.double().std((0, 2, 3), correction=0)
    sigma = spread.square().mean().sqrt().float()
    torch.testing.assert_close(model[0].variance.sigma, sigma.expand(3))


def test_calibrate_gives_a_layer_one_sigma_from_its_root_mean_square_spread_and_the_same_prior():
    model = convert(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)))
    x = torch.randn(101, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0, 0.0])
    rows = calibrate(model, x.split(17), ratio=0.5)
    spread = x.double().std(0, correction=0)
    sigma = 0.5 * spread.square().mean().sqrt()
    torch.testing.assert_close(model[0].variance.sigma.double(), sigma.expand(5), rtol=1e-5, atol=0)
    for layer in model:
        assert torch.equal(layer.variance.log_prior, layer.log_variance)
    # the median over the features that vary: of the ratios 0.5 rms / (0.1, 1, 3, 10) the lower
    # middle one
    assert rows[0].ratio == pytest.approx((sigma / spread[3]).item(), rel=1e-5)


def test_calibrate_measures_channels_and_chosen_dimensions():
    class Mine(DIPConv2d):
        pass

    model = nn.Sequential(Mine(3, 3, 1, bias=False), DIPInput(4, dim=2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3)[..., None, None])
    x = torch.randn(8, 3, 4, 5) * torch.tensor([1.0, 2, 3])[:, None, None]
    calibrate(model, [x], ratio=1.0, per="feature")
    torch.testing.assert_close(model[0].variance.sigma, x.std((0, 2, 3), correction=0))
    torch.testing.assert_close(model[1].variance.sigma, x.std((0, 1, 3), correction=0))


@pytest.mark.parametrize("mapped", [0, 1])
def test_calibrate_measures_what_a_forward_maps_over(mapped):
    class Mapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return torch.vmap(torch.func.jacrev(self.net), in_dims=mapped)(x)

    net = dip.convert(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)))
    x = torch.randn(16, 3)
    rows = calibrate(net, [x])
    found = calibrate(Mapped(net), [x.movedim(0, mapped)])
    assert [row.sigma_mean for row in found] == [row.sigma_mean for row in rows]


def test_calibrate_measures_a_network_whose_derivatives_of_several_orders_a_forward_takes():
    class Lagrangian(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            def energy(each):
                return self.net(each)[0]

            hessian = torch.vmap(torch.func.hessian(energy))(x)
            return torch.linalg.solve(hessian, torch.vmap(torch.func.grad(energy))(x))

    net = dip.convert(nn.Sequential(nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 1)))
    x = torch.randn(16, 3)
    rows = calibrate(net, [x], ratio=1.0)
    found = calibrate(Lagrangian(net), [x], ratio=1.0)
    for mine, row in zip(found, rows, strict=True):
        assert mine.sigma_mean == pytest.approx(row.sigma_mean)


def _independent(*shape):
    """Examples whose values are uncorrelated and of one spread, exactly."""
    x = torch.randn(shape[0], math.prod(shape[1:]), dtype=torch.float64)
    return torch.linalg.qr(x - x.mean(0)).Q.reshape(shape).float()


@pytest.mark.parametrize(
    ("model", "shape", "pull"),
    [
        (nn.Linear(1, 2), (20, 1), 1 / 64),
        (nn.Linear(8, 2), (20, 8), 1 / 8),
        (nn.Linear(63, 2), (80, 63), 63 / 64),
        (nn.Linear(64, 2), (80, 64), 1.0),
        (nn.Linear(99, 2), (200, 99), 1.0),
        (nn.Linear(2, 2), (20, 4, 2), 1 / 8),  # a sequence
        (nn.Conv2d(1, 2, 3), (80, 1, 8, 8), 1.0),
    ],
)
def test_few_values_of_an_example_get_less_pull_and_a_smaller_start(model, shape, pull):
    convert(model)
    batches, variance = [_independent(*shape), _independent(*shape)], model.variance
    calibrate(model, batches)
    torch.testing.assert_close(variance.pull, torch.full_like(variance.pull, pull))
    start = (variance.log_variance - variance.log_prior).exp()
    torch.testing.assert_close(start, variance.pull, rtol=1e-4, atol=0)
    prior = variance.log_prior.clone()
    calibrate(model, batches, ratio=1.0)  # what is asked for is the start
    assert torch.equal(variance.log_prior, prior) and torch.equal(variance.log_variance, prior)
    torch.testing.assert_close(variance.pull, torch.full_like(variance.pull, pull))


@pytest.mark.parametrize(
    ("model", "shapes", "pull"),
    [
        # examples without a batch, too few to tell what is alike
        (nn.Linear(8, 2), [(8,), (8,)], 1 / 8),
        (nn.Conv1d(2, 2, 1), [(2, 4), (2, 4)], 1 / 8),
        # sequences of several lengths, by their mean
        (nn.Linear(4, 2), [(10, 2, 4), (10, 6, 4)], 16 / 64),
    ],
)
def test_the_pull_of_examples_without_a_batch_and_of_several_lengths(model, shapes, pull):
    convert(model)
    calibrate(model, [torch.randn(shape) for shape in shapes])
    assert bool((model.variance.pull == pull).all())


@pytest.mark.parametrize(("values", "copies"), [(1, 4), (2, 4), (8, 2), (8, 5)])
def test_values_that_say_the_same_get_more_pull(values, copies):
    n = values * copies
    x = torch.randn(4000, values).repeat(1, copies)
    model = convert(nn.Linear(n, 2))
    calibrate(model, x.split(500))
    want = torch.full([n], min(1.0, n / 64 * copies))
    torch.testing.assert_close(model.variance.pull, want, rtol=0.02, atol=0)


def test_few_examples_do_not_look_alike_by_chance():
    """The naive estimate takes 8 independent values of 12 examples for fewer than 5."""
    torch.manual_seed(0)  # the bound is for one draw, whatever the seed of the run
    model, pulls = convert(nn.Linear(8, 2)), []
    for _ in range(200):
        calibrate(model, [torch.randn(12, 8)])
        pulls.append(model.variance.pull[0].item())
    assert statistics.median(pulls) == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize(("depth", "pull"), [(3, 1.0), (4, 1.0), (5, 0.8), (16, 0.25)])
def test_a_deep_model_pulls_no_more_than_four_layers(depth, pull):
    model = convert(nn.Sequential(*[nn.Linear(64, 64) for _ in range(depth)]))
    calibrate(model, [torch.randn(80, 64)])
    for layer in model:
        torch.testing.assert_close(layer.variance.pull, torch.full((64,), pull))
    # layers that share a variance count once
    model = convert(nn.Sequential(*[nn.Linear(64, 64) for _ in range(depth)]))
    for layer in model[1:]:
        layer.variance = model[0].variance
    calibrate(model, [torch.randn(80, 64)])
    assert bool((model[0].variance.pull == 1).all())


def test_the_layer_that_is_reached_first_sets_the_pull_of_all():
    model = convert(nn.ModuleDict({"last": nn.Linear(64, 2), "first": nn.Linear(8, 64)}))
    model.forward = lambda x: model["last"](model["first"](x))
    calibrate(model, [_independent(20, 8)])
    assert all(bool((layer.variance.pull == 1 / 8).all()) for layer in model.values())
    calibrate(model["last"], [torch.randn(20, 64)])
    assert bool((model["last"].variance.pull == 1).all())


def test_how_alike_values_are_is_measured_where_it_is_read(monkeypatch):
    """Of the layer that the batches reach first; and not for a summary, which reads spreads."""
    added, add = [], spreads.Examples.add

    def noted(self, x, dim):
        added.append(tuple(x.shape))
        add(self, x, dim)

    monkeypatch.setattr(spreads.Examples, "add", noted)
    model = convert(nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 10), nn.Linear(10, 2)))
    calibrate(model, torch.randn(40, 8).split(20))
    assert added == [(20, 8), (20, 8)]
    summary(model, [torch.randn(20, 8)])
    assert len(added) == 2


def test_a_feature_that_never_varies_gets_the_floor():
    model = convert(nn.Linear(3, 2))
    x = torch.randn(100, 3)
    x[:, 1] = 4.0
    rows = calibrate(model, [x], ratio=0.1, per="feature", floor=0.05)
    rms = x.double().std(0, correction=0).square().mean().sqrt().item()
    assert model.variance.sigma[1].item() == pytest.approx(0.1 * 0.05 * rms)
    assert rows[0].ratio == pytest.approx(0.1)  # the blank feature is left out of it
    assert summary(model, [torch.ones(100, 3)])[0].ratio is None  # all of them


def test_calibrate_takes_tensors_tuples_and_mappings_and_restores_modes():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.9)

        def forward(self, x):
            # by keyword: the hook finds it there too
            return self.norm(self.drop(self.linear(input=x)))

    model = convert(Named())
    model.drop.eval()
    modes = [m.training for m in model.modules()]
    x = torch.randn(10, 4)
    state = torch.get_rng_state()
    sigmas = []
    for batch in (x, (x, torch.zeros(10)), [x], {"x": x}):
        calibrate(model, [batch])
        sigmas.append(model.linear.variance.sigma)
    assert all(torch.equal(sigmas[0], sigma) for sigma in sigmas)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert model.norm.num_batches_tracked == 0
    assert not model.linear._forward_pre_hooks


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, functools.partial(nn.InstanceNorm2d, track_running_stats=True)]
)
def test_calibrate_before_training_measures_what_training_sees(norm):
    """In eval mode a norm whose running statistics are still 0 and 1 normalises nothing: the
    inputs behind it shrink from layer to layer, and their noise would."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), norm(3), nn.ReLU()) for _ in range(4)]
    model, x = convert(nn.Sequential(*blocks)), 5 * torch.rand(16, 3, 12, 12)
    kept = {name: b.clone() for name, b in model.named_buffers() if ".variance." not in name}
    seen = {}

    def note(layer, args, out):
        spread = args[0].std((0, 2, 3), correction=0).square().mean().sqrt()
        seen[layer.number] = spread.item()

    for block in model:
        block[0].register_forward_hook(note)
    calibrate(model, [x], ratio=1)
    assert all(torch.equal(model.get_buffer(name), b) for name, b in kept.items())
    assert all(block[1].track_running_stats for block in blocks)
    with noise_off():
        model(x)
    sigma = {block[0].number: block[0].variance.sigma[0].item() for block in model}
    assert sigma == pytest.approx(seen, rel=1e-4)
    before = seen[3]
    calibrate(model, [x], ratio=1)  # the norms have seen a batch: now their running statistics hold
    model.eval()(x)
    assert model[3][0].variance.sigma[0].item() == pytest.approx(seen[3], rel=1e-4)
    assert seen[3] != pytest.approx(before, rel=0.1)


def test_calibrate_gives_token_models_less_noise_where_nothing_is_set():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.linear = nn.Embedding(9, 64), nn.Linear(64, 2)

        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
            return self.linear(self.embed(input_ids) if inputs_embeds is None else inputs_embeds)

    model, ids = convert(Tokens()), torch.randint(9, (6, 5))
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    looked_up = {"inputs_embeds": torch.randn(6, 5, 64)}
    batches = (ids, ids.int(), [(ids, ids)], words, iter([words]), looked_up)
    for batch in batches:
        assert calibrate(model, batch)[0].ratio == pytest.approx(0.1, rel=0.3)
    assert calibrate(model, words, ratio=1.0)[0].ratio == pytest.approx(1, rel=0.3)
    # whole numbers that are no input, and pixels, are no tokens
    model = convert(nn.Sequential(nn.Linear(64, 2)))
    for batch in ([(torch.randn(6, 64), torch.arange(6))], torch.randn(6, 64)):
        assert calibrate(model, batch)[0].ratio == pytest.approx(1, rel=0.3)


def test_calibrate_knows_tokens_by_the_embedding_that_reads_them():
    class TwoTowers(nn.Module):  # open_clip's names
        def __init__(self):
            super().__init__()
            self.embed, self.places = nn.Embedding(99, 64), nn.Embedding(64, 64)
            self.visual, self.body = nn.Linear(64, 8), nn.Linear(64, 8)

        def forward(self, image, text=None, mask=None, column=None):
            x = self.visual(image)
            if column is not None:
                return x + self.body(self.embed(column))
            if text is None:
                return x + self.body(self.places(torch.arange(len(x)).expand(2, -1))).mean()
            return x + self.body(self.embed(text[:, 1:])).mean(1) + mask.sum()

    model, image, text = convert(TwoTowers()), torch.randn(64, 64), torch.randint(99, (64, 5))
    given = {"image": image, "text": text, "mask": torch.ones(64, 5).long()}
    for batch in (given, UserDict(given), [{"image": image}, given]):
        assert calibrate(model, batch)[0].ratio == pytest.approx(0.1, rel=0.3)
    # neither a table's column, nor places that the model makes itself, nor a mask of it, nor steps
    column = {"image": image, "column": text[:, 0]}
    steps = {"image": image, "text": torch.arange(5).repeat(64, 1), "mask": given["mask"]}
    for batch in (column, {"image": image}, {"image": image, "mask": given["mask"]}, steps):
        assert calibrate(model, batch)[0].ratio == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("shape", [(64, 5), (64, 5, 3)])
def test_calibrate_knows_tokens_that_are_mapped(shape):
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.linear = nn.Embedding(99, 64), nn.Linear(64, 8)

        def forward(self, ids):
            return torch.vmap(lambda each: self.linear(self.embed(each)))(ids)

    rows = calibrate(convert(Mapped()), {"ids": torch.randint(99, shape)})
    assert rows[0].ratio == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize("more", [0, 1])
def test_calibrate_knows_the_labels_that_a_decoder_reads_one_place_later(more):
    class Speech(nn.Module):  # as Whisper, with labels or with decoder_input_ids
        def __init__(self):
            super().__init__()
            self.embed, self.encoder = nn.Embedding(99, 64), nn.Linear(64, 8)
            self.decoder = nn.Linear(64, 8)

        def forward(self, sound, ids=None, labels=None, classes=None):
            if ids is None and labels is not None:
                start = labels.new_full((len(labels), 1), 98)
                kept = labels[:, : labels.shape[1] - 1 + more].clamp(min=0)
                ids = torch.cat([start, kept], 1)
            if classes is not None:
                ids = classes.flip(1)
            return self.decoder(self.embed(ids)) + self.encoder(sound)[:, None]

    model, sound = convert(Speech()), torch.randn(64, 64)
    ids, kinds = torch.randint(90, (64, 7)), torch.randint(90, (64, 7))
    ids[:, 0] = 98
    labels = torch.cat([ids[:, 1:], torch.full((64, 1), -100)], 1)
    labels[3, 4:] = -100
    for batch in ({"ids": ids}, {"labels": labels}, {"labels": labels.int()}):
        assert calibrate(model, {"sound": sound, **batch})[0].ratio == pytest.approx(0.1, rel=0.3)
    given = {"sound": sound, "classes": kinds}  # which no embedding reads in this order
    assert calibrate(model, given)[0].ratio == pytest.approx(1, rel=0.3)


def test_calibrate_sees_through_torch_compile():
    torch._dynamo.reset()
    model = torch.compile(convert(nn.Sequential(nn.Linear(4, 4))), backend="eager")
    x = torch.randn(10, 4)
    with noise_off():
        model.eval()(x)
    calibrate(model, [x], ratio=1.0, per="feature")
    (layer,) = dip_layers(model).values()
    torch.testing.assert_close(layer.variance.sigma, x.std(0, correction=0))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_calibrate_passes_a_layer_without_features():
    model = convert(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)))
    assert [row.features for row in calibrate(model, [torch.randn(9, 4)])] == [4, 0]


@pytest.mark.parametrize("ratio", [None, 1.0, 0.5])
@pytest.mark.parametrize("per", ["layer", "feature"])
def test_a_given_start_is_that_share_of_the_prior(ratio, per):
    model = convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    calibrate(model, [torch.randn(64, 4)], ratio, per=per, start=0.3)
    for layer in (model[0], model[2]):
        below = (layer.log_variance - layer.variance.log_prior).detach()
        torch.testing.assert_close(below, torch.full_like(below, 2 * math.log(0.3)))
    assert dip.kl_penalty(model).item() > 0
    calibrate(model, [torch.randn(64, 4)], ratio, per=per, start=1)
    assert dip.kl_penalty(model).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_first_layer_without_features_says_nothing_of_the_start():
    model = convert(nn.ModuleDict({"none": nn.Linear(0, 4), "some": nn.Linear(4, 3)}))
    model.forward = lambda x: model["some"](model["none"](x[:, :0]) + x)
    calibrate(model, [torch.randn(9, 4)])
    variance = model["some"].variance
    assert torch.equal(variance.log_variance, variance.log_prior)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "at least one batch"),
        ([[]], {}, "an empty one"),
        ([torch.ones(5, 4)], {}, r"constant ones at \['0', '1'\]"),
        ([torch.full((5, 4), float("nan"))], {}, "NaN or infinity"),
        ([torch.zeros(0, 4)], {}, r"none reached \['0', '1'\]"),
        ([torch.randn(5, 4)], {"ratio": 0}, "^ratio: "),
        ([torch.randn(5, 4)], {"ratio": 1e20}, r"^ratio: .* 1e\+20 and start=1.0 at \['0', '1'\]"),
        ([torch.randn(5, 4)], {"start": 0}, "^start: "),
        ([torch.randn(5, 4)], {"floor": -1}, "^floor: "),
        (
            [torch.randn(5, 4)],
            {"per": "model"},
            r"^per: expected one of \('layer', 'feature'\), got 'model'",
        ),
    ],
)
def test_calibrate_names_bad_input_and_leaves_the_variances(batches, options, message):
    model = convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0.25)
    with pytest.raises(ValueError, match=message):
        calibrate(model, batches, **options)
    assert summary(model)[0].sigma_mean == 0.5
    assert model.training


def test_a_layer_that_is_never_reached_is_named():
    model = convert(nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)}))
    model.forward = lambda x: model["used"](x)
    with pytest.raises(ValueError, match=r"none reached \['unused'\]; give .*exclude"):
        calibrate(model, [torch.randn(3, 4)])


class ClassToken(nn.Module):
    """A head that reads a token which the images reach by a scaled branch alone."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.token = scale, nn.Parameter(torch.randn(8))
        self.mix, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.norm(self.token + self.scale * self.mix(x)))


@pytest.mark.parametrize(
    ("scale", "shift", "named"),
    [(1e-4, 0, "'head'"), (0.1, 0, None), (1.0, 1e4, "'mix', 'head'"), (1.0, 100, None)],
)
def test_calibrate_names_layers_whose_inputs_hardly_vary_yet(scale, shift, named):
    torch.manual_seed(0)
    model, x = convert(ClassToken(scale)), torch.randn(32, 8)
    texts = warned(lambda: calibrate(model, [x + shift]), "a thousandth of their size")
    assert [f"inputs of [{named}] vary" in text for text in texts] == [True] * (named is not None)


@pytest.mark.parametrize("options", [{}, {"per": "feature"}])
@pytest.mark.parametrize(
    "large, blank, front, named",
    [
        (3, 0, nn.Identity(), True),  # the raw columns of a table
        (3, 0, nn.BatchNorm1d(8), False),
        (4, 0, nn.Identity(), False),  # half of them are not most
        (8, 0, nn.Identity(), False),
        (3, 5, nn.Identity(), False),  # as blank pixels
    ],
)
def test_calibrate_names_a_first_layer_most_of_whose_features_are_small(
    large, blank, front, named, options
):
    torch.manual_seed(0)
    scale = torch.tensor([1000.0] * large + [1.0] * (8 - large - blank) + [0.0] * blank)
    model = convert(nn.Sequential(front, nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)))
    x = torch.randn(64, 8) * scale
    texts = warned(lambda: calibrate(model, [x], **options), "Standardise the columns")
    assert len(texts) == named and all("noise of '1' vary" in text for text in texts)


def test_summary_prints_a_table():
    model = convert(Net(), 0.04)
    rows = summary(model)
    assert isinstance(rows, Summary)
    assert rows[0].ratio is None
    measured = summary(model, [X])
    assert measured[0].ratio == pytest.approx(0.2 / X.std(correction=0).item(), rel=1e-4)
    assert summary(model)[0].ratio == measured[0].ratio
    lines = str(measured).splitlines()
    assert len(lines) == 5
    assert all(word in lines[0] for word in ("layer", "sigma min", "ratio"))
    assert str(summary(convert(nn.Linear(2, 2)))).splitlines()[1].startswith("(root)")
    deep = nn.Sequential(nn.ModuleDict({"a_long_name": nn.Linear(2, 2)}), nn.Linear(2, 2))
    assert len({len(line) for line in str(summary(convert(deep))).splitlines()}) == 1
