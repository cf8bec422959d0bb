"""What other people's loops, loads and wrappers do to a variance: nothing that they do not name.
docs/models.md."""

import contextlib
import copy
import gc
import inspect
import math
import pickle
import sys
import threading
import warnings
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from graph_support import GPU_MODE, on_gpu
from torch import nn
from torch.nn.utils import parametrize, prune
from variance_support import Branches, freeze, noise, spoil, trained, variances
from warning_support import no_warning

import dipkernels as dip
from dipkernels.nn import decay, sharing
from dipkernels.nn.conv import DIPConv1d, DIPConv2d, DIPConv3d
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import dip_layers, number_layers
from dipkernels.nn.variance import Variance


def plain_net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def make(init_variance=0.01):
    return dip.convert(plain_net(), init_variance)


def plain_state():
    return plain_net().state_dict()


def values(model):
    return torch.cat([variance.log_variance.detach() for variance in variances(model)])


# ---- loops over modules --------------------------------------------------------------------------


def initialise(m):
    if hasattr(m, "weight") and m.weight.dim() > 1:
        nn.init.xavier_uniform_(m.weight.data)


def clamp(m):
    if hasattr(m, "weight"):
        m.weight.data.clamp_(-0.01, 0.01)


def zero_by_type(m):
    if isinstance(m, (nn.Linear, nn.Conv2d)):
        nn.init.zeros_(m.weight)
        nn.init.zeros_(m.bias)


def halve(m):
    for name in ("weight", "bias"):
        if getattr(m, name, None) is not None:
            getattr(m, name).data.mul_(0.5)


def cast(m):
    if hasattr(m, "weight"):
        m.half()


@pytest.mark.parametrize("loop", [initialise, clamp, zero_by_type, halve, cast])
def test_loops_over_modules_leave_variances_alone(loop):
    model = make(0.04)
    model.apply(loop)
    for module in model.modules():
        loop(module)
    found = values(model)
    assert found.dtype is torch.float32 and torch.equal(found, torch.full((14,), math.log(0.04)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_past_the_module_is_undone_and_said(dtype):
    model, x = make(), torch.randn(3, 6)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    with pytest.warns(UserWarning, match="a log_variance was cast to"):
        y = model(x.to(dtype))
    assert values(model).dtype is torch.float32
    y.sum().backward()
    assert all(v.log_variance.grad.dtype is torch.float32 for v in variances(model))
    with no_warning():
        model(x.to(dtype)), model.double()(x.double())


def test_a_float64_log_variance_of_a_functional_call_is_not_rounded():
    layer, x = DIPLinear(6, 3).double(), torch.randn(4, 6).double()
    given = layer.log_variance.detach() + 1e-12 * torch.arange(6)
    with dip.fixed_noise(1):
        found = torch.func.functional_call(layer, {"variance.log_variance": given}, x)
        layer.log_variance.data = given
        assert torch.equal(found, layer(x))


def test_no_module_shows_what_is_no_weight_as_a_weight():
    attention = dip.DIPMultiheadAttention(8, 2)
    model = nn.ModuleList([make(), DIPConv2d(3, 4, 1), DIPInput(5), attention])
    plain = {id(p) for name, p in model.named_parameters() if not name.endswith("log_variance")}
    for module in model.modules():
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None:
                assert id(getattr(module, name)) in plain


def test_global_pruning_leaves_variances_alone():
    model = trained(make())
    parts = [(m, "weight") for m in model.modules() if hasattr(m, "weight")]
    assert len(parts) == 2
    prune.global_unstructured(parts, pruning_method=prune.L1Unstructured, amount=0.5)
    assert (values(model) == -1).all() and (model[0].weight == 0).any()


def test_a_call_of_a_variance_gives_the_parameter_itself():
    variance = Variance(3)
    assert variance() is variance.log_variance


def test_frozen_variances_stay_frozen():
    model = make()
    freeze(model)
    model.load_state_dict(make().state_dict())
    model.load_state_dict(plain_state())
    model.load_state_dict(plain_state(), assign=True)
    model.to(torch.float64).half().float()
    copied = copy.deepcopy(model)
    dip.number_layers(copied)
    dip.calibrate(copied, [torch.randn(8, 6)])
    dip.load_variances(copied, dip.variances(copied))
    for each in (model, copied):
        assert not any(v.log_variance.requires_grad for v in variances(each))
        with dip.noise_off():
            each(torch.randn(3, 6)).sum().backward()
        each(torch.randn(3, 6)).sum().backward()
        assert all(v.log_variance.grad is None for v in variances(each))
        assert [g["name"] for g in dip.param_groups(each, 1e-3)] == ["weights", "biases"]


# ---- loads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_a_load_leaves_what_it_does_not_name(assign):
    model = trained(make())
    result = model.load_state_dict(plain_state(), strict=True, assign=assign)
    assert (values(model) == -1).all() and not result.missing_keys
    head = {"2.weight": torch.zeros(4, 8), "2.variance.log_variance": torch.full((8,), 0.5)}
    before = model[0].log_variance
    model.load_state_dict(head, strict=False, assign=assign)
    assert (model[0].log_variance == -1).all() and (model[2].log_variance == 0.5).all()
    assert model[0].log_variance is before


def test_an_entry_that_a_later_release_adds_is_left_as_it_is_too():
    class Wider(Variance):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("later", self._initial("later"))

    def on(device):
        with torch.device(device):
            return nn.ModuleDict({"variance": Wider(3, 0.25)})

    old = {"variance.log_variance": torch.full((3,), -2.0)}
    model, filled = on("cpu"), on("meta")
    assert not model.load_state_dict(old, strict=True).missing_keys
    filled.load_state_dict({**old, "weight": torch.ones(1)}, strict=False, assign=True)
    for variance in (model["variance"], filled["variance"]):
        assert (variance.later == math.log(0.25)).all() and (variance.log_variance == -2).all()
    assert (on("meta").to_empty(device="cpu")["variance"].later == math.log(0.25)).all()


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.MultiheadAttention(8, 2), nn.Conv1d(8, 3, 1))


INSIDE = pytest.mark.parametrize(
    "inside", [True, False], ids=["convert-on-meta", "convert-afterwards"]
)


def on_meta(inside):
    with torch.device("meta"):
        model = net()
        if inside:
            dip.convert(model, 0.3)
    return model if inside else dip.convert(model, 0.3)


@INSIDE
def test_a_meta_model_gets_its_variances_whichever_way_it_is_filled(inside):
    plain, expected = net(), torch.full((6 + 8 + 8 + 8,), math.log(0.3))
    assigned = on_meta(inside)
    assigned.load_state_dict(plain.state_dict(), assign=True)
    spoil(6, 8)
    emptied = on_meta(inside).to_empty(device="cpu")
    spoil(6, 8)
    emptied.load_state_dict(plain.state_dict())
    for model in (assigned, emptied):
        assert torch.equal(values(model), expected)
        assert [layer.number for layer in dip_layers(model).values()] == [0, 1, 2, 3]
        for layer in dip_layers(model).values():
            assert layer._stream.tolist() == [0, layer.number]


@INSIDE
def test_variances_that_an_assigned_checkpoint_lacks_go_where_its_weights_are(inside):
    """So a plain checkpoint that was read to a GPU gives a model that is there as a whole."""
    state, model = {name: on_gpu(t) for name, t in net().state_dict().items()}, on_meta(inside)
    with GPU_MODE, torch.no_grad():
        model.load_state_dict(state, assign=True)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}


def test_a_layer_without_weights_of_its_own_starts_beside_an_assigned_checkpoint():
    with torch.device("meta"):
        model = nn.Sequential(dip.DIPInput(6, init_variance=0.3), nn.Linear(6, 2))
    plain = nn.Sequential(nn.Identity(), nn.Linear(6, 2))
    model.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(values(model), torch.full((6,), math.log(0.3)))


@pytest.mark.parametrize("read", [dip.variances, dip.summary, dip.metrics])
def test_a_model_without_values_says_so(read):
    with torch.device("meta"):
        model = make()
    with pytest.raises(ValueError, match=r"^log_variance: expected values.*on the meta device"):
        read(model)


def test_only_what_has_no_data_is_made_by_a_move():
    with torch.device("meta"):
        model = make()
    with pytest.raises(NotImplementedError):
        model.to("cpu")  # the weights
    model = make(0.5)
    for layer in (model[0], model[2]):
        layer.variance.to("meta")
    model.to("cpu")
    assert torch.equal(values(model), torch.full((14,), math.log(0.5)))
    for layer in (model[0], model[2]):
        layer.variance.to("meta")
    assert values(model.half().to("cpu")).dtype is torch.float32


CLASSES = [(DIPLinear, (4, 3)), (dip.DIPMultiheadAttention, (4, 2))]
CLASSES += [(kind, (4, 3, 1)) for kind in (DIPConv1d, DIPConv2d, DIPConv3d)]
OF_SIZE = (DIPInput, Variance, dip.DIPLayerNorm, dip.DIPRMSNorm, dip.DIPGatedActivation)
CLASSES += [(kind, (4,)) for kind in OF_SIZE]


@pytest.mark.parametrize(("kind", "args"), CLASSES, ids=[kind.__name__ for kind, _ in CLASSES])
def test_skip_init_takes_every_class(kind, args):
    spoil(4, 8)
    layer = nn.utils.skip_init(kind, *args, init_variance=0.3)
    assert torch.equal(values(layer), torch.full_like(values(layer), math.log(0.3)))
    assert not any(p.is_meta for p in layer.parameters())


PLAIN = (DIPLinear, DIPConv1d, DIPConv2d, DIPConv3d, dip.DIPMultiheadAttention)
PLAIN += (dip.DIPLayerNorm, dip.DIPRMSNorm, dip.DIPGatedActivation)


@pytest.mark.parametrize("kind", PLAIN)
def test_layers_take_the_plain_ones_arguments(kind):
    plain = list(inspect.signature(kind.plain_type).parameters.values())
    own = list(inspect.signature(kind).parameters.values())
    assert [(p.name, p.default) for p in own[: len(plain)]] == [(p.name, p.default) for p in plain]


@pytest.mark.parametrize("kind", ["linear", "conv", "attention", "norm"])
def test_parameters_that_are_taken_out_of_their_modules_may_be_moved_and_sampled(kind):
    """As SWAG does: it keeps their means as buffers, moves the model, then sets plain tensors."""
    torch.manual_seed(0)
    layer, inputs = {
        "linear": lambda: (DIPLinear(4, 3), (torch.randn(5, 4),)),
        "conv": lambda: (DIPConv2d(3, 4, 1), (torch.randn(2, 3, 5, 5),)),
        "attention": lambda: (dip.DIPMultiheadAttention(4, 2), (torch.randn(3, 2, 4),) * 3),
        "norm": lambda: (dip.DIPLayerNorm(4), (torch.randn(5, 4),)),
    }[kind]()

    def run():
        with dip.fixed_noise(3):
            y = layer(*inputs)
        return y[0] if isinstance(y, tuple) else y

    expected, taken = run(), []
    for module in layer.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            del module._parameters[name]
            module.register_buffer(f"{name}_mean", value.detach().clone())
            taken.append((module, name))
    layer.to("cpu")
    for module, name in taken:
        setattr(module, name, getattr(module, f"{name}_mean").requires_grad_())
    got = run()
    assert torch.equal(got, expected)
    got.square().sum().backward()
    assert all(getattr(module, name).grad is not None for module, name in taken)


# ---- streams -------------------------------------------------------------------------------------


def test_no_buffer_holds_a_stream_and_averages_keep_them():
    model = make()
    assert {name.rpartition(".")[2] for name, _ in model.named_buffers()} == {"log_prior", "pull"}
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for step in range(3):
        trained(model, -float(step))
        average.update_parameters(model)
    assert [layer._stream.tolist() for layer in dip_layers(average).values()] == [[0, 0], [0, 1]]
    x = torch.randn(2, 6)
    same = copy.deepcopy(model)
    same.load_state_dict(average.module.state_dict())
    assert torch.equal(noise(average, x), noise(same, x))


def test_what_is_done_to_buffers_from_outside_changes_no_noise():
    model, x = make(), torch.randn(2, 6)
    expected = noise(model, x)
    for buffer in model.buffers():
        buffer.fill_(99)
    assert torch.equal(noise(model, x), expected)
    assert torch.equal(noise(copy.deepcopy(model), x), expected)
    assert torch.equal(noise(pickle.loads(pickle.dumps(model)), x), expected)
    model[0].number = 7
    assert model[0]._stream.tolist() == [0, 7]
    assert not torch.equal(noise(model, x), expected)
    number_layers(model)
    assert torch.equal(noise(model, x), expected)


def test_models_joined_after_conversion_say_that_they_share_streams():
    dip.noise.contexts._named.clear()
    a, b, x = make(), make(), torch.randn(2, 6)
    joined = nn.ModuleList([a, b])
    deep = nn.Sequential(DIPLinear(6, 6))
    deep.append(copy.deepcopy(deep[0]))
    for call, said in (
        (lambda: (a(x), b(x)), "number_layers"),
        (lambda: dip.check_ranks(joined), r"'0.0' and '1.0' have one number \(0\)"),
        (lambda: dip.trajectories(deep, x, m=2), "have one number"),
        (lambda: dip.predict(deep, x, k=2), "have one number"),
    ):
        with pytest.warns(UserWarning, match=said), dip.fixed_noise(1):
            call()
    with no_warning(), dip.fixed_noise(2):  # of these two it was said
        a(x), b(x)
    number_layers(joined), number_layers(deep)
    one, other = make(), make()
    with no_warning():
        with dip.fixed_noise(1):
            a(x), b(x), dip.check_ranks(joined)
        with dip.fixed_noise(1):
            dip.predict(deep, x, k=2)
        # each its own context, or one model and its copy: nothing to say
        noise(one, x), noise(other, x)
        with dip.fixed_noise(1):
            one(x), copy.deepcopy(one)(x)


def test_a_block_that_is_compiled_by_itself_compiles_once_for_all_layers():
    blocks = dip.convert(nn.Sequential(*[nn.Sequential(nn.Linear(6, 6)) for _ in range(10)]))
    x = torch.randn(2, 6, requires_grad=True)
    expected = noise(blocks, x)
    torch._dynamo.reset()
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), dip.fixed_noise(3):
        torch.testing.assert_close(blocks(x), expected)


# ---- replicas: nn.DataParallel -------------------------------------------------------------------


def replicas(model, count=2):
    """What nn.DataParallel's replicate makes, with copies on the CPU in place of its broadcast."""

    def copies(tensors, devices, detach=False):
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    module = sys.modules["torch.nn.parallel.replicate"]
    with (
        mock.patch.object(module, "_broadcast_coalesced_reshape", copies),
        mock.patch.object(module, "_get_device_index", lambda device, *_: device),
    ):
        return module.replicate(model, list(range(count)))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.conv = nn.Conv1d(6, 6, 1)

    def forward(self, x):
        u = self.attention(self.q(x), self.k(x), x)[0]
        return self.conv(u.transpose(1, 2))


@pytest.mark.parametrize("share", [(), [("q", "k")]])
@pytest.mark.parametrize("mode", ["train", "eval", "noise_off"])
def test_replicas_run_and_every_variance_gets_its_gradient(share, mode):
    model = dip.convert(Attending(), share=share)
    x = torch.randn(2, 3, 6)
    model.train(mode != "eval")
    with dip.noise_off() if mode == "noise_off" else dip.fixed_noise(3):
        y = [replica(x) for replica in replicas(model)]
        assert torch.equal(y[0], model(x)) and torch.equal(y[0], y[1])
    if mode == "train":
        (y[0] + y[1]).square().sum().backward()
        assert all(variance.log_variance.grad.any() for variance in variances(model))


@pytest.mark.parametrize("estimator", ["sample", "mean", "analytic"])
def test_replicas_of_every_estimator_run(estimator):
    samples = 2 if estimator == "mean" else 1
    model = DIPLinear(6, 3, activation="gelu", estimator=estimator, num_samples=samples)
    model.variance.requires_grad_(False)
    x = torch.randn(4, 6)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, dip.fixed_noise(1):
            for replica in replicas(model):
                assert torch.equal(replica(x), model(x))


def sharing_pair(kind=Attending):
    return dip.convert(kind(), share=[("q", "k")], exclude=["attention", "conv"])


@pytest.fixture
def drawn(monkeypatch):
    """The layers that draw, one after another."""
    layers, fresh = [], sharing.fresh
    monkeypatch.setattr(
        sharing, "fresh", lambda layer, x, *rest: layers.append(layer) or fresh(layer, x, *rest)
    )
    return layers


def test_layers_of_replicas_that_share_draw_once_for_each_replica(drawn):
    model = sharing_pair()
    a, b = replicas(model)
    x = torch.randn(2, 3, 6)
    a(x), b(x.clone())
    assert drawn == [a.q, b.q]


# ---- sharing -------------------------------------------------------------------------------------


def test_a_layer_that_is_skipped_keeps_neither_input_nor_noise_alive():
    model = sharing_pair()
    x = torch.randn(2, 3, 6)
    y = model.q(x)  # k is never called on it
    (entry,) = model.q.share._entries.values()
    u, seen = weakref.ref(entry[4]), weakref.ref(x)
    del entry, x, y
    assert seen() is None and u() is None and not model.q.share._entries
    with torch.no_grad():  # nothing but the entry holds u between the calls
        x = torch.randn(2, 3, 6)
        q, k = nn.functional.linear, []
        with mock.patch.object(F, "linear", lambda u, *rest: k.append(u) or q(u, *rest)):
            model.q(x), model.k(x)
        assert k[0] is k[1]


def test_a_layer_that_is_skipped_takes_no_noise_of_the_step_before():
    model = sharing_pair()
    x = torch.randn(2, 3, 6)  # one object in both steps, as where the whole data are one batch
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    model.q(x).sum().backward()
    assert not model.q.share._entries
    first.step()
    model.k(x).sum().backward()


def test_a_pass_in_another_thread_does_not_come_between_layers_that_share(drawn):
    model = sharing_pair()
    x, other = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    model.q(x)
    thread = threading.Thread(target=model.q, args=[other])
    thread.start(), thread.join()
    model.k(x)
    assert drawn == [model.q, model.q]


def test_a_layer_that_a_pass_of_predict_skips_draws_its_own_noise_in_the_next(drawn):
    class Alternating(Attending):
        def forward(self, x):
            calls.append(self.k if calls[-1] is self.q else self.q)
            return calls[-1](x)

    model = sharing_pair(Alternating)
    calls = [model.k]
    dip.predict(model, torch.randn(2, 3, 6), k=4)
    assert drawn == calls[1:] == [model.q, model.k] * 2


# ---- hooks on the child --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["forward", "pre-hook", "hook", "global", "replaced"])
def test_what_is_hooked_to_a_variance_is_called(how):
    layer, called = DIPLinear(4, 3), []
    variance, inside, handle = layer.variance, Variance.forward, None
    if how == "forward":
        variance.forward = lambda: called.append(1) or inside(variance)
    elif how == "pre-hook":
        handle = variance.register_forward_pre_hook(lambda *_: called.append(1))
    elif how == "hook":
        handle = variance.register_forward_hook(lambda *_: called.append(1))
    elif how == "global":
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_: called.append(1) if module is variance else None
        )
    else:
        layer.variance = type(
            "Other", (Variance,), {"forward": lambda self: called.append(1) or self.log_variance}
        )(4)
    layer(torch.randn(2, 4)).sum().backward()
    if handle is not None:
        handle.remove()
    assert called == [1] and layer.log_variance.grad.any()


# ---- weight decay --------------------------------------------------------------------------------

OPTIMIZERS = [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop]


def step(optimizer, model, times=1):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(times):
            model(torch.randn(3, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(w.message) for w in said if "param_groups" in str(w.message)]


def test_an_optimizer_that_knows_no_decay_says_nothing():
    model = make()
    assert step(torch.optim.Rprop(model.parameters(), lr=1e-3), model) == []


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_first_step_that_decays_a_variance_says_so_once(kind):
    model = make()
    optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0.1)
    said = step(optimizer, model, 3)
    assert len(said) == 1
    assert f"{kind.__name__} decays the log_variance of 2 DIP layer(s)" in said[0]
    assert step(optimizer, model) == []
    copied = copy.deepcopy(model)  # a copy does not come from __init__
    assert len(step(kind(copied.parameters(), lr=1e-3, weight_decay=0.1), copied)) == 1


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_does_not_decay_a_variance_says_nothing(kind):
    model = make()
    assert step(kind(dip.param_groups(model, 1e-3, weight_decay=0.1)), model) == []
    assert step(kind(model.parameters(), lr=1e-3, weight_decay=0.0), model) == []
    plain = nn.Linear(6, 4)
    assert step(kind(plain.parameters(), lr=1e-3, weight_decay=0.1), plain) == []
    freeze(model)
    assert step(kind(model.parameters(), lr=1e-3, weight_decay=0.1), model) == []


def test_a_group_that_is_added_or_changed_later_is_looked_at():
    model = make()
    groups = dip.param_groups(model, 1e-3, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups[:2])
    assert step(optimizer, model) == []
    optimizer.add_param_group({"params": groups[2]["params"], "weight_decay": 0.0})
    assert step(optimizer, model) == []
    optimizer.param_groups[2]["weight_decay"] = 0.1
    assert len(step(optimizer, model, 2)) == 1


def test_looking_for_decay_costs_a_comparison_and_keeps_nothing_alive():
    model = make()
    optimizer = torch.optim.SGD(dip.param_groups(model, 1e-3, weight_decay=0.1))
    step(optimizer, model)
    with mock.patch.object(decay, "_variances", None):  # which would be read to look again
        step(optimizer, model, 3)
        step(torch.optim.SGD(model.parameters(), lr=1e-3), model)  # decays nothing
    with mock.patch.object(Variance, "parameters", None):  # which walks a module
        assert len(step(torch.optim.AdamW(model.parameters(), lr=1e-3), model)) == 1
    seen = [weakref.ref(model[0].variance), weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


# ---- parametrised variances ----------------------------------------------------------------------


class OneWay(nn.Module):
    def forward(self, log_variance):
        return log_variance.clamp(-12.0, 0.0)


class Clamped(OneWay):
    """Can be set to what lies inside."""

    def right_inverse(self, log_variance):
        return log_variance


def parametrised(step):
    model = make()
    for variance in variances(model):
        parametrize.register_parametrization(variance, "log_variance", step())
    return model


def test_decay_of_a_parametrised_variance_is_said():
    model = parametrised(OneWay)
    assert len(step(torch.optim.AdamW(model.parameters(), lr=1e-3), model)) == 1


def test_a_parametrised_variance_is_calibrated_loaded_summed_and_reset_through_it():
    torch.manual_seed(0)
    model, same, batches = parametrised(Clamped), make(), [torch.randn(50, 6)]
    original = "parametrizations.log_variance.original"
    state = model.state_dict().items()
    same.load_state_dict({n.replace(original, "log_variance"): value for n, value in state})
    rows, want = dip.calibrate(model, batches, 0.2), dip.calibrate(same, batches, 0.2)
    for row, other in zip(rows, want, strict=True):
        assert row.sigma_mean == pytest.approx(other.sigma_mean)
        assert row.ratio == pytest.approx(other.ratio)
    state = {n: v if n.endswith("pull") else v * 0 - 2.5 for n, v in dip.variances(model).items()}
    dip.load_variances(model, state)
    assert (values(model) == -2.5).all()
    assert all(torch.equal(value, state[name]) for name, value in dip.variances(model).items())
    dip.load_variances(same, state)
    torch.testing.assert_close(dip.penalty(model, 0.3, 0.1), dip.penalty(same, 0.3, 0.1))
    torch.testing.assert_close(noise(model, batches[0]), noise(same, batches[0]))
    model[0].reset_parameters()
    torch.testing.assert_close(model[0].log_variance, torch.full((6,), math.log(0.01)))
    assert all(v.log_variance.dtype is torch.float32 for v in variances(model.half()))
    assert dip.param_groups(model.float(), 1e-3)[2]["name"] == "variances"
    model(batches[0]).sum().backward()
    originals = [p for name, p in model.named_parameters() if name.endswith("original")]
    assert len(originals) == 2 and all(p.grad.any() for p in originals)


def test_a_parametrised_variance_that_cannot_be_set_is_refused_by_name():
    def refused(call, said):
        with pytest.raises(ValueError, match=rf"0\.variance\.log_variance{said}"):
            call()

    model, batches = parametrised(OneWay), [torch.randn(9, 6)]
    before, state = values(model), dip.variances(make())
    one_way = " is parametrised by OneWay without a right_inv"
    refused(lambda: dip.calibrate(model, batches), one_way)
    refused(lambda: dip.load_variances(model, state), one_way)
    assert torch.equal(values(model), before)
    model = parametrised(Clamped)
    above = {name: torch.full_like(v, 3.0) for name, v in state.items()}
    refused(lambda: dip.load_variances(model, above), ": .*its parametrisation can take")
    assert torch.equal(values(model), before)
    pruned = make()
    prune.l1_unstructured(pruned[0].variance, "log_variance", 2)
    refused(lambda: dip.calibrate(pruned, batches), " is")


def test_a_plain_checkpoint_and_a_part_load_beside_a_parametrised_variance():
    model = parametrised(Clamped)
    for variance in variances(model):
        variance.log_variance = torch.full((variance.num_features,), -3.0)
    model.load_state_dict(plain_state(), strict=True)
    model.load_state_dict({"2.bias": torch.zeros(4)}, strict=False)
    assert (values(model) == -3).all()


# ---- parametrised weights ------------------------------------------------------------------------


class Counted(nn.Module):
    """As spectral_norm, which takes a step each time that the weight is read in training."""

    def __init__(self):
        super().__init__()
        self.calls = []  # a probe puts a number back

    def forward(self, weight):
        self.calls.append(weight)
        return 2 * weight


@pytest.mark.parametrize(
    "kind, size", [(nn.Linear, (3, 4)), (nn.Conv1d, (3, 4, 2)), (nn.Conv2d, (3, 4, 2))]
)
def test_a_parametrised_weight_is_computed_once_in_a_pass_and_by_nothing_else(kind, size):
    model, plain, counted = nn.Sequential(kind(*size)), nn.Sequential(kind(*size)), Counted()
    x = torch.randn(2, 3, *[5] * (model[0].weight.ndim - 2))
    dip.convert(model)
    for layer in (model[0], plain[0]):
        parametrize.register_parametrization(layer, "weight", counted)

    def count(call):
        counted.calls.clear()
        call()
        return len(counted.calls)

    assert count(lambda: model(x).sum().backward()) == 1
    assert count(lambda: model(x.clone().requires_grad_())) == 1
    assert count(lambda: dip.check(model)) == count(lambda: model.to("cpu")) == 0
    # the pass that learns the number of features
    assert count(lambda: dip.convert(plain, before=["0"], batches=[x])) == 1


# ---- neighbours that work in place ---------------------------------------------------------------

SHAPES = {"linear": (5, 6), "linear-3d": (2, 5, 6), "linear-1d": (6,)}
SHAPES |= {"input": (5, 6), "conv": (2, 6, 4, 4)}


def in_place_net(kind, keep, estimator):
    first, before = nn.Linear(6, 6), nn.ReLU(inplace=True)
    if kind == "conv":
        first, layer = nn.Conv2d(6, 6, 1), DIPConv2d(6, 6, 1)
    elif kind == "input":
        # In eval mode a DIPInput is nn.Identity, and nobody may change one tensor in place twice.
        before, layer = nn.Identity(), DIPInput(6)
    else:
        options = {"activation": None if estimator == "sample" else "gelu"}
        options["num_samples"] = 2 if estimator == "mean" else 1
        layer = DIPLinear(6, 6, keep=keep, estimator=estimator, **options)
    after = nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True)
    return nn.Sequential(first, before, layer, *after)


@pytest.mark.parametrize("mode", ["train", "fixed", "eval", "noise_off", "sampling"])
@pytest.mark.parametrize(
    ("kind", "keep", "estimator"),
    [
        *((kind, "auto", "sample") for kind in SHAPES),
        *((kind, "x", "sample") for kind in ("linear", "linear-3d", "linear-1d")),
        *((kind, "auto", "mean") for kind in ("linear", "linear-3d")),
        *((kind, "auto", "analytic") for kind in ("linear", "linear-3d")),
    ],
)
def test_neighbours_may_work_in_place(kind, keep, estimator, mode):
    model, x = in_place_net(kind, keep, estimator), torch.randn(SHAPES[kind])
    apart = copy.deepcopy(model)
    for module in apart.modules():
        if isinstance(module, (nn.ReLU, nn.Dropout)):
            module.inplace = False
    contexts = {"noise_off": dip.noise_off(), "sampling": dip.sampling_on()}
    grads = []
    for each in (model, apart):
        each.train(mode != "eval" and mode != "sampling")
        with contexts.get(mode, dip.fixed_noise(4)), dip.fixed_noise(4):
            y = each(x)
            y.square().sum().backward()
        grads.append([y.detach(), *[p.grad for p in each.parameters()]])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("kind", "keep"), [("linear-3d", "auto"), ("linear-1d", "x")])
def test_neighbours_of_compiled_layers_may_work_in_place(kind, keep):
    model, x = in_place_net(kind, keep, "sample"), torch.randn(SHAPES[kind])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for context in (dip.noise_off(), contextlib.nullcontext()):
        with context, dip.fixed_noise(4):
            y, expected = compiled(x), model(x)
            torch.testing.assert_close(y, expected)
            y.sum().backward()


def test_an_input_projection_without_noise_gives_its_variance_a_gradient_of_zeros():
    layer, x = DIPInput(6), torch.randn(3, 6)
    with dip.noise_off():
        u = layer(x)
        u.add_(1).relu_().sum().backward()
    assert torch.equal(u.detach(), (x + 1).relu()) and not layer.log_variance.grad.any()


class Merging(nn.Linear):
    """As loralib's layers: eval merges the adapter into the weight, train takes it out again."""

    def __init__(self):
        super().__init__(8, 8)
        self.adapter, self.merged = nn.Parameter(torch.ones(8, 8)), False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data.add_(self.adapter.data, alpha=-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ self.adapter.T


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: dip.predict(model, x, k=2),
        lambda model, x: dip.calibrate(model, [x]),
        lambda model, x: dip.summary(model, [x]),
        lambda model, x: dip.certify(model, x, k=2, k0=1),
        lambda model, x: dip.check(model, x, strict=False),
    ],
)
def test_what_eval_mode_does_to_a_layer_is_undone_in_training(call):
    model, x = nn.Sequential(dip.DIPInput(8), Merging(), nn.Linear(8, 4)), torch.randn(3, 8)
    model[2].eval()
    with dip.noise_off():
        want = model(x)
        call(model, x)
        assert not model[1].merged and [m.training for m in model] == [True, True, False]
        torch.testing.assert_close(model(x), want)


def test_a_shared_variance_whose_owner_has_left_is_missed_and_given_back():
    model, x = dip.convert(Branches(4), share=[("q", "k", "v")]), torch.randn(3, 4)
    kept = model.k.variance
    model.q = nn.Linear(4, 4)
    model(x).sum().backward()
    report = dip.check(model, strict=False)
    assert list(report.faults) == ["q", "k", "v"] and "left the model" in report.faults["k"]
    for call in (dip.variances, lambda m: dip.param_groups(m, 0.1)):
        with pytest.raises(ValueError, match=r"^model: expected the variances of .*\['k', 'v'\]"):
            call(model)
    dip.convert(model)
    assert model.k.variance is model.v.variance is kept
    names = [n.partition(".")[0] for n, _ in model.named_parameters() if "variance" in n]
    assert names == ["q", "k"]
    model.zero_grad()
    model(x).sum().backward()
    dip.check(model)
    part = dip.number_layers(nn.Sequential(model.v))
    assert next(iter(dip.variances(part))) == "0.variance.log_variance"


@pytest.mark.parametrize(
    "wrap", [lambda f: lambda *a: 2 * f(*a), lambda f: nn.Linear(6, 8).forward]
)
def test_a_forward_that_was_set_on_a_layer_is_taken_off_before_to_plain(wrap):
    model, x = make(), torch.randn(3, 6)
    model[0].forward = wrap(model[0].forward)
    with pytest.raises(ValueError, match=r"^model: expected layers with their class's .*\['0'\]"):
        dip.to_plain(model)
    model(x)
    del model[0].forward
    want = model.eval()(x)
    assert torch.equal(dip.to_plain(model)(x), want)


def test_a_model_that_was_converted_in_inference_mode_trains():
    plain, x = plain_net(), torch.randn(3, 6)
    with torch.inference_mode():
        model = dip.convert(plain)
        dip.calibrate(model, [x])
    model(x).sum().backward()
    torch.optim.SGD(dip.param_groups(model, 0.1)).step()
    dip.check(model)


@pytest.mark.parametrize("kind", ["expanded", "of inference mode", "sparse"])
def test_buffers_that_nobody_can_write_to_do_not_stop_a_probe(kind):
    with torch.inference_mode(kind == "of inference mode"):
        buffer = torch.eye(3).to_sparse() if kind == "sparse" else torch.ones(1).expand(4)
        buffer = buffer.clone() if kind == "of inference mode" else buffer
    model, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)), torch.randn(3, 8)
    model.register_buffer("own", buffer)
    assert len(dip.producer_plan(model, [x]).moved) == 1
    dip.convert(model, before=["0"], batches=[x])
    dip.check(model, x)
    assert model.own is buffer
