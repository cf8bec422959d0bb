"""Activation checkpointing: the gradients of the run without, or an error that says why not; never
other noise in silence."""

import copy
import functools
import warnings
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import dipkernels as dip
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import number_layers
from dipkernels.noise import guards


def selective(saved):
    """Saves what operations `saved` says, and computes the rest again."""

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if saved(op) else CheckpointPolicy.PREFER_RECOMPUTE

    context = functools.partial(create_selective_checkpoint_contexts, policy)
    return {"use_reentrant": False, "context_fn": context}


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
KINDS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "saving products": selective(PRODUCTS.__contains__),
    "saving noised inputs": selective(lambda op: "perturb" in str(op)),
}


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(guards, "_first_draws", OrderedDict())


@pytest.fixture
def block():
    torch.manual_seed(0)
    first, second = DIPLinear(8, 16), DIPLinear(16, 8, keep="x")
    parts = first, nn.GELU(), nn.Dropout(0.1), second, nn.Tanh(), DIPInput(8)
    return number_layers(nn.Sequential(*parts))


@pytest.fixture
def x():
    return torch.randn(4, 8, requires_grad=True)


def gradients(block, x, run):
    block.zero_grad()
    x.grad = None
    torch.manual_seed(3)
    run(x).square().sum().backward()
    return [x.grad.clone(), *(p.grad.clone() for p in block.parameters())]


def assert_same_gradients(block, x, **options):
    want = gradients(block, x, block)
    got = gradients(block, x, lambda x: checkpoint(block, x, **options))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", [None, 7])
def test_checkpointing_changes_no_gradient(block, x, kind, key):
    def checkpointed(x):
        for _ in range(2):  # two segments of the same layers: their draws differ
            x = checkpoint(block, x, **KINDS[kind])
        return x

    def under_key(run):
        if key is None:
            return gradients(block, x, run)
        with dip.fixed_noise(key, row0=2):
            return gradients(block, x, run)

    want = under_key(lambda x: block(block(x)))
    assert all(torch.equal(a, b) for a, b in zip(under_key(checkpointed), want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_in_eval_mode_is_checkpointed_too(block, x, kind):
    checkpoint(block, x, use_reentrant=False).sum().backward()  # draws of training are known
    block.eval()
    with dip.sampling_on():
        assert_same_gradients(block, x, **KINDS[kind])
        y = checkpoint(block, x, preserve_rng_state=False, **KINDS[kind])
        with pytest.raises(RuntimeError, match=r"checkpoint: .* draws a seed"):
            y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_without_rng_state_fixed_noise_changes_no_gradient(block, x, kind):
    block[2].p = 0.0
    with dip.fixed_noise(7):
        assert_same_gradients(block, x, preserve_rng_state=False, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_noise_drawn_a_second_time_is_an_error(block, x, kind):
    y = checkpoint(block, x, preserve_rng_state=False, **KINDS[kind])
    way_out = "preserve_rng_state=True, or .* fixed_noise"
    with pytest.raises(RuntimeError, match=f"checkpoint: .* draws a seed, .*{way_out}"):
        y.sum().backward()


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_outside_fixed_noise_is_an_error(block, x, kind, preserve):
    def forward():
        with dip.fixed_noise(7, row0=4):
            return checkpoint(block, x, preserve_rng_state=preserve, **KINDS[kind])

    # a selective policy's own table misses the draw before this package does
    said = r"checkpoint: .* draws a seed|randint.* not found in storage"
    with pytest.raises(RuntimeError, match=said):
        forward().sum().backward()
    for key, row0 in ((8, 4), (7, 0)):
        with (
            dip.fixed_noise(key, row0=row0),
            pytest.raises(RuntimeError, match=rf"fixed_noise\(key, row0\) = \({key}, {row0}\)"),
        ):
            forward().sum().backward()
    y = forward()
    with dip.fixed_noise(7, row0=4):  # entered again: the same noise
        y.sum().backward()
    with dip.fixed_noise(torch.tensor(7), row0=4):
        forward().sum().backward()


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_a_backward_outside_noise_off_is_an_error(block, x, kind):
    """The second computation draws where the first drew nothing."""
    with dip.noise_off():
        y = checkpoint(block, x, **KINDS[kind])
    said = r"checkpoint: .*an adjoint, a hook\) draws a seed, which is not"
    with pytest.raises(RuntimeError, match=said):
        y.sum().backward()
    with dip.noise_off():
        checkpoint(block, x, **KINDS[kind]).sum().backward()


class ByAdjoint(torch.autograd.Function):
    """dE/dx of a network E, by a function that is computed again in backward, as an adjoint is."""

    @staticmethod
    def forward(ctx, x, forces, *parameters):
        ctx.forces, ctx.parameters = forces, parameters
        ctx.save_for_backward(x)
        return forces(x).detach()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            dx, *rest = torch.autograd.grad(ctx.forces(x), [x, *ctx.parameters], grad)
        return dx, None, *rest


@pytest.mark.parametrize("way", ["autograd", "func.grad", "func.jvp", "vmap"])
def test_an_adjoint_of_a_function_that_takes_a_derivative(x, way):
    """It turns gradients on by itself: a continuous normalising flow, a Hamiltonian network."""
    net = dip.convert(nn.Sequential(nn.Linear(x.shape[-1], 8), nn.Tanh(), nn.Linear(8, 1)))

    def forces(x):
        force = torch.func.grad(lambda x: net(x).square().sum())
        if way == "func.grad":
            return force(x)
        if way == "func.jvp":
            return torch.func.jvp(force, (x,), (torch.ones_like(x),))[1]
        if way == "vmap":
            return torch.vmap(force, randomness="different")(x)
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(net(x).square().sum(), x, create_graph=True)[0]

    def by_adjoint(x):
        return ByAdjoint.apply(x, forces, *net.parameters())

    with dip.fixed_noise(7):
        got, want = (gradients(net, x, run) for run in (by_adjoint, forces))
        y = by_adjoint(x)
    torch.testing.assert_close(got, want)
    with dip.fixed_noise(8), pytest.raises(RuntimeError, match=r"row0\) = \(8, 0\)"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="draws a seed"):
        by_adjoint(x).sum().backward()
    want, got = (  # a checkpoint computes it again with the same seeds
        gradients(net, x, run)
        for run in (forces, lambda x: checkpoint(forces, x, use_reentrant=True))
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_other_layers_drew_under_is_not_taken_for_that_of_a_block(block, x, kind):
    other = DIPLinear(8, 8)
    number_layers(nn.ModuleList([block, other]))
    with dip.fixed_noise(7):
        y = checkpoint(block, x, **KINDS[kind])
    with (
        dip.fixed_noise(8),
        pytest.raises(RuntimeError, match=r"fixed_noise\(key, row0\) = \(8, 0\)"),
    ):
        (other(x) + y).sum().backward()
    with dip.noise_off():
        y = checkpoint(block, x, **KINDS[kind])
    said = r"fixed_noise\(key, row0\) = \(9, 0\)|add.* not found in storage"
    with dip.fixed_noise(9), pytest.raises(RuntimeError, match=said):
        (other(x) + y).sum().backward()


def nested(block, x, options):
    """A block with another inside it, whose noise is all there is."""

    def inner(x):
        return checkpoint(block, x.tanh(), **options).exp()

    return checkpoint(inner, x, **options)


BLOCKS = {"one": lambda block, x, options: checkpoint(block, x, **options), "nested": nested}


@pytest.mark.parametrize("run", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
@pytest.mark.parametrize(
    "at_first", [lambda: dip.fixed_noise(7), lambda: dip.fixed_noise(8, row0=4), nullcontext]
)
def test_a_key_of_one_tower_is_not_taken_for_that_of_another(block, x, kind, at_first, run):
    block[2].p = 0.0
    with at_first():
        y = run(block, x, KINDS[kind])
    with dip.fixed_noise(8):
        z = run(block, x + 1, KINDS[kind])
        with pytest.raises(RuntimeError, match=r"fixed_noise\(key, row0\) = \(8, 0\)"):
            (y * z).sum().backward()
    with dip.fixed_noise(8):
        y = run(block, x, KINDS[kind])
    z = run(block, x + 1, KINDS[kind])  # draws what the generator's state gives both
    with pytest.raises(RuntimeError, match="draws a seed"):
        (y * z).sum().backward()


@pytest.mark.parametrize("run", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_blocks_of_several_keys_enter_them_inside(block, x, kind, run):
    def tower(key):
        def under_key(x):
            with dip.fixed_noise(key):
                return block(x)

        return under_key

    def towers(x, run=lambda block, x, options: block(x)):
        return run(tower(7), x, KINDS[kind]) * run(tower(8), x + 1, KINDS[kind])

    def plain(x):
        if run is nested:
            return tower(7)(x.tanh()).exp() * tower(8)((x + 1).tanh()).exp()
        return towers(x)

    block[2].p = 0.0
    want, got = (gradients(block, x, f) for f in (plain, lambda x: towers(x, run)))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_a_key_inside_a_block_is_not_taken_for_that_of_the_rest(block, x, kind):
    other = DIPLinear(8, 8)
    number_layers(nn.ModuleList([block, other]))

    def with_key_inside(x):
        with dip.fixed_noise(8):
            x = other(x)
        return block(x)

    with dip.fixed_noise(7):
        y = checkpoint(with_key_inside, x, **KINDS[kind])
        y.sum().backward()
        y = checkpoint(with_key_inside, x, **KINDS[kind])
    said = r"fixed_noise\(key, row0\) = \(8, 0\)"
    with dip.fixed_noise(8), pytest.raises(RuntimeError, match=said):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_blocks_of_both_kinds_may_be_inside_each_other(block, x, kind):
    def inner(x):
        y = checkpoint(block, x, use_reentrant=False)
        return checkpoint(block, y.tanh(), use_reentrant=True)

    block[2].p = 0.0
    with dip.fixed_noise(7):
        want = gradients(block, x, lambda x: block(block(x).tanh()))
        got = gradients(block, x, lambda x: checkpoint(inner, x, **KINDS[kind]))
    torch.testing.assert_close(got, want)


class Adjoint(torch.autograd.Function):
    """As a solver's: its backward pass may call the model more often than its forward pass."""

    @staticmethod
    def forward(ctx, model, x, *parameters):
        ctx.model = model
        ctx.save_for_backward(x, *parameters)
        return model(x)

    @staticmethod
    def backward(ctx, slope):
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.model(x)
            found = torch.autograd.grad(ctx.model(x), [x, *parameters], slope)
        return None, *found


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_an_adjoint_inside_a_block_may_draw_more_often_than_its_forward_pass(block, x, kind):
    def solve(x):
        return Adjoint.apply(block, x.tanh(), *block.parameters()).exp()

    block[2].p = 0.0
    with dip.fixed_noise(7):
        want = gradients(block, x, lambda x: block(x.tanh()).exp())
        got = gradients(block, x, lambda x: checkpoint(solve, x, **KINDS[kind]))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_a_teacher_in_inference_mode_inside_a_block_draws_as_at_first(block, x, kind):
    def with_teacher(x):
        with torch.inference_mode():
            block(x.detach())
        y = block(x)
        with torch.inference_mode():
            block(x.detach())
        return y

    block[2].p = 0.0
    with dip.fixed_noise(7):
        want = gradients(block, x, block)
        got = gradients(block, x, lambda x: checkpoint(with_teacher, x, **KINDS[kind]))
    torch.testing.assert_close(got, want)


def test_saved_seeds_need_no_rng_state(block, x):
    block[2].p = 0.0
    saved = selective(lambda op: op is torch.ops.aten.randint.low)
    assert_same_gradients(block, x, preserve_rng_state=False, **saved)


def test_checkpoint_sequential_and_several_forwards_before_a_backward(block, x):
    def run(x, segments):
        if segments:
            block_of = functools.partial(checkpoint_sequential, block, segments)
            outs = [block_of(x, use_reentrant=False) for _ in range(3)]
        else:
            outs = [block(x) for _ in range(3)]
        return outs[2] + 2 * outs[0] - outs[1]

    want = gradients(block, x, lambda x: run(x, 0))
    got = gradients(block, x, lambda x: run(x, 2))
    torch.testing.assert_close(got, want)


def test_only_blocks_that_may_be_computed_again_are_remembered(block, x, monkeypatch):
    for _ in range(3):
        block(x).sum().backward()
        with dip.sampling_on():
            block.eval()(x).sum().backward()
        block.train()
    assert not guards._first_draws
    monkeypatch.setattr(guards, "_MAX_DRAWS", 8)
    for _ in range(20):
        checkpoint(block, x, use_reentrant=False).sum().backward()
    assert len(guards._first_draws) == 8


# ---- under torch.compile -------------------------------------------------------------------------


def noise_agrees(block, run, x):
    """Whether backward had the z of forward: y = tanh(sin(x) + sigma z), so z is known from y."""
    block.zero_grad()
    y, w = run(x), torch.randn(x.shape)
    (y * w).sum().backward()
    want = (w * (1 - y**2) * (torch.atanh(y) - torch.sin(x)) / 2).sum(0)
    return torch.allclose(block.projection.log_variance.grad, want, rtol=1e-2, atol=1e-3)


class SineTanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = DIPInput(8, init_variance=0.3)

    def forward(self, x):
        return torch.tanh(self.projection(torch.sin(x)))


@pytest.mark.parametrize("preserve", [False, True])
def test_a_compiled_checkpoint_has_one_noise(preserve):
    torch._dynamo.reset()
    block, x = SineTanh(), torch.randn(4, 8, requires_grad=True)
    run = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=preserve)
    compiled = torch.compile(lambda x: run(x), backend="aot_eager_decomp_partition", fullgraph=True)
    assert noise_agrees(block, compiled, x)


class Pair(nn.Module):
    """Two layers that read one input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = torch.sin(x)
        return self.a(h) * self.b(h)


def test_a_compiled_checkpoint_of_layers_that_share_needs_the_documented_setting():
    plain = dip.convert(Pair(), share=[("a", "b")], init_variance=0.3)
    x, gradients = torch.randn(4, 8, requires_grad=True), []

    def run(x):
        return checkpoint(plain, x, use_reentrant=False)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="HOP: Unsafe side effect"):
        compiled(x)
    setting = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    for call in (torch.compile(plain, backend="aot_eager", fullgraph=True), compiled):
        torch._dynamo.reset()
        plain.zero_grad()
        torch.manual_seed(3)
        with torch._dynamo.config.patch({setting: True}):
            call(x).sum().backward()
        gradients.append([p.grad.clone() for p in plain.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_memory_budget_is_warned_of_with_drawn_seeds_and_right_with_a_key():
    from torch._functorch import config

    x = torch.randn(4, 8, requires_grad=True)
    for key, budget in ((None, 0.3), (5, 0.3), (None, 1.0)):
        torch._dynamo.reset()
        with config.patch(activation_memory_budget=budget):
            block = SineTanh()
            compiled = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if key is None:
                    compiled(x).sum().backward()
                else:
                    with dip.fixed_noise(key):
                        assert noise_agrees(block, compiled, x)
            texts = [str(w.message) for w in caught if "activation_memory_budget" in str(w.message)]
            assert len(texts) == (1 if key is None and budget < 1 else 0)


def test_a_deep_copy_may_be_checkpointed(block, x):
    twin = copy.deepcopy(block)
    torch.manual_seed(3)
    checkpoint(twin, x, use_reentrant=False).sum().backward()
