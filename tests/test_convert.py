"""convert and to_plain: what changes and what stays; summary, param_groups and calibrate."""

import copy
import functools
import math
import pickle
import statistics
import warnings
from collections import UserDict

import pytest
import torch
import torch.distributed.fsdp
from plain_support import assert_plain
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import dipkernels as dip
from dipkernels.models import spreads
from dipkernels.models.calibrate import calibrate
from dipkernels.models.convert import DIPConversionWarning, convert, to_plain
from dipkernels.models.parameters import load_variances, param_groups, variances
from dipkernels.models.probe import eval_mode
from dipkernels.models.summary import Summary, summary
from dipkernels.nn.conv import DIPConv2d
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import dip_layers
from dipkernels.noise.contexts import noise_off

pytestmark = pytest.mark.filterwarnings("error::dipkernels.DIPConversionWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(self.norm(self.conv(x)).flatten(1)))


X = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def names(model):
    return list(dip_layers(model))


# ---- convert -------------------------------------------------------------------------------------


def test_convert_keeps_identity_parameters_hooks_and_mode():
    model = Net()
    model.body.eval()
    before = dict(model.named_parameters())
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    head = model.head
    assert convert(model) is model
    assert model.head is head
    assert type(head) is DIPLinear
    assert type(model.conv) is DIPConv2d
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not model.body[0].variance.training
    assert model.head.variance.training
    model(X)
    assert calls == [1]


def test_convert_numbers_layers_and_sets_options():
    model = convert(Net(), 0.25, num_samples=3, keep="x")
    assert [layer.number for layer in dip_layers(model).values()] == [0, 1, 2, 3]
    assert all(layer.num_samples == 3 for layer in dip_layers(model).values())
    keeps = [getattr(layer, "keep", None) for layer in dip_layers(model).values()]
    assert keeps == [None, "x", "x", "x"]  # the first is a convolution
    assert summary(model)[0].sigma_mean == pytest.approx(0.5)


def test_a_root_linear_is_converted_in_place():
    model = nn.Linear(4, 4)
    assert convert(model) is model
    assert type(model) is DIPLinear
    assert type(to_plain(model)) is nn.Linear


def test_variances_land_on_the_weights_device_in_float32():
    with torch.device("meta"):
        model = convert(Net().to(torch.bfloat16))
    assert all(layer.log_variance.is_meta for layer in dip_layers(model).values())
    # they have values where nobody asked for none
    model = convert(Net().to("meta", torch.bfloat16))
    assert not any(layer.log_variance.is_meta for layer in dip_layers(model).values())
    assert all(layer.log_variance.dtype is torch.float32 for layer in dip_layers(model).values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"types": (nn.Linear,)}, ["body.0", "body.2", "head"]),
        ({"types": [nn.Conv2d]}, ["conv"]),
        ({"exclude": ("head", "conv")}, ["body.0", "body.2"]),
        ({"exclude": "body"}, ["conv", "head"]),  # what is inside goes with it
        ({"exclude": ("*.0",)}, ["conv", "body.2", "head"]),
        ({"filter": lambda module, name: name.startswith("body")}, ["body.0", "body.2"]),
        ({"filter": lambda module, name: getattr(module, "in_features", 0) == 16}, ["body.0"]),
    ],
)
def test_types_exclude_and_filter_choose(options, expected):
    assert names(convert(Net(), **options)) == expected


def test_shared_modules_are_converted_once_and_stay_shared():
    shared = nn.Linear(4, 4)
    model = convert(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert model["a"] is model["b"][0] is shared
    assert len(dip_layers(model)) == 1
    # excluded under either name
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="none that types, filter and exclude let through"):
        convert(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), exclude="b.*")


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"emb": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["emb"].weight
    convert(model)
    assert model["head"].weight is model["emb"].weight
    assert sum(len(g["params"]) for g in param_groups(model, 1e-3)) == 2


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.ReLU(), {}, "expected a nn.Linear or nn.Conv1d or .* to convert"),
        (Net(), {"filter": lambda module, name: False}, "let through"),
        (Net(), {"exclude": ("hed",)}, r"exclude: .*\['hed'\]"),
        (Net(), {"exclude": ("head", "x.*")}, r"exclude: .*\['x\.\*'\]"),
        (Net(), {"types": (nn.ConvTranspose1d,)}, "^types: "),
        (Net(), {"types": ()}, "^types: "),
        (Net(), {"init_variance": -1.0}, "^init_variance: "),
        (Net(), {"num_samples": 0}, "^num_samples: "),
        (Net(), {"keep": "y"}, "^keep: "),
    ],
)
def test_bad_requests_are_named_and_change_nothing(model, options, message):
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        convert(model, **options)
    assert [type(m) for m in model.modules()] == kinds


def test_converting_twice_says_so_and_a_second_pass_adds_the_rest():
    model = convert(Net(), 0.25, exclude="head")
    convert(model, 0.01)
    assert [row.sigma_mean for row in summary(model)] == pytest.approx([0.5, 0.5, 0.5, 0.1])
    with pytest.raises(ValueError, match=r"4 layer.s. are DIP layers already"):
        convert(model)


def test_converting_attention_twice_adds_the_rest():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    convert(model, 0.25, exclude=("*.out_proj", "linear1"))
    assert names(model) == ["self_attn.in_proj", "linear2"]
    convert(model, 0.01)
    sigma = {row.name.rpartition(".")[2]: row.sigma_mean for row in summary(model)}
    want = {"out_proj": 0.1, "in_proj": 0.5, "linear1": 0.1, "linear2": 0.5}
    assert sigma == pytest.approx(want)
    # a filter that leaves an attention out leaves its out_proj out too
    other = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    convert(other, filter=lambda module, _: type(module) is not nn.MultiheadAttention)
    assert names(other) == ["linear1", "linear2"]


def test_a_compiled_model_is_compiled_again_with_its_noise():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 4)
    plain = compiled(x)
    convert(compiled)
    assert not torch.equal(compiled(x), plain)
    assert torch.equal(compiled.eval()(x), plain)
    to_plain(compiled.train())
    assert torch.equal(compiled(x), plain)


def test_an_optimizer_made_before_trains_the_weights_and_takes_the_variances_as_a_group():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()  # with a state of its own by now
    convert(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def moved():
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}

    weights = {n for n in before if not n.endswith("log_variance")}
    assert moved() == weights  # the variances stay where they began
    optimizer.add_param_group(param_groups(model, lr=0.1)[-1])
    assert moved() == set(before)


def fsdp1(model):
    return torch.distributed.fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fsdp2(model):
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    return torch.distributed.fsdp.fully_shard(model, mesh=mesh)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [fsdp1, fsdp2, nn.parallel.DistributedDataParallel])
def test_a_wrapped_model_is_refused_for_its_variances_would_drift_apart(one_rank, wrap):
    model = nn.Sequential(wrap(nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match=r"^model: .*not yet wrapped.*at '0'"):
        convert(model)
    assert type(model[1]) is nn.Linear
    # the other way round works
    wrap(convert(nn.Sequential(nn.Linear(4, 4))))


def test_a_checkpoint_with_other_shapes_is_named():
    model, other = convert(nn.Sequential(nn.Linear(4, 4))), convert(nn.Sequential(nn.Linear(6, 4)))
    before, name = model[0].log_variance.detach().clone(), "0.variance.log_variance"
    state = {**model.state_dict(), name: torch.zeros(6)}
    with pytest.raises(RuntimeError, match=rf"{name}.*\[6\].*current model is.*\[4\]"):
        model.load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match=rf"^state: .*\(given, expected\).*{name}.*\(6,\), \(4,\)"):
        load_variances(model, variances(other))
    with pytest.raises(ValueError, match=rf"^state: .*none for \['{name}.*unknown \['1\.variance"):
        load_variances(model, {"1.variance.log_variance": torch.zeros(4)})
    assert torch.equal(model[0].log_variance, before)


@pytest.mark.parametrize(
    "call",
    [variances, lambda m: load_variances(m, {}), summary, lambda m: calibrate(m, [X])],
    ids=["variances", "load_variances", "summary", "calibrate"],
)
def test_what_needs_dip_layers_says_so(call):
    with pytest.raises(ValueError, match="expected DIP layers, found none"):
        call(Net())


def test_variances_come_back_as_they_were():
    model = convert(Net())
    variance, saved = model.head.variance, variances(model)
    own = ("log_variance", "log_prior", "pull")
    assert list(saved) == [n for n in model.state_dict() if n.endswith(own)]
    with torch.no_grad():
        variance.log_variance.add_(1)
        variance.log_prior.sub_(1)
        variance.pull.fill_(0.25)
    assert not torch.equal(variance.log_variance, saved["head.variance.log_variance"])
    load_variances(model.double(), saved)
    for name in own:
        assert torch.equal(getattr(variance, name).float(), saved[f"head.variance.{name}"])
    variance.log_prior.fill_(-9.0)
    # of an older release
    load_variances(model, {n: t for n, t in saved.items() if n.endswith("log_variance")})
    assert bool((variance.log_prior == -9.0).all())


# ---- what cannot be honoured ---------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OrthogonalLinear(nn.Linear):
    """A start of its own, and the forward of nn.Linear."""

    def __init__(self, width):
        super().__init__(width, width)

    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)


class SpatialConv(nn.Conv3d):
    """torchvision's Conv3DNoTemporal: fixed arguments, and the forward of nn.Conv3d."""

    def __init__(self, width):
        super().__init__(width, width, (1, 3, 3), padding=(0, 1, 1), bias=False)


class Standardised(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Drawn(nn.Linear):
    def draw(self):
        return self.weight


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer, self.lora_A = nn.Linear(4, 4), nn.ModuleDict({"default": nn.Linear(4, 2)})


def replaced_forward():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


def sparse():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    return layer


class MyAttention(nn.MultiheadAttention):
    pass


def quantised_weight():
    """As torchao does it: an nn.Linear whose weight is of another tensor class."""
    layer = nn.Linear(4, 4)
    int8 = type("Int8Tensor", (torch.Tensor,), {"__module__": "torchao.quantization"})
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(int8))
    return layer


def test_a_variance_of_another_size_leaves_attention_and_what_is_before_it_plain():
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match=r"^init_variance: expected .*\(8,\), got shape \(3,\)$"):
        dip.convert(model, {"1.in_proj": torch.ones(3), "*": 0.1})
    assert type(model[0]) is nn.Linear and type(model[1]) is nn.MultiheadAttention


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Scaled(4, 4), "a subclass of nn.Linear"),
        (lambda: Standardised(4, 4, 3), "a subclass of nn.Conv2d"),
        (lambda: Drawn(4, 4), r"it has \['draw'\] of its own"),
        (lambda: nn.LazyLinear(4), "lazy"),
        (lambda: nn.LazyConv2d(4, 1), "lazy"),
        (lambda: weight_norm(nn.Linear(4, 4)), "parametrised"),
        (lambda: torch.ao.nn.quantized.dynamic.Linear(4, 4), "quantised"),
        (lambda: torch.jit.trace(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4)), "scripted"),
        (replaced_forward, "its forward was replaced"),
        (sparse, "sparse"),
        (Lora, "a LoRA layer"),
        (quantised_weight, "quantised: its weight is a Int8Tensor"),
        (
            lambda: MyAttention(4, 2),
            "a subclass of nn.MultiheadAttention, .*: put a DIPInput before each input",
        ),
        (
            lambda: weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight"),
            "parametrise after converting(?!, or give its name)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*:UserWarning")
def test_what_cannot_be_honoured_is_named_and_left_alone(make, reason):
    odd = make()
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "odd": odd})
    kind = type(odd)
    said = rf"(?s)1 module.*odd \({kind.__name__}\): .*{reason}"
    with pytest.warns(DIPConversionWarning, match=said):
        convert(model)
    assert names(model) == ["good"]
    assert type(odd) is kind
    # excluded, it is not reported
    convert(nn.ModuleDict({"good": nn.Linear(4, 4), "odd": odd}), exclude="odd")
    with pytest.raises(ValueError, match=reason):
        convert(nn.ModuleDict({"odd": odd}))


@pytest.mark.parametrize(
    ("make", "like", "x"),
    [
        (OrthogonalLinear, nn.Linear(4, 4), torch.randn(6, 4)),
        (SpatialConv, nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1), bias=False), X[None, :4]),
    ],
)
def test_a_subclass_that_keeps_the_forward_is_converted_as_its_class(make, like, x):
    model = nn.Sequential(make(4))
    plain = nn.Sequential(like)
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        convert(each, 0.25, keep="u")
    assert isinstance(model[0], make) and isinstance(model[0], type(plain[0]))
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with dip.fixed_noise(3):
            y = again(x)
        with dip.fixed_noise(3):
            assert torch.equal(y, plain(x))
        assert torch.equal(again.eval()(x), plain.eval()(x))
        plain.train()
    model.train()[0].reset_parameters()
    assert torch.allclose(model[0].log_variance.exp(), torch.tensor(0.25))
    assert type(to_plain(model)[0]) is make


def test_layers_that_differ_in_their_numbers_alone_are_named_in_one_line():
    blocks = [nn.ModuleDict({"odd": Scaled(4, 4), "good": nn.Linear(4, 4)}) for _ in range(3)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "last": Scaled(4, 4)})
    with pytest.warns(DIPConversionWarning) as caught:
        convert(model)
    head, *lines = str(caught[0].message).splitlines()
    assert "4 module(s)" in head
    assert [line.partition(":")[0].strip() for line in lines] == [
        "blocks.*.odd (Scaled, 3 of them)",
        "last (Scaled)",
    ]
    # a pattern that would match another module is not shown
    model["blocks"][0]["odd"].inner = nn.ModuleDict({"odd": nn.Linear(4, 4)})
    with pytest.warns(DIPConversionWarning, match=r"blocks\.0\.odd, blocks\.1\.odd, blocks\.2"):
        convert(model)


def test_a_parametrised_out_projection_is_named_and_its_attention_converted():
    attention = nn.MultiheadAttention(4, 2)
    weight_norm(attention.out_proj)
    with pytest.warns(DIPConversionWarning, match=r"out_proj .*: parametrised: .* converting$"):
        convert(attention)
    assert names(attention) == ["in_proj"]
    x = torch.randn(3, 2, 4)
    attention(x, x, x)[0].sum().backward()
    assert all(p.grad is not None for p in attention.parameters())


def test_a_warning_that_is_made_an_error_leaves_the_model_as_it_was():
    """As it is here, and under python -W error."""
    model, like = (nn.ModuleDict({"good": nn.Linear(4, 4), "odd": Scaled(4, 4)}) for _ in range(2))
    with pytest.raises(DIPConversionWarning, match=r"odd \(Scaled\): a subclass of nn.Linear"):
        convert(model)
    assert_plain(model, like)
    assert names(convert(model, exclude="odd")) == ["good"]


def test_attention_that_types_leave_out_is_named_once_for_the_whole_model():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with pytest.warns(DIPConversionWarning) as caught:
        convert(model, types=(nn.Linear,))
    (warning,) = caught
    left = "layers.*.self_attn.out_proj (NonDynamicallyQuantizableLinear, 2 of them)"
    assert "2 module(s)" in str(warning.message) and left in str(warning.message)
    assert names(model) == [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]


def test_an_encoders_eval_fast_path_is_the_plain_network():
    plain = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = convert(copy.deepcopy(plain), exclude="self_attn")
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    # and calibrate, without gradients too, still sees its layers
    assert [row.name for row in calibrate(model, [x])] == ["linear1", "linear2"]


# ---- to_plain ------------------------------------------------------------------------------------


def test_to_plain_gives_the_original_back():
    plain = Net()
    model = copy.deepcopy(plain)
    parameters = dict(model.named_parameters())
    assert to_plain(convert(model)) is model
    assert_plain(model, plain)
    assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
    assert repr(model) == repr(plain)
    assert torch.equal(model.eval()(X), plain.eval()(X))


def test_to_plain_removes_every_occurrence_of_an_input_projection():
    shared = DIPInput(4)
    model = nn.Sequential(shared, DIPLinear(4, 4), nn.Sequential(shared, shared))
    to_plain(model)
    assert [type(m) for m in (*model[:2], *model[2])] == [
        nn.Identity,
        nn.Linear,
        *2 * [nn.Identity],
    ]
    assert isinstance(to_plain(DIPInput(4)), nn.Identity)


def test_to_plain_refuses_what_it_cannot_turn_back():
    with pytest.raises(ValueError, match="expected a DIP layer"):
        to_plain(Net())

    class Mine(DIPLinear):
        pass

    with pytest.raises(ValueError, match=r"subclasses of them: \['0'\]"):
        to_plain(nn.Sequential(Mine(4, 4), DIPLinear(4, 4)))
    normed = nn.Sequential(weight_norm(DIPLinear(4, 4)))
    with pytest.raises(ValueError, match=r"\['0'\].*remove_parametrizations first"):
        to_plain(normed)
    nn.utils.parametrize.remove_parametrizations(normed[0], "weight")
    assert type(to_plain(normed)[0]) is nn.Linear


# ---- param_groups --------------------------------------------------------------------------------


def test_param_groups_hold_every_trainable_parameter_once():
    model = convert(Net())
    model.conv.weight.requires_grad_(False)
    model.body[0].log_variance.requires_grad_(False)
    groups = param_groups(model, lr=1e-3, weight_decay=0.05)
    by_name = {g["name"]: g for g in groups}
    assert [g["name"] for g in groups] == ["weights", "biases", "variances"]
    assert [g["lr"] for g in groups] == [1e-3, 1e-3, 1e-2]
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0, 0.0]
    assert {p.ndim for p in by_name["biases"]["params"]} == {1}
    assert [id(p) for p in by_name["variances"]["params"]] == [
        id(layer.log_variance) for layer in (model.conv, model.body[2], model.head)
    ]
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(groups).step()


def test_param_groups_of_a_plain_model_and_a_chosen_variance_lr():
    assert [g["name"] for g in param_groups(Net(), 0.1)] == ["weights", "biases"]
    assert param_groups(convert(Net()), 0.1, variance_lr=0.5)[-1]["lr"] == 0.5


@pytest.mark.parametrize("bad", [200.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["log_variance", "log_prior"])
def test_a_variance_that_float32_cannot_hold_is_refused_where_it_enters(bad, part):
    """exp(200) is infinite: predict, check and summary would refuse the model later."""
    model = convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    before, state = variances(model), variances(model)
    state[f"1.variance.{part}"][2] = bad
    said = rf"got NaN or infinity in \['1.variance.{part}'\].* load_variances or calibrate sets"
    with pytest.raises(ValueError, match=f"^state: expected finite variances, {said}"):
        load_variances(model, state)
    with pytest.raises(ValueError, match=r"finite variances, got NaN or infinity in \['log_var"):
        model[1].variance.set_log_variance(torch.full((4,), bad))
    # what a schedule adds to every entry of `variances`
    lower = {name: values - 3.0 for name, values in before.items()}
    with pytest.raises(ValueError, match=r"^state: expected pulls >= 0, .* in \['0.variance.pull'"):
        load_variances(model, lower)
    after = variances(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_weights_decay_as_by_the_optimisers_default_where_nothing_is_given(kind):
    own = kind(Net().parameters(), lr=0.1).param_groups[0]["weight_decay"]
    for model in (Net(), convert(Net())):
        weights, *others = kind(param_groups(model, lr=0.1)).param_groups
        assert weights["weight_decay"] == own
        assert {group["weight_decay"] for group in others} == {0.0}
    given = kind(param_groups(Net(), lr=0.1, weight_decay=0.0)).param_groups
    assert {group["weight_decay"] for group in given} == {0.0}


@pytest.mark.parametrize(
    ("model", "options", "name"),
    [
        (Net(), {"lr": -1}, "lr"),
        (Net(), {"lr": None}, "lr"),
        (Net(), {"lr": 1, "weight_decay": "0.1"}, "weight_decay"),
        (Net(), {"lr": 1, "weight_decay": float("nan")}, "weight_decay"),
        (Net(), {"lr": 1, "variance_lr": 1}, "variance_lr"),
        (nn.ReLU(), {"lr": 1}, "model"),
    ],
)
def test_param_groups_names_bad_input(model, options, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        param_groups(model, **options)


# ---- calibrate and summary -----------------------------------------------------------------------


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
        ([torch.randn(5, 4)], {"per": "model"}, "^per: expected 'layer' or 'feature', got 'model'"),
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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(model, [x + shift])
    texts = [str(w.message) for w in caught if "a thousandth of their size" in str(w.message)]
    assert [f"inputs of [{named}] vary" in text for text in texts] == [True] * (named is not None)


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


def test_eval_mode_restores_after_an_error():
    model = Net()
    model.body.eval()
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert not model.training
        raise ZeroDivisionError
    assert model.training
    assert not model.body.training


@pytest.mark.parametrize("name", ["activation", "share", "keep", "num_samples", "noisy", "draw"])
def test_a_layer_with_a_dip_layers_names_of_its_own_stays_plain(name):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    value = "relu" if name == "activation" else 2
    setattr(model[0], name, value)
    want = model(x)
    with pytest.warns(dip.DIPConversionWarning, match=rf"0 \(Linear\): it has \['{name}'\] of its"):
        dip.convert(model)
    assert torch.equal(model.eval()(x), want)
    assert [row.name for row in dip.summary(model)] == ["1"]
    assert getattr(dip.to_plain(model)[0], name) == value
