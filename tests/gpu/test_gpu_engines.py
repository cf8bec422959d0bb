"""CUDA graphs, reduce-overhead, checkpointing and mixed precision on a device: fresh noise, right
gradients."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dipkernels as dip
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import number_layers


@pytest.fixture
def model():
    torch.manual_seed(0)
    return number_layers(nn.Sequential(DIPLinear(64, 128), nn.GELU(), DIPLinear(128, 64))).cuda()


@pytest.fixture
def x():
    return torch.randn(32, 64, device="cuda")


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def test_a_captured_step_draws_fresh_noise_and_has_its_gradients(x):
    """y = x + sigma z, so that z is known from y, and the gradient of log_variance from z."""
    layer = DIPInput(64, init_variance=0.5).cuda()
    w = torch.randn_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer.zero_grad()
            (layer(x) * w).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad()
    with torch.cuda.graph(graph):
        y = layer(x)
        (y * w).sum().backward()
    outs = []
    for _ in range(3):
        layer.log_variance.grad.zero_()
        graph.replay()
        torch.cuda.synchronize()
        outs.append(y.clone())
        torch.testing.assert_close(
            layer.log_variance.grad, (w * (y - x)).sum(0) / 2, rtol=1e-3, atol=1e-3
        )
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])


def test_graphed_callables_train_as_eager_under_a_key(model, x):
    eager = copy.deepcopy(model)
    with dip.fixed_noise(3):
        graphed = torch.cuda.make_graphed_callables(model, (x.clone().requires_grad_(),))
        for run, each in ((eager, eager), (graphed, model)):
            each.zero_grad()
            run(x.clone().requires_grad_()).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(eager), rtol=1e-3, atol=1e-3)


def test_a_graph_captured_under_a_key_draws_its_noise_after_the_context(x):
    layer = number_layers(nn.Sequential(DIPInput(64, init_variance=0.5))).cuda()
    with dip.fixed_noise(7):
        want = layer(x)
        graph = torch.cuda.CUDAGraph()
        with pytest.warns(UserWarning, match="CUDA graph"), torch.cuda.graph(graph):
            y = layer(x)
    layer.cuda()  # which gives it another stream
    taken = [torch.full((2,), i, device="cuda") for i in range(100)]  # the memory that was let go
    with dip.fixed_noise(8):
        graph.replay()
    assert torch.equal(y, want) and len(taken) == 100


def test_a_key_that_is_filled_before_each_replay_is_that_of_the_replay(x):
    layer = number_layers(nn.Sequential(DIPInput(64, init_variance=0.5))).cuda()
    key, graph = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.cuda.CUDAGraph()
    layer(x)
    with torch.cuda.graph(graph), dip.fixed_noise(key):
        y = layer(x)
    for number in (5, -6, 5):
        key.fill_(number)
        graph.replay()
        with dip.fixed_noise(number):
            assert torch.equal(y, layer(x))


def test_reduce_overhead_is_eager_and_draws_afresh(model, x):
    torch._dynamo.reset()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for key in range(4):
        for run, each in ((eager, eager), (compiled, model)):
            torch.compiler.cudagraph_mark_step_begin()
            each.zero_grad()
            with dip.fixed_noise(key):
                run(x).square().sum().backward()
        torch.testing.assert_close(gradients(model), gradients(eager), rtol=1e-3, atol=1e-2)
    outs = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        outs.append(compiled(x).detach().clone())
    assert not any(torch.equal(a, b) for i, a in enumerate(outs) for b in outs[i + 1 :])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_on_a_device_changes_no_gradient_or_raises(model, x, reentrant):
    x.requires_grad_()
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        torch.manual_seed(3)
        run(x).square().sum().backward()
        grads.append(gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    with pytest.raises(RuntimeError, match="checkpoint: "):
        checkpoint(model, x, use_reentrant=reentrant, preserve_rng_state=False).sum().backward()
    with dip.fixed_noise(3):
        y = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="checkpoint: "):
        y.sum().backward()


def test_a_scaled_float16_step_on_a_device(model, x):
    scaler = torch.amp.GradScaler("cuda")
    optimizer = torch.optim.AdamW(dip.param_groups(model, 1e-3))
    before = model[0].log_variance.detach().clone()
    with torch.autocast("cuda", torch.float16):
        loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    assert model[0].log_variance.grad.dtype is torch.float32
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model[0].log_variance, before)
