"""trajectories and predict: independent noise per trajectory, any structure in and out, and clear
errors."""

import collections
import dataclasses
import itertools
import math
import types
from collections import UserDict
from collections.abc import MutableMapping
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn

import dipkernels as dip
from dipkernels import (
    DIPInput,
    DIPLinear,
    convert,
    fixed_noise,
    noise_off,
    predict,
    sampling_on,
    trajectories,
)


def mlp():
    return convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 0.25)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


# ---- trajectories --------------------------------------------------------------------------------


def test_trajectories_are_independent_passes_of_the_folded_batch():
    model = mlp()
    with fixed_noise(1):
        out = trajectories(model, X, m=4)
        folded = model(X.repeat_interleave(4, 0))
    assert out.shape == (4, 5, 3)
    torch.testing.assert_close(out, folded.view(5, 4, 3).transpose(0, 1))
    assert all(not torch.allclose(out[i], out[j]) for i in range(4) for j in range(i))


def test_trajectories_without_noise_are_the_plain_output():
    model = mlp()
    with noise_off():
        torch.testing.assert_close(trajectories(model, X, m=3), model(X).expand(3, 5, 3))


def test_equal_trajectories_of_layers_in_eval_mode_are_refused():
    """A frozen backbone, or a teacher in eval mode that shares the layers of a student."""
    model = nn.Sequential(mlp(), nn.ReLU(), nn.Linear(3, 3))
    model[0].eval()
    with pytest.raises(RuntimeError, match=r"eval mode in each .*equal.*train\(\).*m=1"):
        trajectories(model, X, m=2)
    assert trajectories(model, X, m=1).shape == (1, 5, 3)
    with noise_off():
        assert trajectories(model, X, m=2).shape == (2, 5, 3)
    with sampling_on():
        a, b = trajectories(model, X, m=2)
    model[0][0].train()  # one that draws is enough
    c, d = trajectories(model, X, m=2)
    assert not torch.equal(a, b) and not torch.equal(c, d)


def test_an_examples_noise_does_not_depend_on_the_sharding():
    model, m = mlp(), 4
    with fixed_noise(1):
        whole = trajectories(model, X, m=m)
    with fixed_noise(1, row0=2 * m):
        part = trajectories(model, X[2:], m=m)
    torch.testing.assert_close(part, whole[:, 2:], rtol=1e-5, atol=1e-5)


def test_gradients_flow_to_inputs_and_variances():
    model, x = mlp(), X.clone().requires_grad_()
    trajectories(model, x, m=3).square().mean().backward()
    assert x.grad.shape == x.shape
    assert bool(model[0].log_variance.grad.any())


class Wrapped(nn.Module):
    """A model whose output is made of another's."""

    def __init__(self, model, made):
        super().__init__()
        self.model, self.made = model, made

    def forward(self, x):
        return self.made(self.model(x))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    extra: dict


class Many(nn.Module):
    """Arguments and outputs of many kinds."""

    def __init__(self):
        super().__init__()
        self.layer = DIPLinear(6, 3)

    def forward(self, pair, mask=None, scale=1.0, *, bias):
        x, more = pair
        y = self.layer(x + more["more"]) * scale + bias
        assert mask is None or mask.shape == (3,)
        return Output(y, UserDict({"list": [y + 1, None, "text"], "mask": y > 0}))


def test_any_arguments_and_any_outputs():
    more, bias = torch.randn(5, 6), torch.randn(5, 3)
    out = trajectories(
        Many(), (X, {"more": more}), torch.ones(3), 2.0, bias=bias, m=2, in_dims={1: None}
    )
    assert isinstance(out, Output)
    assert out.logits.shape == (2, 5, 3)
    torch.testing.assert_close(out.extra["list"][0], out.logits + 1)
    assert out.extra["list"][1:] == [None, "text"]
    assert torch.equal(out.extra["mask"], out.logits > 0)


@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None), ((0, {"more": 0}), None, 0), ((0, 0), None, 0), {1: None, "bias": 0}],
)
def test_in_dims_may_be_prefixes(in_dims):
    out = trajectories(
        Many(), (X, {"more": X}), torch.ones(3), 2.0, bias=torch.zeros(5, 1), m=2, in_dims=in_dims
    )
    assert out.logits.shape == (2, 5, 3)


def test_in_dims_none_passes_a_tensor_as_it_is():
    model, table = mlp(), torch.randn(1, 6)
    out = trajectories(lambda x, t: model(x + t), X, table, m=2, in_dims=(0, None))
    assert out.shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            (X, torch.ones(3)),
            {},
            r"^args\[1\]: expected a tensor whose first size is 5, as args\[0\], got shape \(3,\).*in_dims=None",
        ),
        ((X,), {"mask": {"a": torch.ones(1, 5)}}, r"^mask\['a'\]: .*got shape \(1, 5\)"),
        ((X, torch.tensor(1.0)), {}, r"^args\[1\]: .*got shape \(\)"),
        ((torch.tensor(1.0),), {}, r"^args\[0\]: .*the batch"),
        ((X, torch.zeros(2, 7).long()), {}, r"in_dims=None for .* edges do, .*torch.stack\(\["),
        ((X, torch.ones(9, 7)), {}, r"in_dims=None for .* patches: torch.stack\(\["),
        ((X,), {"in_dims": 1}, "^in_dims: expected 0 or None for args"),
        ((X,), {"in_dims": (0, 0)}, "^in_dims: expected one entry for each of 1"),
        ((X,), {"in_dims": {"mask": None}}, r"^in_dims: .*\['mask'\]"),
        (([X, X],), {"in_dims": ([0, 0, 0],)}, r"^in_dims: .*prefix of args\[0\]"),
        ((X,), {"in_dims": None}, "^args: expected a tensor"),
        ((1.0,), {}, "^args: expected a tensor"),
        ((types.SimpleNamespace(x=X),), {}, r"^args: .* an object holds .*torch.stack\(\["),
    ],
)
def test_bad_input_is_named(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        trajectories(lambda x, *a, **k: x, *args, **{"m": 2, **kwargs})


def test_a_loss_in_the_output_is_explained():
    model, loss = mlp(), r"output\['loss'\]: .*got a scalar.*dip.objective.*dip.kl_penalty"
    for run, message in (
        (lambda x: {"loss": model(x).mean()}, loss),
        (lambda x: model(x).t(), r"output: .*B \* m = 10, got shape \(3, 10\): .*leaves it out"),
        (lambda x: model(x).sum(0, True), r"output: .*shape \(1, 3\): .*pools rows .*torch.stack"),
    ):
        with pytest.raises(ValueError, match=message):
            trajectories(run, X, m=2)


def test_eval_mode_is_refused_unless_sampling():
    model = mlp().eval()
    with pytest.raises(RuntimeError, match=r"eval mode.*dip.predict"):
        trajectories(model, X, m=2)
    with sampling_on():
        out = trajectories(model, X, m=2)
    assert not torch.allclose(out[0], out[1])


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("m", [1, 3])
def test_empty_and_single_batches_work(rows, m):
    assert trajectories(mlp(), torch.randn(rows, 6), m=m).shape == (m, rows, 3)


def test_a_transformers_output_keeps_its_type():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, use_cache=False))
    model.lm_head = nn.Sequential(DIPInput(8), model.lm_head)
    ids = torch.randint(11, (3, 5))
    out = trajectories(model, input_ids=ids, attention_mask=torch.ones_like(ids), m=2)
    assert out.logits.shape == (2, 3, 5, 11)
    assert predict(model, input_ids=ids, k=2).shape == (3, 5, 11)
    with pytest.raises(ValueError, match="got a scalar"):
        trajectories(model, input_ids=ids, labels=ids, m=2)


class Sample(collections.OrderedDict):
    """As diffusers' outputs: registered without the names of its parts."""


pytree.register_pytree_node(
    Sample,
    lambda out: (list(out.values()), list(out)),
    lambda parts, names: Sample(zip(names, parts)),
)


def test_an_output_registered_without_the_names_of_its_parts_keeps_its_type():
    net = mlp()
    model = Wrapped(net, lambda y: Sample(sample=y))
    out = trajectories(model, X, m=2)
    assert type(out) is Sample and out["sample"].shape == (2, 5, 3)
    assert predict(model, X, k=2, average=None)["sample"].shape == (2, 5, 3)
    with pytest.raises(ValueError, match=r"^output\[1\]: .*got a scalar"):
        trajectories(Wrapped(net, lambda y: Sample(sample=y, loss=y.mean())), X, m=2)


# ---- predict -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "chunk"), [(7, 1), (7, 2), (7, 3), (7, 7), (7, 9), (2, 3), (1, 1), (1, 2)]
)
def test_predict_averages_its_own_passes(k, chunk):
    model = mlp()
    with fixed_noise(1):
        outs = predict(model, X, k=k, average=None, chunk=chunk)
        probs = predict(model, X, k=k, average="probs", chunk=chunk)
        logits = predict(model, X, k=k, average="logits", chunk=chunk)
    assert outs.shape == (k, 5, 3)
    assert not outs.requires_grad
    assert all(not torch.allclose(outs[i], outs[j]) for i in range(k) for j in range(i))
    torch.testing.assert_close(probs, outs.softmax(-1).mean(0))
    torch.testing.assert_close(logits, outs.mean(0))


def test_predict_takes_one_pass_after_another_by_default():
    model, seen = mlp(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    predict(model, X, k=3)
    assert seen == [len(X)] * 3
    with pytest.raises(
        ValueError, match=r"^args\[1\]: .*\(3,\); chunk=1 for it passes it as it is$"
    ):
        predict(model, X, torch.ones(3).long(), k=4, chunk=2)


def test_zero_passes_are_the_plain_network():
    model = mlp()
    first, _, second = model
    hidden = F.relu(F.linear(X, first.weight, first.bias))
    plain = F.linear(hidden, second.weight, second.bias)
    assert torch.equal(predict(model, X, k=0, average="logits"), plain)
    assert torch.equal(predict(model, X, k=0, average=None), plain[None])
    torch.testing.assert_close(predict(model, X, k=0), plain.softmax(-1))
    assert predict(nn.Linear(6, 3), X, k=0).shape == (5, 3)


def test_predict_restores_modes_and_leaves_dropout_and_batchnorm_alone():
    parts = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.99), nn.Linear(8, 3)
    model = convert(nn.Sequential(*parts), 1e-12)
    model[2].eval()
    modes = [m.training for m in model.modules()]
    out = predict(model, X, k=2, average="logits")
    assert [m.training for m in model.modules()] == modes
    assert model[1].num_batches_tracked == 0
    # a tiny variance: dropout of 99 % would show
    torch.testing.assert_close(out, model.eval()(X), rtol=1e-3, atol=1e-3)


def test_predict_replays_under_a_key_wherever_the_shard_is():
    model = mlp()
    with fixed_noise(1):
        whole, again = predict(model, X, k=5, chunk=2), predict(model, X, k=5, chunk=2)
    with fixed_noise(1, row0=2):
        part = predict(model, X[2:], k=5, chunk=2)
    assert torch.equal(whole, again)
    torch.testing.assert_close(part, whole[2:], rtol=1e-5, atol=1e-5)


def test_predict_reaches_layers_behind_the_encoders_fast_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = convert(layer, 0.25, exclude="self_attn")
    outs = predict(model, torch.randn(2, 5, 16), k=2, average=None)
    assert not torch.allclose(outs[0], outs[1])


@pytest.mark.parametrize("chunk", [1, 2])
def test_predict_keeps_passes_apart_of_a_model_that_returns_its_own_memory(chunk):
    memory = torch.empty(3 * chunk, 2)  # as a CUDA graph does
    model = Wrapped(DIPLinear(4, 2, init_variance=1.0), memory.copy_)
    x = torch.randn(3, 4)
    with dip.fixed_noise(1):
        got = predict(model, x, k=4, average=None, chunk=chunk)
        want = predict(model.model, x, k=4, average=None, chunk=chunk)
    assert torch.equal(got, want)


def test_predict_stacks_any_structure():
    model = Wrapped(DIPLinear(6, 3), lambda y: Output(y, {"n": 1, "all": [y]}))
    for k in (0, 3):
        out = predict(model, X, k=k, average=None)
        assert out.logits.shape == (max(k, 1), 5, 3)
        assert out.extra["n"] == 1
        assert out.extra["all"][0].shape == (max(k, 1), 5, 3)
    assert predict(model, X, k=2).shape == (5, 3)


@pytest.mark.parametrize("k", [0, 3])
def test_predict_refuses_to_stack_an_object_of_which_it_would_give_the_first(k):
    """A policy's distribution."""
    model = Wrapped(DIPLinear(6, 3), lambda y: torch.distributions.Normal(y, 1.0))
    with pytest.raises(TypeError, match=r"^model: expected tensors in the output.*got Normal"):
        predict(model, X, k=k, average=None)


@pytest.mark.parametrize("average", ["probs", "sigmoid", "logits"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_predict_averages_the_logits_of_an_object_of_any_class(average, chunk):
    inner = mlp()
    model = Wrapped(inner, lambda y: types.SimpleNamespace(logits=y))
    with fixed_noise(3):
        want, got = (predict(m, X, k=4, chunk=chunk, average=average) for m in (inner, model))
    assert torch.equal(got, want)


def test_predict_refuses_a_plain_model_and_an_output_without_logits():
    with pytest.raises(ValueError, match=r"^average: expected one of .*, got 'mean'"):
        predict(mlp(), X, average="mean")
    with pytest.raises(ValueError, match="expected DIP layers, found none"):
        predict(nn.Linear(6, 3), X)

    for made, got in (
        (lambda y: (y, y), "tuple"),
        # as torchvision's segmentation models do
        (lambda y: {"out": y}, r"dict of \['out'\]"),
    ):
        with pytest.raises(TypeError, match=f"expected a floating output.*got {got}"):
            predict(Wrapped(DIPLinear(6, 3), made), X)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda boxes: {"boxes": boxes},
            r"^output\['boxes'\]: expected one shape in every pass, .*\(1, 3\), \(2, 3\)",
        ),
        (list, r"^output: expected as many parts in every pass, .*got 1 and"),
    ],
)
def test_passes_that_differ_in_shape_are_named(made, message):
    """As a detector's, which finds another number of boxes in each."""
    number = itertools.count(1)
    with pytest.raises(ValueError, match=message):
        predict(Wrapped(mlp(), lambda y: made(y[: next(number)])), X, k=2, average=None)


def test_half_precision_is_averaged_in_float32():
    model = mlp().bfloat16()
    out = predict(model, X.bfloat16(), k=2)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out.sum(-1), torch.ones(5))


# ---- what outputs mean ---------------------------------------------------------------------------


def outputs(*shape):
    """A linear layer whose output has a chosen shape [B, *shape]."""
    return Wrapped(nn.Linear(4, math.prod(shape)), lambda y: y.view(-1, *shape))


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1,), {}, r"average: expected 'sigmoid' .*\(5, 1\), got 'probs'"),
        ((), {}, r"average: expected 'sigmoid' .*\(5,\), got 'probs'"),
        ((3, 1), {}, "average: expected 'sigmoid'"),
        (
            (3, 2, 2),
            {},
            r"dim: expected the dimension .*\(5, 3, 2, 2\), got None; .*average='logits'",
        ),
        ((1, 2, 2), {"dim": 1}, "average: expected 'sigmoid'"),
        ((3,), {"dim": 0}, "dim: expected a dimension .* behind the batch's, got 0"),
        ((3,), {"dim": -2}, "dim: expected a dimension"),
        ((3,), {"dim": 2}, "dim: expected a dimension"),
        ((3,), {"dim": True}, "dim: expected an integer"),
        ((3,), {"dim": 1, "average": "logits"}, "dim: expected None with average='logits'"),
    ],
)
def test_predict_refuses_a_softmax_that_says_nothing(shape, options, message, k):
    model, x = dip.convert(outputs(*shape)), torch.randn(5, 4)
    errors = (TypeError, ValueError)
    with pytest.raises(errors, match=message):
        dip.predict(model, x, k=k, **options)
    if "average" not in options:
        with pytest.raises(errors, match=message):
            dip.diagnostics.predictor(model, k, average="probs", **options)(x)
        with pytest.raises(errors, match=message):
            dip.diagnostics.output_variance(model, x, k=2, average="probs", **options)


def test_predict_averages_over_the_dimension_of_the_classes_or_takes_sigmoids():
    x = torch.randn(5, 4)
    cases = ((3, 2, 2), 1), ((3, 2, 2), -3), ((2, 3), None), ((2, 3), 1), ((2, 2, 3), -1)
    for shape, dim in cases:
        model = dip.convert(outputs(*shape))
        for chunk in (1, 2):
            probs = dip.predict(model, x, k=2, dim=dim, chunk=chunk)
            summed = probs.sum(-1 if dim is None else dim)
            assert probs.shape == (5, *shape)
            torch.testing.assert_close(summed, torch.ones_like(summed))
        one = dip.predict(model, x, k=0, dim=dim)
        torch.testing.assert_close(one, model.eval()(x).softmax(-1 if dim is None else dim))
        assert torch.equal(dip.diagnostics.predictor(model, 0, average="probs", dim=dim)(x), one)
    model = dip.convert(outputs(1))
    with dip.fixed_noise(3):
        outs = dip.predict(model, x, k=4, average=None)
        mean = dip.predict(model, x, k=4, average="sigmoid")
    torch.testing.assert_close(mean, outs.sigmoid().mean(0))
    assert dip.diagnostics.output_variance(model, x, k=3, average="sigmoid").shape == (5, 1)


def test_trajectories_of_a_model_without_noise_are_refused():
    plain, x = outputs(3), torch.randn(5, 4)
    with pytest.raises(ValueError, match="model: expected DIP layers, found none"):
        dip.trajectories(plain, x, m=2)
    # one pass of a plain model is what it says
    assert dip.trajectories(plain, x, m=1).shape == (1, 5, 3)
    assert dip.trajectories(lambda x: plain(x), x, m=2).shape == (2, 5, 3)


def test_tensors_inside_dataclasses_and_mappings_of_arguments_are_repeated():
    @dataclasses.dataclass(frozen=True)
    class Batch:
        x: torch.Tensor
        more: UserDict
        name: str = "batch"

    model = mlp()

    def run(batch, scale):
        assert isinstance(batch, Batch) and isinstance(batch.more, UserDict)
        return model(batch.x) * batch.more["mask"] * scale

    mask, scale = torch.rand(5, 1), torch.rand(5, 1)
    batch = Batch(X, UserDict(mask=mask))
    with fixed_noise(3):
        got = trajectories(run, batch, scale, m=2)
    with fixed_noise(3):
        want = trajectories(model, X, m=2) * mask * scale
    assert torch.equal(got, want)
    assert batch.x is X and batch.more["mask"] is mask
    with pytest.raises(ValueError, match=r"^args\[0\]\.more\['mask'\]: .*first size is 5"):
        trajectories(run, Batch(X, UserDict(mask=mask[:2])), scale, m=2)
    got = trajectories(lambda batch, x: batch.x[:1] + x, batch, X, m=2, in_dims=(None, 0))
    assert torch.equal(got[1], X[:1] + X)


def test_the_callers_own_mapping_is_left_as_it_was():
    """A shallow copy of such a class shares what it holds."""

    class Bag(MutableMapping):
        def __init__(self, **held):
            self.held = held

        def __getitem__(self, key):
            return self.held[key]

        def __setitem__(self, key, value):
            self.held[key] = value

        def __delitem__(self, key):
            del self.held[key]

        def __iter__(self):
            return iter(self.held)

        def __len__(self):
            return len(self.held)

    model, bag = mlp(), Bag(x=X)
    assert trajectories(lambda bag: model(bag["x"]), bag, m=2).shape == (2, 5, 3)
    assert bag["x"] is X


def test_arguments_without_tensors_are_passed_as_they_are():
    """A model may write into one, or read its attributes."""

    @dataclasses.dataclass
    class Config:
        sizes: list
        names: dict

    model, config = mlp(), Config([1, 2], {"a": 3})
    mapping = MappingProxyType({"a": [1]})
    seen = []

    def run(x, *more):
        seen.extend(more)
        return model(x)

    trajectories(run, X, config, mapping, m=2)
    assert seen[0] is config and seen[1] is mapping


@pytest.mark.parametrize("m", [1, 2])
def test_a_packed_sequence_is_refused_with_the_way_out(m):
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 6), torch.ones(2, 6)])
    with pytest.raises(TypeError, match=r"^args\[0\]: expected a dense tensor .*PackedSequence"):
        trajectories(lambda x: x, packed, m=m)
    model = mlp()
    assert trajectories(lambda x, p: model(x), X, packed, m=m, in_dims=(0, None)).shape == (m, 5, 3)


@pytest.mark.filterwarnings("ignore:.*nested.*:UserWarning")
def test_what_cannot_be_repeated_is_named():
    for x in (torch.nested.nested_tensor([X, X], layout=torch.jagged), X.to_sparse()):
        with pytest.raises(TypeError, match=r"^args\[0\]: expected a dense tensor .*pad it"):
            trajectories(lambda x: x, x, m=2)
