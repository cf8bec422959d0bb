"""Tensor and sequence parallel: stock styles, the noise of one process bit for bit, and nothing
communicated but dsigma."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from ranks_support import on_ranks, raised
from torch import nn
from trainer_support import llama
from variance_support import gradients

import dipkernels as dip
from dipkernels import functional
from dipkernels.nn.conv import DIPConv2d
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import number_layers
from dipkernels.ops import dtensor
from dipkernels.worlds import is_dtensor

SEED = torch.tensor([0x0123456789ABCDEF, 7])


def mesh_of(world, shape=None, names=None):
    return torch.distributed.init_device_mesh("cpu", shape or (world,), mesh_dim_names=names)


class MLP(nn.Module):
    def __init__(self, k=16, hidden=32):
        super().__init__()
        self.norm = nn.LayerNorm(k)
        self.up = DIPLinear(k, hidden, init_variance=0.2)
        self.down = DIPLinear(hidden, k, init_variance=0.3)
        number_layers(self)

    def forward(self, x):
        return self.down(F.gelu(self.up(self.norm(x))))


def assert_equal_training(plain, parallel, x, key=5, **tolerance):
    """Outputs and gradients of one step agree; x is the whole input."""
    outs = []
    for model in (plain, parallel):
        with dip.fixed_noise(key):
            y = model(x)
        y = dtensor.full(y)
        y.square().sum().backward()
        outs.append(y)
    torch.testing.assert_close(outs[1], outs[0], **tolerance)
    torch.testing.assert_close(gradients(parallel), gradients(plain), rtol=1e-4, atol=1e-4)


# ---- u, bit for bit ------------------------------------------------------------------------------


def layouts(world):
    from torch.distributed.tensor import Replicate, Shard

    # shape, feature dimension, placements; 7 and 13 divide by no number of ranks
    yield (6, 16), -1, [Replicate()]
    yield (6, 16), -1, [Shard(0)]
    yield (7, 13), -1, [Shard(0)]
    yield (7, 13), -1, [Shard(1)]
    yield (1, 13), -1, [Shard(0)]  # nothing on the last rank
    yield (3, 5, 12), -1, [Shard(0)]
    yield (3, 5, 12), -1, [Shard(1)]  # the row pattern of sequence parallel
    yield (2, 3, 5, 8), -1, [Shard(2)]
    yield (1, 6, 8), -1, [Shard(1)]
    yield (2, 12, 5, 3), 1, [Shard(1)]
    yield (2, 12, 5, 3), 1, [Shard(2)]
    yield (2, 12, 5, 3), 1, [Shard(0)]
    yield (12, 2, 5), 0, [Shard(2)]


def check_u(rank, world, mesh, cases):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    for shape, dim, placements in cases:
        x, g = torch.randn(shape), torch.randn(shape)
        sigma = torch.rand(shape[dim]) + 0.1
        leaf, want_sigma = x.clone().requires_grad_(), sigma.clone().requires_grad_()
        where = {"dim": dim, "row0": 3, "col0": 8}
        want = functional.perturb(leaf, want_sigma, SEED, **where)
        want.backward(g)
        whole = [Replicate()] * mesh.ndim
        split = [Shard(0) if p.is_shard(dim % x.ndim) else Replicate() for p in placements]
        for layout in (None, whole, split):
            dx = distribute_tensor(x, mesh, placements).requires_grad_()
            s = sigma.clone() if layout is None else distribute_tensor(sigma, mesh, layout)
            s.requires_grad_()
            u = functional.perturb(dx, s, SEED, **where)
            assert u.placements == tuple(placements)
            assert torch.equal(u.full_tensor(), want), (shape, placements)
            u.backward(distribute_tensor(g, mesh, placements))
            assert torch.equal(dx.grad.full_tensor(), g)
            assert is_dtensor(s.grad) == (layout is not None)
            torch.testing.assert_close(dtensor.full(s.grad), want_sigma.grad, rtol=1e-5, atol=1e-5)
    # a sum that is still to be made over the ranks is made first
    part = torch.full((4, 8), float(rank))
    u = functional.perturb(
        DTensor.from_local(part, mesh, [Partial()] * mesh.ndim), torch.ones(8), SEED
    )
    whole = torch.full((4, 8), float(sum(range(world))))
    assert torch.equal(u.full_tensor(), functional.perturb(whole, torch.ones(8), SEED))


@on_ranks(2, 4)
def test_u_of_a_dtensor_is_that_of_one_process_to_the_bit(rank, world):
    check_u(rank, world, mesh_of(world), list(layouts(world)))


@on_ranks(4)
def test_u_on_a_mesh_of_two_dimensions_is_that_of_one_process_to_the_bit(rank, world):
    from torch.distributed.tensor import Replicate, Shard

    cases = [
        ((6, 5, 12), -1, [Shard(0), Shard(2)]),
        ((5, 7, 13), -1, [Shard(1), Shard(2)]),
        ((7, 13), -1, [Shard(0), Shard(0)]),
        ((3, 9, 8), -1, [Shard(1), Shard(1)]),
        ((4, 6, 8), -1, [Replicate(), Shard(1)]),
    ]
    check_u(rank, world, mesh_of(world, (2, 2)), cases)


@on_ranks()
def test_double_backward_through_shards_is_that_of_one_process(rank, world):
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of(world)
    x, log_variance = torch.randn(4, 6, 8), torch.randn(8)

    def second(x, s):
        u = functional.perturb(x, s, SEED, log_variance=True)
        dx, ds = torch.autograd.grad((u**3).sum(), (x, s), create_graph=True)
        total = dtensor.full((dx**2).sum()) + dtensor.full((ds**2).sum())
        return [dtensor.full(g) for g in torch.autograd.grad(total, (x, s))]

    want = second(x.clone().requires_grad_(), log_variance.clone().requires_grad_())
    for dim in (0, 1, 2):
        got = second(
            distribute_tensor(x, mesh, [Shard(dim)]).requires_grad_(),
            log_variance.clone().requires_grad_(),
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- the stock styles ----------------------------------------------------------------------------


def parallel_mlp(model, mesh, sequence=False):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    if not sequence:
        return dip.parallelize_module(
            model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}
        )
    plan = {
        "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    return dip.parallelize_module(model, mesh, plan)


@pytest.mark.parametrize("sequence", [False, True])
@on_ranks(2, 4)
def test_stock_styles_work_unchanged(rank, world, sequence):
    torch.manual_seed(1)
    plain = MLP()
    model = parallel_mlp(copy.deepcopy(plain), mesh_of(world), sequence)
    for layer in (model.up, model.down):
        assert all(p.is_replicate() for p in layer.log_variance.placements)
    assert set(plain.state_dict()) == set(model.state_dict())
    assert_equal_training(plain, model, torch.randn(3, 4, 16))
    model.eval()
    x = torch.randn(3, 4, 16)
    y = model(x)
    torch.testing.assert_close(dtensor.full(y), plain.eval()(x))
    # seeds drawn alike on every rank, which is what tensor parallelism asks for
    plain.train(), model.train()
    outs = []
    for m in (plain, model):
        torch.manual_seed(3)
        outs.append(dtensor.full(m(x)))
    torch.testing.assert_close(outs[1], outs[0])
    with dip.noise_off():  # a step without noise goes on
        dtensor.full(model(x)).sum().backward()
    again = number_layers(
        parallel_mlp(copy.deepcopy(plain), mesh_of(world), sequence).to(torch.float64)
    )
    assert again.up.log_variance.dtype is torch.float64 and again.down._stream.tolist() == [0, 1]


@on_ranks()
def test_layers_take_the_row_pattern_of_a_sequence_shard(rank, world):
    """DIP layers that see [B, S, K] cut along S, and images cut along H."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    mesh, x = mesh_of(world), torch.randn(3, 4, 8)
    try:  # torch's own layer first: before 2.12 it takes no such shard
        cut = parallelize_module(nn.Linear(8, 8), mesh, SequenceParallel())
        cut(distribute_tensor(x, mesh, [Shard(1)]))
        behind = [DIPLinear(8, 8)]
    except RuntimeError:
        assert torch.__version__ < "2.12"
        behind = []
    plain = number_layers(nn.Sequential(DIPInput(8, init_variance=0.5), *behind))
    plan = {name: SequenceParallel() for name, _ in plain.named_children()}
    model = dip.parallelize_module(copy.deepcopy(plain), mesh, plan)

    def whole(shard_of_s):
        return model(shard_of_s).full_tensor()

    with dip.fixed_noise(5):
        want, got = plain(x), whole(x.chunk(world, 1)[rank])
    torch.testing.assert_close(got, want)
    want.square().sum().backward(), got.square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-4)
    conv = DIPConv2d(4, 4, 1)
    sharded = copy.deepcopy(conv)
    from torch.distributed.tensor import distribute_module

    distribute_module(sharded, mesh)
    image = torch.randn(2, 4, 6, 5)
    with dip.fixed_noise(5):
        y = sharded(distribute_tensor(image, mesh, [Shard(0)])).full_tensor()
        torch.testing.assert_close(y, conv(image))


@pytest.mark.parametrize("sequence", [False, True])
@on_ranks()
def test_noise_communicates_nothing_but_dsigma(rank, world, sequence):
    """Forward: nothing. Backward: the two layers' dsigma, summed (column-wise) and gathered
    (row-wise)."""
    from torch.distributed.tensor.debug import CommDebugMode

    mesh, x, counts = mesh_of(world), torch.randn(3, 4, 16), []
    for noisy in (False, True):
        torch.manual_seed(1)
        model = parallel_mlp(MLP(), mesh, sequence)
        model.train(noisy)
        dtensor._agreed.add(mesh)  # the one comparison of seeds
        with CommDebugMode() as forward:
            y = model(x)
        y = y.to_local() if is_dtensor(y) else y
        with CommDebugMode() as backward:
            y.square().sum().backward()
        counts.append([forward.get_comm_counts(), backward.get_comm_counts()])
    (plain_forward, plain_backward), (dip_forward, dip_backward) = counts
    assert dip_forward == plain_forward, (plain_forward, dip_forward)
    extra = [n - plain_backward.get(op, 0) for op, n in dip_backward.items()]
    assert sum(extra) == 2 and min(extra) >= 0, dip_backward


# ---- with FSDP2 ----------------------------------------------------------------------------------


@on_ranks(4)
def test_fsdp_over_tensor_parallel_is_one_process(rank, world):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(world, (2, 2), ("dp", "tp"))
    torch.manual_seed(1)
    plain = MLP()
    model = parallel_mlp(copy.deepcopy(plain), mesh["tp"])
    fully_shard(dip.shard_variances(model, mesh=mesh["dp"]), mesh=mesh["dp"])
    x, batch = torch.randn(4, 3, 16), 2
    first = mesh["dp"].get_local_rank() * batch
    with dip.fixed_noise(5):
        (plain(x).square().sum() / 2).backward()
    with dip.fixed_noise(5, row0=first):
        dip.check_ranks(model, mesh["tp"])
        model(x[first : first + batch]).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-4)


# ---- faults --------------------------------------------------------------------------------------


@on_ranks()
def test_ranks_that_disagree_about_a_key_are_named(rank, world):
    model = parallel_mlp(MLP(), mesh_of(world))
    dtensor._agreed.clear()
    torch.manual_seed(rank)
    drawn = raised(lambda: model(torch.randn(2, 16)))
    assert "RuntimeError: seed: expected the same (key, stream)" in drawn
    assert "rank 0: (" in drawn and "rank 1: (" in drawn
    with dip.fixed_noise(10 + rank):
        fixed = raised(lambda: dip.check_ranks(model, mesh_of(world)))
    assert "rank 1 would draw other noise than rank 0" in fixed
    assert "fixed_noise(key, row0) = (11, 0)" in fixed


@on_ranks()
def test_wrong_layouts_are_named_with_their_ranks(rank, world):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = mesh_of(world)
    odd = parallel_mlp(MLP(hidden=33), mesh)  # no mesh of two divides 33
    whole, sharded = torch.randn(4, 16), distribute_tensor(torch.rand(16), mesh, [Shard(0)])
    model = parallel_mlp(MLP(), mesh)
    model.up.variance._parameters["log_variance"] = nn.Parameter(sharded)
    x = distribute_tensor(whole, mesh, [Replicate()])
    local = DTensor.from_local(
        torch.randn(4, 7 + rank),
        mesh,
        [Shard(1)],
        run_check=False,
        shape=torch.Size((4, 15)),
        stride=(15, 1),
    )
    message = raised(lambda: odd.down(torch.randn(4, 17 - rank)))
    assert f"rank {rank}" in message and "a mesh that does not divide the features" in message
    for call in (lambda: functional.perturb(x, sharded, SEED), lambda: model(whole)):
        message = raised(call)
        assert "expected a log_variance whole on every rank" in message
        assert f"rank {rank}" in message
    message = raised(lambda: functional.perturb(whole, sharded, SEED))
    assert "x is a plain tensor" in message and f"rank {rank}" in message
    message = raised(lambda: dip.check_ranks(model, mesh))
    for each in range(world):
        assert f"rank {each}: up.variance.log_variance: expected it whole" in message
    message = raised(lambda: functional.perturb(local, torch.rand(15), SEED))
    assert "x: expected a shard of shape" in message
    assert "keep: expected" in raised(lambda: DIPLinear(16, 4, keep="x")(x))
    message = raised(lambda: dip.predict(parallel_mlp(MLP(), mesh), whole, method="analytic"))
    assert "TypeError: weight: expected it whole on this rank" in message


@on_ranks()
def test_a_variance_is_whole_or_in_shards_of_its_weights_features(rank, world):
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of(world)
    of_outputs = "up.variance.log_variance: expected it whole on every rank"
    for name, said in (("up", of_outputs), ("down", "nothing raised")):
        model = parallel_mlp(MLP(), mesh)
        layer = getattr(model, name)
        shards = distribute_tensor(torch.zeros(layer.in_features), mesh, [Shard(0)])
        dip.check_ranks(model, mesh)
        layer.variance._parameters["log_variance"] = nn.Parameter(shards)
        assert said in raised(lambda model=model: dip.check_ranks(model, mesh))


@on_ranks()
def test_torchs_own_call_is_refused_with_the_name_of_ours(rank, world):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    said = "^DIPLinear: expected tensor parallelism by dip.parallelize_module"
    for style in (ColwiseParallel(), RowwiseParallel(), SequenceParallel()):
        with pytest.raises(ValueError, match=said):
            parallelize_module(MLP(), mesh_of(world), {"up": style})


@on_ranks()
def test_a_parallel_model_may_be_converted(rank, world):
    """The plain model by torch's own call, then converted: as parallelising the converted one."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return self.down(F.gelu(self.up(x)))

    torch.manual_seed(1)
    model = Plain()
    plain = dip.convert(copy.deepcopy(model), 0.2)
    model = parallelize_module(
        model, mesh_of(world), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    dip.convert(model, 0.2)
    assert all(
        p.is_replicate() for layer in (model.up, model.down) for p in layer.log_variance.placements
    )
    assert_equal_training(plain, model, torch.randn(3, 4, 16))


@on_ranks()
def test_a_parallel_model_is_calibrated_as_the_plain_one(rank, world):
    torch.manual_seed(1)
    plain, batches = MLP(), [torch.randn(9, 16), torch.randn(7, 16)]
    model = parallel_mlp(copy.deepcopy(plain), mesh_of(world))
    rows, want = dip.calibrate(model, batches), dip.calibrate(plain, batches)
    assert [str(row) for row in rows] == [str(row) for row in want]
    got, want = dip.variances(model), dip.variances(plain)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@on_ranks()
def test_an_activation_noises_its_shard_as_a_dtensor(rank, world):
    """norm -> up -> act -> down, where the norm and the activation draw the noise."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    x = torch.randn(3, 4, 16)
    plain = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    dip.convert(plain, 0.2, place="producer", batches=[x])
    for local in (False, True):
        model = copy.deepcopy(plain)
        plan = {"1": ColwiseParallel(use_local_output=local), "3": RowwiseParallel()}
        dip.parallelize_module(model, mesh_of(world), plan)
        if not local:
            assert_equal_training(plain, model, x)
    said = (
        r"input of shape \[\.\.\., 32\], got \(3, 4, 16\); if that is a shard: ColwiseParallel\(use"
    )
    with pytest.raises(ValueError, match=said):
        model(x)


def check_llama(rank, world):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    plain = dip.convert(llama(layers=2, num_attention_heads=4), 0.1).train()
    model, block = copy.deepcopy(plain), "model.layers.*."
    plan = {f"{block}self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"{block}mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {
        f"{block}self_attn.o_proj": RowwiseParallel(),
        f"{block}mlp.down_proj": RowwiseParallel(),
    }
    dip.parallelize_module(model, mesh_of(world), plan)
    ids, logits = torch.arange(6).reshape(2, 3), []
    for each in (plain, model):
        with dip.fixed_noise(3):
            logits.append(each(ids).logits)
        logits[-1].square().sum().backward()
    torch.testing.assert_close(*logits)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_llama_is_parallelised_by_a_plan_of_patterns(ranks):
    pytest.importorskip("transformers")
    ranks.run(check_llama)


@on_ranks()
def test_parallel_variances_are_whole_and_nothing_else_is_touched(rank, world):
    """Loads, loops and frozen ones behind parallelize_module; layers outside the plan stay as they
    were."""
    from torch.distributed.tensor.parallel import ColwiseParallel

    model = MLP()
    model.up.variance.requires_grad_(False)
    names = list(model.state_dict())
    dip.parallelize_module(model, mesh_of(world), {"up": ColwiseParallel()})
    assert list(model.state_dict()) == names
    assert not model.up.log_variance.requires_grad and model.down.log_variance.requires_grad
    assert not is_dtensor(model.down.log_variance) and not is_dtensor(model.down.weight)
    before = dtensor.full(model.up.log_variance.detach()).clone()
    model.load_state_dict({"norm.weight": torch.ones(16)}, strict=False)
    assert torch.equal(dtensor.full(model.up.log_variance.detach()), before)
    assert not hasattr(model.up.variance, "weight")
    failing = {"up": ColwiseParallel(), "norm": ColwiseParallel()}  # torch refuses a norm
    again = MLP()
    message = raised(lambda: dip.parallelize_module(again, mesh_of(world), failing))
    assert "NotImplementedError" in message and isinstance(again.down.variance, dip.Variance)


@on_ranks()
def test_a_frozen_variance_stays_frozen_under_every_torch(rank, world):
    """Its distribute_module makes every parameter trained."""
    from torch.distributed import tensor
    from torch.distributed.tensor.parallel import ColwiseParallel

    def trains(module, mesh, distribute=tensor.distribute_module):
        return distribute(module, mesh).requires_grad_(True)

    model = MLP()
    model.up.variance.requires_grad_(False)
    with mock.patch.object(tensor, "distribute_module", trains):
        dip.parallelize_module(
            model, mesh_of(world), {"up": ColwiseParallel(), "down": ColwiseParallel()}
        )
    assert is_dtensor(model.up.log_variance) and is_dtensor(model.down.log_variance)
    assert not model.up.log_variance.requires_grad and model.down.log_variance.requires_grad


@pytest.mark.slow
@on_ranks()
def test_tensor_parallel_compiles_whole(rank, world):
    torch.manual_seed(1)
    plain = MLP()
    model = parallel_mlp(copy.deepcopy(plain), mesh_of(world))
    torch._dynamo.reset()
    model.compile(backend="aot_eager", fullgraph=True)
    assert_equal_training(plain, model, torch.randn(2, 4, 16))
