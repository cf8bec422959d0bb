"""layers: plain in eval mode, the projection in training; parameters survive what PyTorch does to
modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dipkernels as dip
from dipkernels import functional
from dipkernels.nn import numbering
from dipkernels.nn.conv import DIPConv2d
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import dip_layers, number_layers
from dipkernels.nn.variance import Variance
from dipkernels.noise import contexts
from dipkernels.noise.contexts import fixed_noise, sampling_on

CASES = [
    pytest.param(lambda **kw: DIPLinear(12, 7, **kw), (5, 12), id="linear"),
    pytest.param(lambda **kw: DIPLinear(12, 7, bias=False, **kw), (2, 3, 12), id="linear-3d"),
    pytest.param(lambda **kw: DIPConv2d(6, 4, 3, padding=1, **kw), (2, 6, 5, 4), id="conv"),
    pytest.param(
        lambda **kw: DIPConv2d(6, 4, 3, padding=1, padding_mode="circular", groups=2, **kw),
        (6, 5, 4),
        id="conv-chw",
    ),
    pytest.param(lambda **kw: DIPInput(12, **kw), (5, 12), id="input"),
    pytest.param(lambda **kw: DIPInput(12, dim=1, **kw), (5, 12, 3), id="input-dim1"),
]


def plain_forward(layer, x):
    for plain in (nn.Linear, nn.Conv2d):
        if isinstance(layer, plain):
            return plain.forward(layer, x)
    return x


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_eval_mode_is_the_plain_layer_to_the_bit(make, shape):
    layer, x = make().eval(), torch.randn(shape)
    assert torch.equal(layer(x), plain_forward(layer, x))


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_training_mode_is_the_plain_layer_of_the_perturbed_input(make, shape):
    layer, x = make(init_variance=0.25, num_samples=4), torch.randn(shape)
    dim = getattr(layer, "dim", -3 if isinstance(layer, DIPConv2d) else -1)
    with fixed_noise(9):
        y = layer(x)
    seed = torch.tensor([9, layer.number])
    # four samples averaged: sigma / 2
    u = x + 0.5 / 2 * functional.noise(tuple(shape), seed, dim=dim)
    torch.testing.assert_close(y, plain_forward(layer, u), rtol=1e-5, atol=1e-5)


def test_conv_keeps_channels_last():
    layer = DIPConv2d(8, 8, 3)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    with fixed_noise(1):
        y, contiguous = layer(x), layer(x.contiguous())
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, contiguous, rtol=1e-5, atol=1e-5)


def test_log_variance_keeps_its_bits_through_half_precision():
    layer = DIPLinear(8, 8, init_variance=0.0123)
    value = layer.log_variance.detach().clone()
    for cast in (
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.half),
    ):
        cast(layer)
        assert layer.log_variance.dtype is torch.float32
        assert torch.equal(layer.log_variance, value)
        assert layer.weight.dtype in (torch.bfloat16, torch.half)
    layer.double()
    assert layer.log_variance.dtype is torch.float64
    layer.bfloat16()
    assert torch.equal(layer.log_variance, value)
    layer(torch.randn(2, 8, dtype=torch.bfloat16)).sum().backward()
    layer.double().half()
    assert layer.log_variance.grad.dtype is torch.float32


def test_log_variance_is_float32_under_a_bfloat16_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = DIPLinear(4, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.dtype is torch.bfloat16
    assert layer.log_variance.dtype is torch.float32


def test_the_prior_is_kept_in_float32_and_loads_with_or_without_an_entry():
    layer = DIPLinear(4, 4, init_variance=0.5)
    assert torch.equal(layer.variance.log_prior, layer.log_variance)
    layer.variance.log_prior.fill_(-1.25)
    layer.variance.pull.fill_(0.5)
    state = layer.bfloat16().state_dict()
    assert state["variance.log_prior"].dtype is torch.float32
    again = DIPLinear(4, 4)
    again.load_state_dict(state)
    assert torch.equal(again.variance.log_prior, torch.full((4,), -1.25))
    assert again.variance.pull.tolist() == [0.5] * 4
    del state["variance.log_prior"], state["variance.pull"]  # a release without them
    other = DIPLinear(4, 4, init_variance=0.3)
    other.load_state_dict(state)
    assert torch.equal(other.variance.log_prior, torch.full((4,), 0.3).log())
    layer.variance.reset_parameters()
    assert torch.equal(layer.variance.log_prior, torch.full((4,), 0.5).log())
    assert other.variance.pull.tolist() == layer.variance.pull.tolist() == [1.0] * 4


def test_a_wrong_shape_and_a_missing_weight_are_errors():
    layer = DIPLinear(4, 4)
    with pytest.raises(RuntimeError, match=r"size mismatch for variance.log_variance"):
        layer.load_state_dict({**layer.state_dict(), "variance.log_variance": torch.zeros(5)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({"bias": layer.bias})


def test_loading_by_assignment_keeps_float32():
    layer, source = DIPLinear(4, 4), DIPLinear(4, 4, init_variance=0.3)
    state = {name: value.bfloat16() for name, value in source.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.weight.dtype is torch.bfloat16
    assert layer.log_variance.dtype is layer.variance.log_prior.dtype is torch.float32


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_may_shard_the_variances_apart(reshard, one_rank):
    from torch.distributed.fsdp import fully_shard

    plain = nn.Sequential(DIPLinear(8, 8), nn.ReLU(), DIPLinear(8, 8))
    sharded, x = copy.deepcopy(plain), torch.randn(4, 8)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer.variance, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(sharded, mesh=mesh)
    for model in (plain, sharded):
        with fixed_noise(1):
            model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad.full_tensor())


def test_number_layers_counts_from_zero_and_shared_layers_once():
    shared = DIPLinear(4, 4)
    model = number_layers(
        nn.Sequential(shared, nn.Sequential(DIPInput(4), shared), DIPConv2d(4, 4, 1))
    )
    assert [
        (name, layer.number, layer._stream.tolist()) for name, layer in dip_layers(model).items()
    ] == [
        ("0", 0, [0, 0]),
        ("1.0", 1, [0, 1]),
        ("2", 2, [0, 2]),
    ]


def test_more_layers_than_streams_are_refused(monkeypatch):
    monkeypatch.setattr(numbering, "MAX_LAYERS", 2)
    with pytest.raises(ValueError, match="at most 2 DIP layers, got 3"):
        number_layers(nn.Sequential(*(DIPInput(1) for _ in range(3))))
    number_layers(nn.Sequential(DIPInput(1), DIPInput(1)))


@pytest.mark.parametrize(
    "bad",
    [
        *(0.0, -1.0, float("nan"), float("inf"), 1e39, "a", None, torch.ones(3)),
        *(torch.tensor([1.0, each, 1, 1]) for each in (0.0, -1.0, float("nan"), float("inf"))),
    ],
)
@pytest.mark.parametrize(
    "make", [lambda v: DIPLinear(4, 2, init_variance=v), lambda v: Variance(4, v)]
)
def test_a_bad_init_variance_is_named(make, bad):
    with pytest.raises((TypeError, ValueError), match=r"^init_variance: expected"):
        make(bad)


def test_features_lie_in_the_last_dimension_by_default():
    x = torch.randn(2, 3, 4)
    for layer in (DIPInput(4), dip.DIPActivation(4, "relu"), dip.DIPGatedActivation(4)):
        inputs = (x, x) if isinstance(layer, dip.DIPGatedActivation) else (x,)
        assert layer(*inputs).shape == x.shape


def test_repr_shows_the_initial_variance():
    assert "in_features=4, out_features=2, bias=True, init_variance=0.25, num_samples=3" in repr(
        DIPLinear(4, 2, init_variance=0.25, num_samples=3)
    )
    assert "4, dim=1, init_variance=[0.5 .. 2]" in repr(
        DIPInput(4, dim=1, init_variance=torch.tensor([0.5, 1, 1, 2]))
    )
    assert "dim=-3" in repr(dip.DIPActivation(4, "relu", -3))


def test_sampling_in_eval_uses_the_same_noise_as_training():
    layer, x = DIPLinear(8, 8), torch.randn(4, 8)
    with fixed_noise(2):
        training = layer(x)
        with sampling_on():
            assert torch.equal(layer.eval()(x), training)
    assert contexts.MODE is None
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
