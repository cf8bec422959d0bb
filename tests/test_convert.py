"""convert and to_plain: what changes and what stays; summary and param_groups."""

import copy
import pickle

import pytest
import torch
import torch.distributed.fsdp
from plain_support import assert_plain
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from warning_support import no_warning

import dipkernels as dip
from dipkernels.models.calibrate import calibrate
from dipkernels.models.convert import DIPConversionWarning, convert, to_plain
from dipkernels.models.parameters import load_variances, param_groups, variances
from dipkernels.models.summary import summary
from dipkernels.nn.conv import DIPConv2d
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import dip_layers

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


class Asked(nn.Linear):
    @property
    def estimator(self):
        raise RuntimeError("not before fit")


class Drawn(nn.Linear):
    def draw(self):
        return self.weight


def of(**parts):
    """A module of these layers, by their sizes, and other parts."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, nn.Linear(*part) if isinstance(part, tuple) else part)
    return module


def in_eight_bits():
    weight = nn.Module()
    weight.register_buffer("w8", torch.ones(4, 4, dtype=torch.int8))
    return weight


ADAPTER = {"lora_A": (4, 2), "lora_B": (2, 4)}
LORA = {  # layer and adapter in one, as others than PEFT write it
    "a layer": lambda: of(base_layer=(4, 4), lora_A=nn.ModuleDict({"default": nn.Linear(4, 2)})),
    "litgpt": lambda: of(linear=(4, 4), lora_A=nn.Parameter(torch.zeros(2, 4))),
    "cloneofsimo": lambda: of(linear=(4, 4), lora_down=(4, 2), lora_up=(2, 4)),
    "torchtune": lambda: of(
        weight=nn.Parameter(torch.zeros(4, 4)), lora_a=nn.Linear(4, 2), lora_b=nn.Linear(2, 4)
    ),
    "quantised by hand": lambda: of(linear=in_eight_bits(), lora_A=nn.Parameter(torch.zeros(2, 4))),
    "parametrised": lambda: of(
        linear=weight_norm(nn.Linear(4, 4)), lora_A=nn.Parameter(torch.zeros(2, 4))
    ),
}


@pytest.mark.parametrize("parts", [{"q": (4, 4), "out": (4, 4), **ADAPTER}, ADAPTER])
def test_layers_of_a_block_that_has_an_adapter_inside_are_converted(parts):
    model, plain = nn.Sequential(of(**parts)), [*parts]
    with no_warning():
        convert(model)
    assert names(model) == [f"0.{name}" for name in plain]


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
        (lambda: Asked(4, 4), r"it has \['estimator'\] of its own"),
        (lambda: nn.LazyLinear(4), "lazy"),
        (lambda: nn.LazyConv2d(4, 1), "lazy"),
        (lambda: weight_norm(nn.Linear(4, 4)), "parametrised"),
        (lambda: torch.ao.nn.quantized.dynamic.Linear(4, 4), "quantised"),
        (lambda: torch.jit.trace(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4)), "scripted"),
        (replaced_forward, "its forward was replaced"),
        (sparse, "sparse"),
        *((make, "a LoRA layer") for make in LORA.values()),
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
    model.tied = nn.Linear(8, 3)
    model.tied.weight = model.head.weight
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
        (Net(), {"lr": None}, "lr"),
        (Net(), {"lr": 1, "variance_lr": 1}, "variance_lr"),
        (nn.ReLU(), {"lr": 1}, "model"),
    ],
)
def test_param_groups_names_bad_input(model, options, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        param_groups(model, **options)


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


def test_param_groups_know_variances_that_are_kept_outside_of_their_layers():
    """torchrl's losses keep those of two critics stacked, which no decay may reach."""
    model, kept = convert(nn.Sequential(nn.Linear(4, 2))), nn.Module()
    for name, parameter in model.named_parameters():
        *path, last = name.split(".")
        owner = kept
        for part in path:
            owner = owner._modules.setdefault(part, nn.Module())
        setattr(owner, last, nn.Parameter(torch.stack([parameter.detach()] * 2)))
    group = param_groups(kept, lr=0.1, variance_lr=0.5)[-1]
    assert (group["name"], group["lr"], group["weight_decay"]) == ("variances", 0.5, 0.0)
    (parameter,) = group["params"]
    assert parameter is kept.get_parameter("0.variance.log_variance") and parameter.ndim == 2
