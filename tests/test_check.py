"""check: every way in which a converted layer draws nothing is named, and the check changes
nothing."""

import contextlib
import copy
import dataclasses
import types
import warnings

import pytest
import torch
import torch.distributed.fsdp
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from variance_support import Branches, freeze
from warning_support import no_warning

import dipkernels as dip
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import dip_layers


class Fused(nn.Module):
    """A head whose weight is read in training and that is called in eval mode alone; and a buffer
    that is another tensor after each call."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.head = nn.Linear(8, 4, bias=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, y=None):
        self.calls = self.calls + 1
        h = self.drop(self.norm(self.body(x)))
        if self.training and y is not None:
            return F.cross_entropy(F.linear(h, self.head.weight), y)
        return self.head(h)


class Half(nn.Module):
    """One layer is called, one is not, and what one returns is thrown away."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.dropped = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        self.dropped(x)
        return {"logits": self.used(x), "hidden": self.dropped(x).detach()}


X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4


def faults(*args):
    report = dip.check(*args, strict=False)
    assert bool(report) is not bool(report.faults)
    return report.faults


# ---- a batch of its own --------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], {"x": X, "y": Y}])
def test_a_head_that_training_reads_past_is_named_by_a_batch(batch):
    model = dip.convert(Fused())
    with pytest.raises(ValueError, match=r"(?s)1 of 2 DIP layer.*head: it was not called"):
        dip.check(model, batch)
    assert list(faults(model, batch)) == ["head"]
    assert not faults(model, X)  # without labels the head is called


def test_a_layer_that_nothing_calls_and_one_whose_output_is_lost_are_named():
    # forward takes one argument: the labels stay behind
    found = faults(dip.convert(Half()), (X, Y))
    assert list(found) == ["unused", "dropped"]
    assert "not called" in found["unused"] and "does not reach" in found["dropped"]


def test_layers_that_reach_a_returned_object_alone_are_no_fault():
    class Policy(Half):
        def forward(self, x):
            self.dropped(x)
            mean = torch.distributions.Normal(self.used(x), 1.0, validate_args=False)
            return torch.distributions.Independent(mean, 1), x.sum(-1)

    assert list(faults(dip.convert(Policy()), X)) == ["unused", "dropped"]


def test_a_layer_whose_forward_is_called_by_itself_passes():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)

        def forward(self, x):
            return self.b.forward(self.act.forward(self.a.forward(x)))

    x = torch.randn(16, 8)
    for options, count in (({}, 2), ({"place": "producer"}, 2), ({"before": ["act"]}, 3)):
        model = dip.convert(Direct(), **options, batches=[x] if options else None)
        dip.calibrate(model, [x])
        assert dip.check(model, x).checked == count
        assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("place", ["input", "producer"])
def test_a_copy_that_the_model_makes_of_itself_computes_with_its_own_weights(place):
    class WithTeacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
            self.teacher = None

        def forward(self, x):
            if self.teacher is None:
                self.teacher = copy.deepcopy(self.student)
            return self.student(x)

    x = torch.randn(16, 8)
    model = dip.convert(WithTeacher(), place=place, batches=[x] if place == "producer" else None)
    if place == "input":
        dip.calibrate(model, [x])
    model.eval()
    want = model.teacher(x)
    with torch.no_grad():
        for p in model.student.parameters():
            p.zero_()
    assert torch.equal(model.teacher(x), want)
    assert not any("forward" in vars(m) for m in model.modules())
    dip.to_plain(model)
    assert torch.equal(model.teacher(x), want)


def test_layers_in_eval_mode_and_under_noise_off_are_named():
    model = dip.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model[0].eval()
    assert faults(model, X) == {"0": "it was called and drew nothing: it is in eval mode"}
    assert not model[0].training and model[1].training
    with dip.noise_off():
        assert list(faults(model, X)) == ["0", "1"]
    assert not faults(model.eval(), X)  # a model in eval mode is checked in training mode
    assert not model.training


def test_a_check_by_a_batch_changes_nothing():
    model = dip.convert(Fused())
    model(X, Y).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    values = {n: g.clone() for n, g in grads.items() if g is not None}
    buffers = dict(model.named_buffers())
    state = torch.get_rng_state()
    dip.check(model, (X, Y), strict=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    assert all(torch.equal(grads[n], value) for n, value in values.items())
    assert all(dict(model.named_buffers())[n] is b for n, b in buffers.items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    # and where the model itself fails
    with pytest.raises((RuntimeError, ValueError)):
        dip.check(model, X[:, :7])
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_attention_and_shared_layers_pass():
    encoder = dip.convert(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert dip.check(encoder, torch.randn(2, 3, 8))
    report = dip.check(dip.convert(Branches(8), share=[("q", "k")]), X)
    assert report and report.checked == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_pass(reentrant):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            x = x.clone().requires_grad_()
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

    assert dip.check(dip.convert(Block()), X)


# ---- the gradients that are there ----------------------------------------------------------------


def test_gradients_tell_a_weight_that_was_read_from_a_layer_that_was_not_called():
    model = dip.convert(Fused())
    model(X, Y).backward()
    assert "read without calling" in faults(model)["head"]
    half = dip.convert(Half())
    half(X)["logits"].sum().backward()
    found = faults(half)
    assert list(found) == ["unused", "dropped"]
    assert all("was not called" in why for why in found.values())
    half.unused.eval()
    assert "eval mode" in faults(half)["unused"]
    with pytest.raises(ValueError, match=r"(?s)unused.*dropped"):
        dip.check(half)


def test_gradients_of_zeros_beside_a_weight_that_learns_are_named():
    model = dip.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    with dip.noise_off():
        model(X).square().sum().backward()
    assert "noise_off" in faults(model)["0"] and len(faults(model)) == 2
    model.zero_grad()
    # a start at zero, as of residual branches, has such gradients rightly
    nn.init.zeros_(model[1].weight)
    model(X).sum().backward()
    assert not faults(model)


@pytest.mark.parametrize(
    "computed",
    [
        torch.nn.utils.spectral_norm,
        torch.nn.utils.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm` is deprecated:FutureWarning")
def test_a_layer_without_noise_is_named_whose_weight_a_hook_computes(computed):
    model = dip.convert(nn.Sequential(computed(nn.Linear(8, 8)), nn.Linear(8, 8)))
    with dip.noise_off():
        model(X).square().sum().backward()
    with no_warning():
        assert list(faults(model)) == ["0", "1"]
    model.zero_grad()
    model(X).square().sum().backward()
    assert not faults(model)


@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_a_loss_of_derivatives_alone_is_named_where_noise_cancels(kl):
    model = dip.convert(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)))
    x = X.clone().requires_grad_()
    (forces,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (forces.square().mean() + kl * dip.kl_penalty(model)).backward()
    found = faults(model)
    assert list(found) == ["2"] and "derivatives of its output alone" in found["2"]


class Score(nn.Module):
    """The derivative of an energy."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_a_model_that_returns_derivatives_is_told_where_noise_cancels():
    found = dip.check(dip.convert(Score()), X, strict=False).faults
    assert list(found) == ["energy.2"] and "derivatives of its output alone" in found["energy.2"]


@pytest.mark.parametrize("per", ["layer", "feature"])
@pytest.mark.parametrize("start", [1.0, 0.3])
def test_the_gradient_of_the_kl_term_hides_no_layer_without_noise(per, start):
    """Every variance gets one, whether its layer drew or not."""

    def gradients(model, loss, moved):
        dip.calibrate(model.eval(), [X], per=per, start=start)
        with torch.no_grad():
            for layer in dip_layers(model).values():
                layer.log_variance.add_(moved * torch.rand_like(layer.log_variance))
        for _ in range(2):  # accumulated
            (loss(model.train()) + dip.kl_penalty(model)).backward()
        return faults(model)

    for moved in (0.0, 0.5):  # at the start, and after training
        found = gradients(dip.convert(Fused()), lambda model: model(X, Y), moved)
        assert list(found) == ["head"] and "fused loss" in found["head"]
        half = dip.convert(Half(), exclude=["dropped"])
        assert not gradients(
            dip.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))),
            lambda model: model(X).square().mean(),
            moved,
        )
        half.forward = lambda x, half=half: (half.used(x), half.unused(x))
        found = gradients(half, lambda model: model(X)[0].square().mean(), moved)
        assert list(found) == ["unused"] and "does not reach the loss" in found["unused"]


@pytest.mark.parametrize("features", [2, 3])
def test_the_gradient_of_the_kl_term_hides_no_layer_of_few_features(features):
    model = dip.convert(nn.Sequential(nn.Linear(features, features), nn.Linear(features, 2)))
    with torch.no_grad():
        for layer in model:
            layer.log_variance.add_(torch.rand(features))
    with dip.noise_off():
        loss = model(torch.randn(8, features)).square().mean()
    (loss + dip.kl_penalty(model)).backward()
    assert list(faults(model)) == ["0", "1"]


@pytest.mark.parametrize("moved, size", [(1e-6, 1e-4), (0.05, 1e-7)])
def test_a_gradient_that_the_kl_terms_rounding_hides_is_no_fault(moved, size):
    """By SGD, which hardly moves a variance; and in an attention at its start, whose gradients are
    nearly zeros."""
    model = dip.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    with torch.no_grad():
        for layer in model:
            layer.log_variance.add_(moved * torch.rand_like(layer.log_variance))
    (size * model(X).square().mean() + dip.kl_penalty(model)).backward()
    assert not faults(model)


class Attends(nn.Module):
    """As small at its start as transformers'."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 3)
        for layer in self.children():
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x):
        return self.head(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(1))


@pytest.mark.parametrize("ratio", [0.01, 0.1])
def test_little_noise_in_an_attention_at_its_start_is_no_fault(ratio):
    """After a few steps of training, or with start=, the KL term has a gradient of its own."""
    for seed in range(20):
        torch.manual_seed(seed)
        x, y = torch.randn(16, 8, 32), torch.arange(16) % 3
        model = dip.convert(Attends())
        dip.calibrate(model, [x], ratio)
        with torch.no_grad():
            for layer in model.children():
                layer.log_variance.add_(3e-4 * torch.rand_like(layer.log_variance))
        out = dip.trajectories(model, x, m=2)
        dip.objective(out, y, F.cross_entropy, model).backward()
        assert not faults(model), seed


def test_frozen_variances_are_listed_and_no_fault():
    model = dip.convert(Fused())
    freeze(model)
    model(X, Y).backward()
    report = dip.check(model)
    assert report and report.frozen == ["body", "head"]
    assert "require no gradient" in str(report)


@pytest.mark.parametrize("log_variance", [float("nan"), float("-inf"), 200.0])  # e^200 is inf
def test_no_gradients_no_layers_and_no_finite_variance_are_said(log_variance):
    model = dip.convert(Fused())
    with pytest.raises(ValueError, match="after backward"):
        dip.check(model)
    with pytest.raises(ValueError, match="found none"):
        dip.check(Fused())
    with pytest.raises(ValueError, match="an empty one"):
        dip.check(model, ())
    with torch.no_grad():
        model.head.log_variance[1] = log_variance
    for call in (
        lambda: dip.check(model, X),
        lambda: dip.summary(model),
        lambda: dip.predict(model, X, k=2),
        lambda: dip.variances(model),
    ):
        with pytest.raises(ValueError, match=r"NaN or infinity in \['head'\]"):
            call()
    dip.calibrate(model, [X])  # mends it
    state = dip.variances(model)
    state["head.variance.log_variance"][0] = float("inf")
    with pytest.raises(ValueError, match=r"^state: .*NaN or infinity in \['head\."):
        dip.load_variances(model, state)


# ---- replaced after conversion -------------------------------------------------------------------


def test_layers_that_were_replaced_after_conversion_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 4))
    dip.convert(model)
    model[2] = nn.Linear(8, 10)  # a new head
    assert "by a torch.nn.modules.linear.Linear without noise" in faults(model, X)["2"]
    model[1] = nn.Identity()
    assert "gone" in faults(model, X)["1.0"]
    around = nn.ModuleDict({"net": model})
    assert list(faults(around["net"], X)) == ["1.0", "2"]
    model(X).sum().backward()
    assert list(faults(around)) == ["net.1.0", "net.2"]
    dip.convert(model)
    assert not faults(model, X)
    # nothing is left: still a report, not "convert it first"
    model[0], model[2] = nn.Linear(8, 8), nn.Linear(8, 4)
    assert len(faults(model, X)) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.insert(1, nn.LayerNorm(8)),
        lambda model: model.pop(2),
        lambda model: model[1].pop(1),
        lambda model: model.__setitem__(2, nn.Identity()),
    ],
)
def test_layers_that_moved_or_were_taken_out_are_no_fault(change):
    blocks = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    model = dip.convert(nn.Sequential(nn.Linear(8, 8), blocks, nn.Linear(8, 8), nn.ReLU()))
    change(model)
    assert not faults(model, X)
    model(X).square().sum().backward()
    assert not faults(model)


def test_a_layer_with_weights_may_get_the_name_of_one_that_a_list_lost():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    dip.convert(model.append(nn.Linear(8, 4)))
    del model[0]
    assert not faults(model, X)
    model[0] = nn.BatchNorm1d(8)  # a new one has no name but its own
    assert list(faults(model, X)) == ["0"]
    model[0], model[3] = nn.Identity(), dip.to_plain(model[3])
    assert list(faults(copy.deepcopy(model), X)) == []
    model[1] = dip.to_plain(model[1])
    model.append(nn.Linear(4, 4))
    assert list(faults(dip.convert(model), X)) == []


def test_a_layer_whose_producer_was_replaced_is_converted_again():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    dip.convert(model, place="producer", batches=X)
    model[0] = nn.LayerNorm(8)
    with pytest.raises(ValueError, match="convert again"):
        dip.check(model, X)
    dip.convert(model)
    assert isinstance(model[1], dip.DIPLinear) and dip.check(model, X)


def test_a_replaced_layer_is_named_in_a_part_of_the_model():
    model = dip.convert(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 8)))
    model[0].linear1 = nn.Linear(8, 16)
    assert [fault.split(":")[0] for fault in faults(model[0], X)] == ["linear1"]


def test_what_convert_remembers_survives_copies_and_goes_with_to_plain():
    model = dip.convert(nn.Sequential(nn.Linear(8, 8)))
    again = copy.deepcopy(model)
    again[0] = nn.Linear(8, 8)
    assert list(faults(again, X)) == ["0"]
    assert dip.to_plain(model) is model
    with pytest.raises(ValueError, match="found none"):
        dip.check(model, X)
    assert isinstance(dip_layers(dip.convert(model))["0"], DIPLinear)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_sharded_model_is_checked_by_its_gradients_alone(one_rank):
    model = dip.convert(Fused())
    torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match="FSDP has not sharded"):
        dip.check(model, (X, Y))
    model(X, Y).backward()
    assert list(faults(model)) == ["head"]


class HoldsItself(nn.Module):
    """Whose output does, or has a part that does."""

    def __init__(self, make):
        super().__init__()
        self.make, self.a, self.b = make, nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x, batch=None):
        return self.make(self.b(self.a(x).relu()))


def a_dict(y):
    out = {"logits": y, "parts": [y]}
    out["parts"].append(out)
    return out


@dataclasses.dataclass
class Part:
    __slots__ = ("logits", "whole")
    logits: torch.Tensor
    whole: object


def with_slots(y):
    out = Part(y, None)
    out.whole = {"again": out}
    return out


def an_object(y):
    out = types.SimpleNamespace(logits=y)
    out.itself = [out]
    out.itself.append(out.itself)
    return out


@pytest.mark.parametrize("make", [a_dict, with_slots, an_object])
def test_outputs_and_batches_that_hold_themselves_are_looked_into_once(make):
    batch = {"x": X}
    batch["batch"] = batch
    for place in ("input", "producer"):
        model = dip.convert(HoldsItself(make), place=place, batches=None if place == "input" else X)
        dip.calibrate(model, [batch])
        assert dip.check(model, batch) and dip.check(model, X)
    assert dip.predict(model, X, average="logits", chunk=2).shape == X[:, :4].shape
    if make is an_object:  # which predict does not look into
        return
    with pytest.raises(ValueError, match=r"^output: expected .* do not hold themselves"):
        dip.predict(model, X, average=None)
    with pytest.raises(ValueError, match=r"^args\[0\]: expected .* do not hold themselves"):
        dip.trajectories(model, make(X), m=2)


class Codebook(nn.Module):
    """Starts at its first batch in training."""

    def __init__(self):
        super().__init__()
        self.linear, self.ready = nn.Linear(8, 8), False
        self.register_buffer("codes", torch.zeros(4, 8))

    def forward(self, x):
        if self.training and not self.ready:
            self.codes, self.ready = x.detach()[:4].clone(), True
        return self.linear(x) + self.codes.sum()


def test_a_check_leaves_a_modules_flags_as_its_buffers():
    model = dip.convert(Codebook())
    dip.check(model, X)
    assert not model.ready and not model.codes.any()


class Positions(nn.Module):
    """Keeps a table for the length that came last."""

    def __init__(self):
        super().__init__()
        self.linear, self.length, self.table = nn.Linear(8, 8), 0, None

    def forward(self, x):
        if len(x) != self.length:
            self.length = len(x)
            self.table = torch.linspace(0, 1, self.length)[:, None]
        return self.linear(x + self.table)


def test_a_check_leaves_a_table_and_the_length_that_it_is_for():
    model = dip.convert(Positions())
    model(X[:2])
    dip.check(model, X)
    assert model(X[:2]).shape == (2, 8)


class Built(nn.Module):
    """Makes a layer at its first batch, of its own or of another module, and says so."""

    def __init__(self, inside):
        super().__init__()
        self.linear, self.built, self.inside = nn.Linear(8, 8), False, nn.Module()
        self.owner = [self.inside if inside else self]

    def forward(self, x):
        if not self.built:
            self.owner[0].head, self.built = nn.Linear(8, 2), True
        return self.owner[0].head(self.linear(x))


@pytest.mark.parametrize("inside", [False, True])
def test_a_check_keeps_the_layers_that_a_module_made_inside(inside):
    model = dip.convert(Built(inside))
    with contextlib.suppress(RuntimeError):  # may find that the head draws no noise
        dip.check(model, X)
    head = model.owner[0].head
    model(X)
    assert model.owner[0].head is head


def test_a_lazy_layer_that_a_batch_gave_its_shapes_keeps_them():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.LazyConv1d(4, 1)

        def forward(self, x):
            return self.last(self.first(x).unsqueeze(-1))

    x = torch.randn(2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lazy layer is named, as one without noise
        model = dip.convert(Lazy(), before=["first"], batches=[x])
    assert (type(model.last), model.last.in_channels) == (nn.Conv1d, 8)
    assert model(x).shape == (2, 4, 1)
