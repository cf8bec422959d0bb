"""Data parallel, FSDP2 and pipelines: the training of one process, on any number of them."""

import copy
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from ranks_support import on_ranks, raised
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from variance_support import gradients, trained, variances

import dipkernels as dip
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import number_layers
from dipkernels.noise import guards
from dipkernels.ops import dtensor
from dipkernels.worlds import is_dtensor


def _last_fails(rank, world):
    if rank == world - 1:
        raise RuntimeError("only here")
    torch.distributed.barrier()  # waits for the other


def test_a_fault_of_one_rank_ends_all_without_a_wait(ranks):
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1:[\s\S]*only here"):
        ranks.run(_last_fails)
    assert time.monotonic() - start < 60


class Block(nn.Module):
    def __init__(self, k=16):
        super().__init__()
        self.up, self.down = nn.Linear(k, 2 * k), nn.Linear(2 * k, k)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


def make_model(blocks=2, k=16, noisy=True):
    torch.manual_seed(1)
    model = nn.Sequential(*(Block(k) for _ in range(blocks)), nn.Linear(k, 4))
    return dip.convert(model, init_variance=0.1) if noisy else model


def batch(rows=8, k=16):
    torch.manual_seed(2)
    return torch.randn(rows, 3, k), torch.randn(rows, 3, 4)


def share_of(rank, world, rows=8):
    """This rank's rows of the batch: the first of them, and all."""
    first, each = rank * rows // world, rows // world
    return first, slice(first, first + each)


def loss_of(model, x, y):
    return F.mse_loss(model(x).float(), y)


def parameters(model):
    """By name, whole."""
    return {name: dtensor.full(p.detach()) for name, p in model.named_parameters()}


def of_variances(model):
    return {n: g for n, g in gradients(model).items() if "log_variance" in n}


def one_process():
    model = make_model()
    with dip.fixed_noise(5):
        loss_of(model, *batch()).backward()
    return gradients(model)


# ---- DDP -----------------------------------------------------------------------------------------


@on_ranks(2, 4)
def test_ddp_is_one_process(rank, world):
    """Outputs and gradients under fixed_noise(key, row0); accumulation, no_sync, steps without
    noise."""
    from torch.nn.parallel import DistributedDataParallel

    x, y = batch()
    each, (first, mine) = len(x) // world, share_of(rank, world)
    plain, model = make_model(), DistributedDataParallel(make_model())
    with dip.fixed_noise(5):
        whole = plain(x)
        F.mse_loss(whole, y).backward()
    with dip.fixed_noise(5, row0=first):
        part = model(x[mine])
        F.mse_loss(part, y[mine]).backward()
    torch.testing.assert_close(part, whole[mine], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-5)
    # accumulation: all but the last part without communication
    model.zero_grad()
    for step in range(each):
        here = slice(first + step, first + step + 1)
        last = step == each - 1
        with (
            dip.fixed_noise(5, row0=first + step),
            torch.enable_grad() if last else model.no_sync(),
        ):
            (F.mse_loss(model(x[here]), y[here]) / each).backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-5)
    # a step without noise, and the one after it
    model.zero_grad()
    with dip.noise_off():
        loss_of(model, x[mine], y[mine]).backward()
    assert not any(g.any() for g in of_variances(model).values())
    model.zero_grad()
    loss_of(model, x[mine], y[mine]).backward()
    assert all(g.any() for g in gradients(model).values())
    with torch.no_grad():  # trajectories of the wrapped model are those of one process
        with dip.fixed_noise(6):
            whole = dip.trajectories(plain, x, m=2)
        with dip.fixed_noise(6, row0=2 * first):
            part = dip.trajectories(model, x[mine], m=2)
    torch.testing.assert_close(part, whole[:, mine], rtol=1e-5, atol=1e-5)
    reduced = [None] * world
    torch.distributed.all_gather_object(
        reduced, gradients(model)["0.up.variance.log_variance"].tolist()
    )
    assert reduced == [reduced[0]] * world


def check_warning(rank, world, alike, compiled, way):
    guards.ranks_to_compare = True
    layer = DIPLinear(8, 8)
    torch._dynamo.reset()
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    torch.manual_seed(0 if alike else rank)
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "explicit":
            dip.check_ranks(layer)
        elif way == "fixed":
            with dip.fixed_noise(3, row0=0 if alike else 4 * rank):
                dip.check_ranks(layer)
        else:
            for _ in range(3):
                run(torch.randn(2, 8))
    texts = [str(w.message) for w in caught if "dipkernels" in str(w.message)]
    guards.ranks_to_compare = True
    return texts


@pytest.mark.parametrize(
    ("compiled", "way"), [(False, ""), (True, ""), (False, "explicit"), (False, "fixed")]
)
def test_ranks_that_draw_alike_are_warned_of_once(ranks, compiled, way):
    a, b = ranks.run(check_warning, True, compiled, way)
    assert len(a) + len(b) == (1 if not way else 2)
    assert any("rank" in text and "same noise" in text and "row0" in text for text in a + b)
    assert ranks.run(check_warning, False, compiled, way) == [[], []]


# ---- FSDP2 ---------------------------------------------------------------------------------------


def shard(model, dtype=None, apart=True, **kwargs):
    """Block by block, then the whole, with the variances apart."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype) if dtype else MixedPrecisionPolicy()
    for module in (*(m for m in model if isinstance(m, Block)), model):
        if apart:
            dip.shard_variances(module, **kwargs)
        fully_shard(module, mp_policy=policy, **kwargs)
    return model


@pytest.mark.parametrize(
    "kind", ["float32 in one group", "float32 apart", "bf16 weights", "mixed precision"]
)
@on_ranks(2, 4)
def test_fsdp_is_one_process(rank, world, kind):
    (x, y), (first, mine) = batch(), share_of(rank, world)
    model, dtype = make_model(), None
    if kind == "bf16 weights":
        model.bfloat16()
        x = x.bfloat16()
    if kind == "mixed precision":
        dtype = torch.bfloat16
    reference = copy.deepcopy(model)
    shard(model, dtype, apart=kind != "float32 in one group")
    if kind == "mixed precision":
        reference.bfloat16()
    assert all(v.log_variance.dtype is torch.float32 for v in variances(model))
    dip.check_ranks(model)
    with dip.fixed_noise(5):
        loss_of(reference, x.bfloat16() if dtype else x, y).backward()
    with dip.fixed_noise(5, row0=first):
        loss_of(model, x[mine], y[mine]).backward()
    got, want = gradients(model), gradients(reference)
    assert all(g.dtype is torch.float32 for n, g in got.items() if "log_variance" in n)
    exact = kind.startswith("float32")
    got, want = ({n: g.float() for n, g in each.items()} for each in (got, want))
    torch.testing.assert_close(
        got, want, **({"rtol": 1e-4, "atol": 1e-5} if exact else {"rtol": 0.05, "atol": 2e-3})
    )
    # steps without noise do not break the next one
    for context in (dip.noise_off(), dip.fixed_noise(1)):
        model.zero_grad()
        with context:
            loss_of(model, x[mine], y[mine]).backward()
    assert all(g.any() for g in gradients(model).values())


class Checkpointed(Block):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@on_ranks()
def test_fsdp_with_checkpointing_and_accumulation_is_one_process(rank, world):
    (x, y), (first, mine) = batch(), share_of(rank, world)
    want = one_process()
    model = make_model()
    for block in model[:2]:
        block.__class__ = Checkpointed
    shard(model)
    with dip.fixed_noise(5, row0=first):
        loss_of(model, x[mine], y[mine]).backward()
    torch.testing.assert_close(gradients(model), want, rtol=1e-4, atol=1e-5)
    # accumulation without reduction in between
    model.zero_grad()
    middle = (first + mine.stop) // 2
    for step, here in enumerate((slice(first, middle), slice(middle, mine.stop))):
        model.set_requires_gradient_sync(step == 1)
        with dip.fixed_noise(5, row0=here.start):
            (loss_of(model, x[here], y[here]) / 2).backward()
    torch.testing.assert_close(gradients(model), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
@on_ranks()
def test_blocks_compile_whole_inside_mixed_precision(rank, world, checkpointed):
    """The usual order: checkpoint, compile each block, shard."""
    (x, y), (first, mine) = batch(), share_of(rank, world)
    got, graphs = [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    for compiled in (False, True):
        model = make_model()
        for block in model[:2]:
            block.__class__ = Checkpointed if checkpointed else Block
            if compiled:
                block.compile(backend=count, fullgraph=True)
        shard(model, torch.bfloat16)
        for step in range(2):
            model.zero_grad()
            with dip.fixed_noise(step, row0=first):
                loss_of(model, x[mine], y[mine]).backward()
        with torch.no_grad(), dip.fixed_noise(2, row0=first):
            model(x[mine])  # without a backward pass, which would shard again
        with dip.fixed_noise(3, row0=first):
            loss_of(model, x[mine], y[mine]).backward()
        got.append(gradients(model))
    # the first block's, whose input wants no gradient; the second's; one for both without gradients
    assert len(graphs) == 3, len(graphs)
    torch.testing.assert_close(*got, rtol=0.02, atol=1e-3)
    assert all(g.any() for g in of_variances(model).values())
    with torch.no_grad(), dip.sampling_on():
        model.eval()(x[mine])


@on_ranks()
def test_a_method_beside_forward_has_the_variances_of_its_step(rank, world):
    """FSDP gathers for it, and no hook of the module runs."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    class Encoder(Block):
        def encode(self, x):
            return self.down(self.up(x))

    x, got = batch()[0], []
    for sharded in (False, True):
        model = make_model(1)
        model[0].__class__ = Encoder
        if sharded:
            shard(model)
            register_fsdp_forward_method(model[0], "encode")
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
        with dip.fixed_noise(5):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            model[0].encode(x).sum().backward()  # behind a step
            with torch.no_grad():
                model(x)
            model[0].encode(x).sum().backward()  # behind a pass without gradients
        got.append(of_variances(model))
    assert got[0]["0.up.variance.log_variance"].any()
    torch.testing.assert_close(*got, rtol=1e-4, atol=1e-4)


@on_ranks()
def test_a_selective_checkpoint_meets_none_of_fsdps_own_operations(rank, world):
    seen = set()

    def policy(ctx, op, *args, **kwargs):
        seen.add(str(op))
        return op is torch.ops.aten.mm.default

    class Selective(Block):
        def forward(self, x):
            return checkpoint(
                super().forward,
                x,
                use_reentrant=False,
                context_fn=lambda: create_selective_checkpoint_contexts(policy),
            )

    model = make_model()
    for block in model[:2]:
        block.__class__ = Selective
    shard(model)
    x, y = batch()
    with dip.fixed_noise(5):
        loss_of(model, x, y).backward()
    torch.testing.assert_close(gradients(model), one_process(), rtol=1e-4, atol=1e-5)
    assert seen and not [op for op in seen if op.startswith(("c10d", "fsdp", "profiler"))], seen


@pytest.mark.parametrize("name, weights", [("penalty", (0.3, 0.02)), ("kl_penalty", (0.3,))])
@on_ranks()
def test_penalties_over_shards_are_those_of_the_whole(rank, world, name, weights):
    def with_priors():
        model = make_model()
        for v in variances(model):
            v.log_prior.copy_(torch.linspace(-4, -1, v.log_prior.numel()))
            v.pull.copy_(torch.linspace(0.2, 1, v.pull.numel()))
        return model

    def term(model):
        return getattr(dip, name)(model, *weights)

    plain, (x, y) = with_priors(), batch()
    want = term(plain)
    want.backward()
    for when in ("before", "after", "alone"):
        model = shard(with_priors())
        if when == "after":
            output = model(x)
            total = term(model)
            (total + 0 * output.sum()).backward()
        else:
            total = term(model)
            (total + 0 * loss_of(model, x, y) if when == "before" else total).backward()
        assert want > 0 and not is_dtensor(total)
        torch.testing.assert_close(total, want)
        torch.testing.assert_close(of_variances(model), of_variances(plain))


@on_ranks()
def test_kl_takes_a_prior_that_is_a_dtensor(rank, world):
    """A style of tensor parallelism may have made it one."""
    layer = DIPInput(4, init_variance=0.5)
    layer.variance.log_variance = nn.Parameter(layer.log_variance.detach() + 1)
    expected = dip.kl_penalty(layer)
    whole = dtensor.laid_out_as(layer.variance.log_prior, _replicated(world))
    layer.variance.log_prior = whole
    layer.variance.pull = dtensor.laid_out_as(layer.variance.pull, _replicated(world))
    torch.testing.assert_close(dip.kl_penalty(layer), expected)


def _replicated(world):
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    return distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (world,)), [Replicate()])


@on_ranks()
def test_summary_of_shards_is_that_of_the_whole(rank, world):
    plain = make_model()
    with torch.no_grad():
        plain[0].up.log_variance.copy_(torch.linspace(-4, -1, 16))
    model = shard(copy.deepcopy(plain))
    assert list(dip.summary(model)) == list(dip.summary(plain))


def check_fsdp1(rank, world):
    """Between passes it shows parts of a flat parameter (use_orig_params) or freed memory."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    want, messages = dip.variances(make_model()), []
    for parts in (True, False):
        model = FullyShardedDataParallel(
            make_model(), device_id=torch.device("cpu"), use_orig_params=parts
        )
        loss_of(model, *batch()).backward()
        for call in (
            dip.kl_penalty,
            lambda m: dip.penalty(m, 0.3, 0.02),
            dip.variances,
            lambda m: dip.load_variances(m, want),
            dip.check,
        ):
            messages.append(raised(lambda call=call, model=model: call(model)))
        with FullyShardedDataParallel.summon_full_params(model):
            torch.testing.assert_close(dip.variances(model), want, rtol=0, atol=0)
        assert dip.predict(model, batch()[0], k=2, average="logits").isfinite().all()
    return messages


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_variances_that_fsdp1_hides_are_refused(ranks):
    for messages in ranks.run(check_fsdp1):
        for kl, penalty, read, load, check in (messages[:5], messages[5:]):
            assert all("got a part of them" in message for message in (kl, penalty, read, check))
            assert "kept elsewhere by FSDP1: set it before the model is wrapped" in load


def check_meta_and_state(rank, world, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_model_state_dict,
    )

    source = make_model()
    with torch.no_grad():
        for v in variances(source):
            v.log_variance.copy_(torch.linspace(-4, -1, v.log_variance.numel()))
    # from nothing: shapes, shards, memory, values
    with torch.device("meta"):
        model = make_model()
        model.append(DIPLinear(4, 5, init_variance=torch.rand(4, device="cpu") + 0.5))
        number_layers(model)
    shard(model)
    model.to_empty(device="cpu")
    for m in model.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    for number, layer in enumerate(m for m in model.modules() if isinstance(m, DIPLinear)):
        assert layer._stream.tolist() == [0, number]
        wanted = layer.variance.init_variance
        torch.testing.assert_close(
            layer.variance.sigma.square(),
            torch.as_tensor(wanted).expand(layer.in_features),
            rtol=1e-5,
            atol=0,
        )
    # a full state dict into a sharded model on meta, and back
    with torch.device("meta"):
        model = shard(make_model())
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, source.state_dict() if rank == 0 else {}, options=full)
    for p in model.parameters():
        assert is_dtensor(p) and not p.is_meta
    back = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.testing.assert_close(back, source.state_dict(), rtol=0, atol=0)
    # one step, so that the optimiser has state; then the distributed checkpoint
    optimizer = torch.optim.AdamW(dip.param_groups(model, lr=1e-2, weight_decay=0.1))
    with dip.fixed_noise(4):
        loss_of(model, *batch()).backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return parameters(model)


@pytest.mark.parametrize("inside", [True, False])
@on_ranks()
def test_a_sharded_meta_model_gets_its_variances(rank, world, inside):
    """Outside torch.device("meta") the variances have values, the weights none; inside neither
    has."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    for name, p in plain.named_parameters():
        p.data.fill_(len(name))
    for whole, strict in ((True, False), (True, True), (False, False)):
        full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
            model = dip.convert(model, 0.25) if inside else model
        model = shard(model if inside else dip.convert(model, 0.25))
        if whole:
            set_model_state_dict(model, plain.state_dict() if rank == 0 else {}, options=full)
        else:
            model.to_empty(device="cpu")
        for v in variances(model):
            torch.testing.assert_close(v.sigma, torch.full((v.num_features,), 0.5))
        if whole:
            assert all((dtensor.full(model[i].weight) == 8.0).all() for i in (0, 2))
            model(torch.randn(3, 6)).sum().backward()


@on_ranks()
def test_a_load_into_shards_leaves_what_it_does_not_name(rank, world):
    model = trained(make_model())
    shard(model)
    own = {name: p.clone() for name, p in parameters(model).items()}
    first = next(name for name in own if name.endswith("weight"))
    model.load_state_dict({first: model.state_dict()[first]}, strict=False)
    now = parameters(model)
    torch.testing.assert_close(now, own, rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        pytest.param(
            "replicate",
            marks=pytest.mark.skipif(
                torch.__version__.startswith("2.10."),
                reason="torch 2.10 does not say when replicate runs",
            ),
        ),
    ],
)
@on_ranks()
def test_ddp_trains_on_with_a_backbone_in_eval_mode(rank, world, kind):
    from torch.distributed._composable.replicate import replicate
    from torch.nn.parallel import DistributedDataParallel

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.ModuleDict(
                {
                    "fc": nn.Linear(8, 8),
                    "attention": nn.MultiheadAttention(8, 2, batch_first=True),
                    "conv": nn.Conv1d(8, 8, 1),
                    "input": dip.DIPInput(8),
                }
            )
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            b = self.backbone
            x = b["input"](b["fc"](x))
            x = x + b["attention"](x, x, x)[0]
            return self.head(b["conv"](x.transpose(1, 2)).transpose(1, 2))

    torch.manual_seed(rank)
    plain = dip.convert(Net())
    plain.backbone.eval()
    model = (
        replicate(copy.deepcopy(plain))
        if kind == "replicate"
        else DistributedDataParallel(copy.deepcopy(plain))
    )
    x = torch.randn(2, 3, 8)
    for _ in range(3):  # the second step is where DDP stops
        y = model(x)
        y.square().sum().backward()
    inner = model if kind == "replicate" else model.module
    grads = {name: p.grad for name, p in inner.named_parameters() if name.endswith("log_variance")}
    assert all(g is not None for g in grads.values())
    assert {name for name, g in grads.items() if g.any()} == {"head.variance.log_variance"}
    with torch.no_grad():
        model(x)
    apart = plain(x)  # without DDP nothing is added
    apart.square().sum().backward()
    assert plain.backbone["fc"].log_variance.grad is None


@on_ranks()
def test_ddp_trains_experts_that_get_no_tokens(rank, world):
    """docs/cluster.md, DDP: without the term of 0 torch says `marked as ready twice`."""
    from torch.nn.parallel import DistributedDataParallel

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x, chosen):
            return self.experts[chosen](x) + 0 * dip.kl_penalty(self)

    torch.manual_seed(rank)
    model = DistributedDataParallel(dip.convert(Experts()), find_unused_parameters=True)
    optimizer = torch.optim.AdamW(dip.param_groups(model, lr=1e-2))
    own = model.module.experts
    own[3].log_variance.data.add_(1)  # beside its prior, so that the KL term moves it
    for step in range(3):
        x = torch.randn(4, 8)
        out = dip.trajectories(lambda x, step=step: model(x, (step + rank) % 3), x, m=2)
        optimizer.zero_grad()
        dip.objective(out, x, F.mse_loss, model).backward()
        assert own[3].weight.grad is None and (own[3].log_variance.grad > 0).all()
        optimizer.step()
    now = [p.detach() for p in model.parameters()]
    everywhere = [None] * world
    torch.distributed.all_gather_object(everywhere, now)
    torch.testing.assert_close(everywhere, [now] * world, rtol=0, atol=0)


def check_load(rank, world, folder, want):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = make_model()
    if world > 1:
        shard(model)
    optimizer = torch.optim.AdamW(dip.param_groups(model, lr=1e-2, weight_decay=0.1))
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    torch.testing.assert_close(parameters(model), want, rtol=0, atol=0)
    with dip.fixed_noise(6):
        loss_of(model, *batch()).backward()
    optimizer.step()
    return parameters(model)


def test_a_checkpoint_of_two_processes_loads_in_one(ranks, tmp_path):
    """Meta-device init, full and sharded state dicts; training goes on the same on either
    number."""
    want = ranks.run(check_meta_and_state, str(tmp_path))[0]
    alone = check_load(0, 1, str(tmp_path), want)
    again = ranks.run(check_load, str(tmp_path), want)[0]
    torch.testing.assert_close(again, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_loads_in_two(ranks, four_ranks, tmp_path):
    want = four_ranks.run(check_meta_and_state, str(tmp_path))[0]
    ranks.run(check_load, str(tmp_path), want)


def check_communication(rank, world, wrapper):
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.nn.parallel import DistributedDataParallel

    counts = {}
    for noisy in (False, True):
        model = make_model(noisy=noisy)
        model = (
            DistributedDataParallel(model)
            if wrapper == "ddp"
            else shard(model, apart=noisy and wrapper == "apart")
        )
        x, y = batch()
        loss_of(model, x, y).backward()
        with CommDebugMode() as mode:
            loss_of(model, x, y).backward()
        for op, n in mode.get_comm_counts().items():
            name = str(op).rsplit(".", 1)[-1]
            counts[name] = counts.get(name, 0) + (n if noisy else -n)
    return {name: n for name, n in counts.items() if n}


@pytest.mark.parametrize("wrapper", ["ddp", "together", "apart"])
def test_data_parallel_adds_no_collective(ranks, wrapper):
    """log_variance travels with the other gradients; sharded apart it is one gather and one
    reduction a group."""
    extra = ranks.run(check_communication, wrapper)[0]
    groups = 3 if wrapper == "apart" else 0
    assert sum(extra.values()) == 2 * groups, extra


def check_faults(rank, world):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = make_model()
    for block in model[:2]:
        fully_shard(block, mp_policy=half)
    fully_shard(model, mp_policy=half)
    renumbered = make_model()
    renumbered[1].up.set_number(2 + 7 * rank)
    calibrated = make_model()
    dip.calibrate(calibrated, [(1 + rank) * batch()[0]])
    calls = (
        lambda: dip.check_ranks(model),
        lambda: model(batch()[0]),
        lambda: dip.shard_variances(nn.Linear(2, 2)),
        lambda: dip.shard_variances(make_model(), mp_policy=half),
        lambda: dip.check_ranks(renumbered),
        lambda: dip.check_ranks(calibrated),
        lambda: shard(make_model(), apart=False)[0].up.forward(torch.randn(3, 16)),
    )
    return [raised(call) for call in calls]


def test_faults_are_named_with_layers_and_ranks(ranks):
    for messages in ranks.run(check_faults):
        policy, at_op, empty, helper, numbers, priors, outside = messages
        assert (
            "rank 1: 0.up.variance.log_variance: FSDP would compute it in torch.bfloat16" in policy
        )
        assert "2.variance.log_variance" in policy
        assert "expected its variance in torch.float32, got torch.bfloat16" in at_op
        assert "module: expected DIP layers" in empty
        assert "mp_policy: expected" in helper
        assert "rank 1 numbers the layers ['1.up'] differently" in numbers
        assert "rank 1 has other priors than rank 0 at ['0.up'," in priors
        assert "same batches" in priors
        assert "outside the forward" in outside


# ---- pipelines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.slow)])
@on_ranks()
def test_a_pipeline_is_one_process(rank, world, traced):
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, SplitPoint, pipeline

    x, y = batch()
    plain, model = make_model(), make_model()
    if traced:
        with dip.fixed_noise(5):  # a trace keeps the key that it was made with
            pipe = pipeline(model, mb_args=(x[:4],), split_spec={"1": SplitPoint.BEGINNING})
        stage = pipe.build_stage(rank, torch.device("cpu"))
        held = pipe.get_stage_module(rank)
    else:
        held = model[:1] if rank == 0 else model[1:]  # under their own names
        stage = PipelineStage(held, rank, world, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=F.mse_loss)
    with dip.fixed_noise(5):
        losses = []
        schedule.step(x) if rank == 0 else schedule.step(target=y, losses=losses)
        for part in (slice(0, 4), slice(4, 8)):  # each microbatch starts at row 0
            (F.mse_loss(plain(x[part]), y[part]) / 2).backward()
    want, got = gradients(plain), gradients(held)
    assert got
    torch.testing.assert_close(got, {n: want[n] for n in got}, rtol=1e-4, atol=1e-5)
    if traced:
        return
    # seeds drawn afresh for each microbatch
    torch.manual_seed(rank)
    held.zero_grad()
    schedule.step(x) if rank == 0 else schedule.step(target=y, losses=[])
    assert all(g.any() for g in gradients(held).values())
