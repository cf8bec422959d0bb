"""An input that a noised layer cannot take is refused in the layer's words, never in those of its
kernels."""

import re

import pytest
import torch
from torch import nn

import dipkernels as dip
from dipkernels.nn.numbering import dip_layers
from dipkernels.nn.sharing import share_noise
from dipkernels.nn.twin import twin_type


class Shifted(nn.Module):
    """A class of another package."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x, times=1):
        return times * x + self.weight


def twin():
    layer = twin_type(Shifted, -1)()
    layer._set_up(4, 0.01, 1, "cpu")
    return layer


def sharing():
    layers = dip.convert(nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]))
    share_noise(list(dip_layers(layers).values()))
    return layers[1]


def linear(**options):
    return lambda: dip.DIPLinear(4, 2, **options)


ROWS, ALONG = r"\[\.\.\., 4\]", "4 features along dimension 1"
LAYERS = {  # a maker, an input that fits, and what the message says of its shape
    "linear": (linear(), (3, 4), ROWS),
    "linear-keep-x": (linear(keep="x"), (3, 4), ROWS),
    "linear-mean": (linear(num_samples=2, activation="relu", estimator="mean"), (3, 4), ROWS),
    "linear-analytic": (linear(activation="relu", estimator="analytic"), (3, 4), ROWS),
    "linear-sharing": (sharing, (3, 4), ROWS),
    "conv1d": (lambda: dip.DIPConv1d(4, 2, 1), (2, 4, 5), r"\[N, 4, L\] or \[4, L\]"),
    "conv2d": (lambda: dip.DIPConv2d(4, 2, 1), (2, 4, 5, 5), r"\[N, 4, H, W\] or"),
    "conv3d": (lambda: dip.DIPConv3d(4, 2, 1), (2, 4, 5, 5, 5), r"\[N, 4, D, H, W\] or"),
    "input": (lambda: dip.DIPInput(4, dim=1), (2, 4, 5), ALONG),
    "input-last": (lambda: dip.DIPInput(4, dim=1), (2, 4), ALONG),
    "norm": (lambda: dip.DIPLayerNorm(4), (3, 4), ROWS),
    "twin": (twin, (3, 4), ROWS),
}
# of the exact mean torch's product says what it takes
DRAWING = {name: case for name, case in LAYERS.items() if name != "linear-analytic"}
OF_ALL, OF_DRAWING = (
    pytest.mark.parametrize("make, shape, expected", cases.values(), ids=cases)
    for cases in (LAYERS, DRAWING)
)


def begins(layer):
    """How its messages begin: by its class, and how it was made."""
    return rf"^{type(layer).__name__}\(.*"


def refused(layer, x, error, text):
    """The message, which speaks of the input alone."""
    with pytest.raises(error, match=text) as caught:
        layer(x)
    message = str(caught.value)
    assert "sigma" not in message and "seed" not in message and "dipkernels::" not in message
    return message


@OF_ALL
def test_a_wrong_number_of_features_names_the_layer_and_the_shape(make, shape, expected):
    layer, dim = make(), make().feature_dim
    assert layer(torch.ones(shape)).isfinite().all()
    wrong = list(shape)
    wrong[dim] = 7
    said = begins(layer) + rf"expected an input (of shape|with) .*{expected}"
    assert str(tuple(wrong)) in refused(layer, torch.ones(wrong), ValueError, said)
    refused(layer, torch.ones(()), ValueError, begins(layer) + rf"{expected}.*got \(\)")


@OF_ALL
@pytest.mark.parametrize("wrong", [(2, 4), (1,), (5,)])
def test_a_log_variance_of_another_shape_is_no_wrong_input(make, shape, expected, wrong):
    """As a hypernetwork gives it to functional_call."""
    given = {"variance.log_variance": torch.zeros(wrong)}
    with pytest.raises(ValueError, match=begins(make()) + r"expected a log_variance of shape"):
        torch.func.functional_call(make(), given, torch.ones(shape))


CUT = r"its weight reads that many.*to_plain, then convert and calibrate again"


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_a_weight_that_was_cut_after_conversion_is_said(groups):
    """Structured pruning, a stem for another number of channels."""
    plain = nn.Linear(8, 2) if groups is None else nn.Conv2d(8, 2, 1, groups=groups)
    layer, shape = dip.convert(plain), (3, *[5, 5] * (groups is not None))
    x = torch.ones(3, 4, *shape[1:])
    assert not re.search(CUT, refused(layer, torch.ones(3, 3, *shape[1:]), ValueError, "expected"))
    layer.weight = nn.Parameter(layer.weight[:, : 4 // (groups or 1)])
    refused(layer, x, ValueError, rf"expected an input .*8.*got .*4.*{CUT}")
    with pytest.raises(ValueError, match=CUT):
        dip.calibrate(layer, [x])
    setattr(layer, "in_features" if groups is None else "in_channels", 4)
    assert dip.convert(dip.to_plain(layer))(x).isfinite().all()


def test_a_wrong_input_of_a_transposed_convolution_is_no_cut_weight():
    """Its weight is [in, out, ...]: an input with as many channels as come out fits no weight."""
    up, x = nn.Sequential(nn.ConvTranspose2d(8, 4, 2)), torch.ones(2, 8, 5, 5)
    layer = dip.convert(up, before=["0"], batches=[x])[0]
    assert not re.search(
        CUT, refused(layer, x[:, :4], ValueError, "expected an input .*8.*got .*4")
    )


def test_an_input_that_ends_before_the_features_dimension_is_named():
    refused(
        dip.DIPInput(4, dim=1), torch.ones(4), ValueError, "expected an input with 4 features along"
    )


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
@OF_DRAWING
def test_a_type_without_noise_is_named(make, shape, expected, dtype):
    layer = make()
    said = begins(layer) + rf"torch\.float32.*got {dtype}"
    refused(layer, torch.ones(shape).to(dtype), TypeError, said)


def unusual(x):
    rows = [x[0], x[0]]
    yield "x.to_dense()", x.to_sparse()
    yield "to_padded_tensor", torch.nested.nested_tensor(rows, layout=torch.jagged)
    yield "to_padded_tensor", torch.nested.nested_tensor(rows)
    if x.dim() == 2:
        yield "x.to_dense()", x.to_sparse_csr()
        yield "x.to_dense()", x.to_sparse_csc()


@pytest.mark.filterwarnings("ignore:.*(Sparse|nested).*:UserWarning")
@OF_DRAWING
def test_sparse_and_nested_tensors_are_refused_with_the_way_out(make, shape, expected):
    layer = make()
    for way_out, x in unusual(torch.ones(shape)):
        message = refused(layer, x, TypeError, begins(layer) + "expected a dense tensor")
        assert way_out in message and "eval mode" in message


@OF_ALL
def test_a_tensor_on_another_device_is_named(make, shape, expected):
    layer, x = make(), torch.ones(shape, device="meta")
    said = begins(layer) + "on cpu, where its variance is, got one on meta"
    refused(layer, x, ValueError, said)


def test_layers_on_the_meta_device_train():
    layers = nn.Sequential(dip.DIPLinear(4, 4), nn.Unflatten(-1, (4, 1)), dip.DIPConv1d(4, 2, 1))
    assert layers.to("meta")(torch.ones(3, 4, device="meta")).shape == (3, 2, 1)


def test_attention_names_itself():
    attention, x = dip.DIPMultiheadAttention(4, 2), torch.ones(3, 2, 4)

    def attend(x):
        return attention(x, x, x)

    own = "^in-projection of DIPMultiheadAttention"
    refused(attend, x.to_sparse(), TypeError, f"{own}.*dense")
    refused(attend, x.long(), TypeError, rf"{own}.*got torch\.int64")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "make, plain",
    [
        (lambda: dip.DIPLinear(4, 2), nn.Linear(4, 2)),
        (lambda: dip.DIPLinear(4, 2, keep="x"), nn.Linear(4, 2)),
        (lambda: dip.DIPConv1d(4, 2, 1), nn.Conv1d(4, 2, 1)),
    ],
    ids=["linear", "linear-keep-x", "conv"],
)
def test_a_weight_of_another_type_is_what_the_plain_layer_says(make, plain, dtype):
    messages = []
    for module in (make(), plain):
        with pytest.raises(RuntimeError) as caught:
            module(torch.ones(3, 4, 4, dtype=dtype))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_variance_in_half_precision_is_named():
    layer = dip.DIPLinear(4, 2)
    layer.variance.register_forward_hook(lambda module, args, log_variance: log_variance.bfloat16())
    said = r"^DIPLinear\(.*its variance in torch\.float32, got torch\.bfloat16; .*FSDP"
    with pytest.raises(TypeError, match=said):
        layer(torch.ones(3, 4))


def test_a_failure_that_is_not_the_inputs_stays_itself():
    layer = dip.DIPLinear(4, 2)
    layer.weight = nn.Parameter(torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        layer(torch.ones(3, 4))


def test_compiled_layers_say_the_same():
    torch._dynamo.reset()
    compiled = torch.compile(dip.DIPLinear(4, 2), backend="eager")
    refused(compiled, torch.ones(3, 7), ValueError, r"^DIPLinear\(.*\[\.\.\., 4\], got \(3, 7\)")
    with pytest.raises(RuntimeError, match="must have the same dtype, but got"):
        compiled(torch.ones(3, 4, dtype=torch.bfloat16))  # and not a layer of that type


def test_a_complex_layer_names_the_way_out_and_is_the_plain_one_in_eval_mode():
    layer = dip.convert(nn.Linear(4, 4, dtype=torch.complex64))
    x = torch.ones(3, 4, dtype=torch.complex64)
    said = r"^DIPLinear\(.*got torch\.complex64; noise is real"
    assert "convert(exclude=...)" in refused(layer, x, TypeError, said)
    assert torch.equal(layer.eval()(x), nn.functional.linear(x, layer.weight, layer.bias))


@OF_ALL
def test_what_is_no_tensor_is_named(make, shape, expected):
    layer = make()
    for given, kind in ((None, "NoneType"), ([1.0] * 4, "list")):
        said = begins(layer) + f"expected a tensor where noise is drawn, got {kind}; in eval mode"
        refused(layer, given, TypeError, said)


def test_a_packed_sequence_is_refused_where_noise_is_drawn_and_taken_in_eval_mode():
    rnn, x = nn.LSTM(4, 3, batch_first=True), torch.randn(2, 5, 4)
    dip.convert(rnn, before=[""], batches=[x])
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 4], batch_first=True)
    refused(rnn, packed, TypeError, r"^DIPLSTM\(.*got PackedSequence; noise it before")
    with dip.noise_off():
        off = rnn(packed)[0].data
    assert torch.equal(rnn.eval()(packed)[0].data, off)


@pytest.mark.filterwarnings("ignore:.*nested.*:UserWarning")
def test_noise_off_takes_what_the_plain_layer_takes():
    model, x = dip.convert(nn.Sequential(nn.Linear(4, 2))), torch.randn(3, 4)
    with dip.noise_off():
        nested = model(torch.nested.nested_tensor([x]))[0]
        assert torch.allclose(model(x.to_sparse()), model(x)) and torch.allclose(nested, model(x))


@pytest.mark.filterwarnings("ignore:.*nested.*:UserWarning")
@pytest.mark.parametrize("read", [dip.calibrate, dip.summary])
def test_batches_that_hold_no_tensors_are_named(read):
    model, x = dip.convert(nn.Sequential(nn.Linear(4, 2))), torch.randn(3, 4)
    jagged = torch.nested.nested_tensor([x, x], layout=torch.jagged)
    for batch, kind in ((x.numpy(), "ndarray"), (None, "NoneType"), (jagged, "a nested tensor")):
        said = f"^batches: expected dense tensors, got {kind} at .*'0'"
        with pytest.raises(TypeError, match=said):
            read(model, [batch])
