"""Lightning with DIPCallback: real training of tiny models."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainer_support import same

import dipkernels as dip
from dipkernels.nn.numbering import dip_layers

lightning = pytest.importorskip("lightning")
from dipkernels.integrations.lightning import DIPCallback, load_from_checkpoint  # noqa: E402
from dipkernels.integrations.parts import step_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
CONFIG = dip.DIPConfig(ratio=0.5)


class Module(lightning.LightningModule):
    def __init__(self, groups=True, answer="tensor"):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.groups, self.answer, self.losses = groups, answer, []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss if self.answer == "tensor" else {"loss": loss, "other": 1}

    def on_before_backward(self, loss):
        self.losses.append(loss.item())

    def configure_optimizers(self):
        if self.groups:
            return torch.optim.AdamW(dip.param_groups(self, 1e-2, weight_decay=0.1))
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)


QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
QUIET |= {"enable_checkpointing": False, "accelerator": "cpu"}


def trainer_of(folder, callbacks, **options):
    options = {**QUIET, "default_root_dir": folder, **options}
    return lightning.Trainer(callbacks=callbacks, **options)


def fitted(folder, module=None, callback=None, ckpt_path=None, batch=8, data=None, **options):
    module = Module() if module is None else module
    data = DataLoader(TensorDataset(X, Y), batch) if data is None else data
    trainer = trainer_of(folder, callback or DIPCallback(CONFIG), **{"max_steps": 4, **options})
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize("answer", ["tensor", "mapping"])
@pytest.mark.parametrize(
    "config",
    [CONFIG, dip.DIPConfig(m=1, kl=1.0, ratio=0.5), dip.DIPConfig(init_variance=0.1, kl=0)],
)
def test_the_loss_is_the_objective_written_by_hand(config, answer, tmp_path):
    module = Module(answer=answer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dipkernels.*")
        fitted(tmp_path, module, DIPCallback(config))
    hand = Module()
    dip.apply(hand, config, [batch for batch in X.split(8)])
    optimizer = hand.configure_optimizers()
    for step, (x, y) in enumerate(zip(X.split(8), Y.split(8))):
        with config.noise(step_of(step, [x])):
            loss = config.objective(config.trajectories(hand, x), y, F.cross_entropy, hand)
        assert module.losses[step] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same(module, hand, rtol=1e-4, atol=1e-5)
    assert "training_step" not in vars(module) and len(module.losses) == 4
    assert dip.variances(module)["net.0.variance.log_variance"].std() > 0


def test_accumulated_gradients_are_those_of_the_big_batch(tmp_path):
    callback = DIPCallback(CONFIG, [X])
    _, small = fitted(tmp_path, batch=4, accumulate_grad_batches=2, callback=callback)
    _, big = fitted(tmp_path, callback=callback)
    same(small, big, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    """From the end of an epoch: in the middle of one Lightning hands out its first batches
    again."""
    keep = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    options = {"enable_checkpointing": True, "max_steps": -1, "max_epochs": 3}
    _, whole = fitted(tmp_path, callback=[DIPCallback(CONFIG), keep], **options)
    _, again = fitted(tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt", **options)
    assert len(whole.losses) == 12 and again.losses == whole.losses[4:]
    same(again, whole)
    other = DIPCallback(dip.DIPConfig(ratio=0.5, kl=1.0))
    with pytest.warns(UserWarning, match=r"trained by another config: {'kl': \(0.4, 1.0\)}"):
        fitted(tmp_path, callback=other, ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_checkpoint_loads_in_a_new_module_with_its_config(tmp_path):
    trainer, module = fitted(tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(Module, tmp_path / "a.ckpt")
    same(loaded, module)
    assert dip.config_of(loaded) == CONFIG and not loaded.training
    plain = lightning.Trainer(logger=False, accelerator="cpu", max_steps=0)
    plain.fit(Module(), DataLoader(TensorDataset(X, Y), 8))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="path: expected a checkpoint of a DIPCallback"):
        load_from_checkpoint(Module, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="ckpt_path: expected a checkpoint of a DIPCallback"):
        fitted(tmp_path, ckpt_path=tmp_path / "plain.ckpt")


def test_a_checkpoint_of_weights_alone_has_the_config_too(tmp_path):
    """Lightning writes it without asking the callbacks."""
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "w", save_weights_only=True)
    _, module = fitted(tmp_path, None, [DIPCallback(CONFIG), saving], enable_checkpointing=True)
    again = load_from_checkpoint(Module, tmp_path / "w.ckpt")
    same(again, module)
    assert dip.config_of(again) == CONFIG and "on_save_checkpoint" not in vars(module)


def test_a_layer_that_the_loss_reads_past_is_named_after_the_first_step(tmp_path):
    class Past(Module):
        def training_step(self, batch):
            head = self.net[2]
            return F.cross_entropy(F.linear(self.net[:2](batch[0]), head.weight), batch[1])

    with pytest.warns(UserWarning, match=r"(?s)after the first step .*net\.2: its variance got"):
        fitted(tmp_path, Past())


def test_several_loaders_are_refused_for_calibration_and_trained_with_batches(tmp_path):
    class Pair(Module):
        def training_step(self, batch):
            return sum(F.cross_entropy(self(x), y) for x, y in batch.values())

    def train(callback):
        loader = DataLoader(TensorDataset(X, Y), 8)
        return fitted(tmp_path, Pair(), callback, data={"a": loader, "b": loader})

    with pytest.raises(ValueError, match=r"batches: expected some, .* are 2 loaders"):
        train(DIPCallback(CONFIG))
    assert len(train(DIPCallback(CONFIG, batches=[X]))[1].losses) == 4


def test_sigma_is_logged_by_the_trainers_logger(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = lightning.pytorch.loggers.TensorBoardLogger(tmp_path)
    _, module = fitted(tmp_path, logger=logger, log_every_n_steps=2)
    events = EventAccumulator(logger.log_dir).Reload()
    assert {"dip/sigma", "dip/share", "dip/kl", "dip/sigma/net"} <= set(events.Tags()["scalars"])
    want = dip.metrics(module)["dip/sigma"]
    assert events.Scalars("dip/sigma")[-1].value == pytest.approx(want, rel=1e-6)


class NoForward(Module):
    forward = lightning.LightningModule.forward

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


SMOOTH, AVERAGING = dip.DIPConfig(lambda_s=0.1), dip.DIPConfig(k=4)


@pytest.mark.parametrize(
    "make, config, message",
    [
        (Module, SMOOTH, "config: expected lambda_s=0 and k=0"),
        (Module, AVERAGING, "config: expected lambda_s=0 and k=0"),
        (Module, None, "config: expected a DIPConfig, or a module"),
        (Manual, CONFIG, "expected automatic optimisation"),
        (NoForward, CONFIG, "batches: expected some, because the module has no forward"),
        (
            lambda: Module(groups=False),
            CONFIG,
            r"optimizer: .*decays 2 variance.*configure_optimizers",
        ),
        (lambda: dip.convert(Module()), CONFIG, "expected a plain model beside config"),
    ],
)
def test_what_it_cannot_do_is_refused(make, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, make(), DIPCallback(config))


def test_strategies_that_shard_are_refused(tmp_path):
    class FSDPStrategy(lightning.pytorch.strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(ValueError, match="strategy: expected one process or DDP, got FSDPStrategy"):
        fitted(tmp_path, strategy=FSDPStrategy())


def test_a_plain_module_that_other_processes_would_train_is_refused(tmp_path):
    """Lightning gives the caller's module the parameters that it has itself: no variances."""
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    class Launcher(_MultiProcessingLauncher):
        def launch(self, function, *args, trainer=None, **options):
            return function(*args, **options)

    class Spawning(lightning.pytorch.strategies.SingleDeviceStrategy):
        launcher = property(Launcher)

    with pytest.raises(ValueError, match=r"pl_module: expected one that dip\.apply has converted"):
        fitted(tmp_path, strategy=Spawning())
    module = dip.apply(Module(), CONFIG, [X])
    start = dip.variances(module)
    fitted(tmp_path, module, DIPCallback(), strategy=Spawning())
    moved = dip.variances(module)
    assert not torch.equal(
        moved["net.0.variance.log_variance"], start["net.0.variance.log_variance"]
    )


def test_a_module_that_was_applied_before_needs_no_config(tmp_path):
    module = NoForward()
    dip.apply(module.net, CONFIG, [X])
    _, module = fitted(tmp_path, module, DIPCallback())
    assert len(dip_layers(module)) == 2 and dip.config_of(module) == CONFIG
    other = Module()
    dip.apply(other.net, CONFIG, [X])
    with pytest.raises(ValueError, match=r"got one that differs in {'m': \(2, 4\)"):
        fitted(tmp_path, other, DIPCallback(dip.DIPConfig(ratio=0.5, m=4)))


def test_the_noise_of_a_step_ends_with_it_a_failed_one_too(tmp_path):
    layer, drawn = dip.convert(nn.Linear(8, 8)), []

    class Drawing(Module):
        def on_train_batch_end(self, *args):
            drawn.append((layer(X), layer(X)))

    class Failing(Module):
        def training_step(self, batch):
            raise KeyError("no")

    fitted(tmp_path, Drawing())
    with pytest.raises(KeyError):
        fitted(tmp_path, Failing())
    assert len(drawn) == 4
    assert not any(torch.equal(a, b) for a, b in [*drawn, (layer(X), layer(X))])


def test_a_checkpoint_is_tested_in_a_new_module_by_a_new_trainer(tmp_path):
    class Tested(Module):
        def test_step(self, batch):
            self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    trainer, module = fitted(tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh, data = trainer_of(tmp_path, DIPCallback(CONFIG)), DataLoader(TensorDataset(X, Y), 32)
    (found,) = fresh.test(Tested(), data, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    want = F.cross_entropy(module.eval()(X), Y).item()
    assert found["loss"] == pytest.approx(want, rel=1e-5)
    plain = Tested()
    fresh.test(plain, data, verbose=False)
    assert not dip_layers(plain)  # so that it is calibrated where it is trained afterwards


def test_a_callback_that_is_used_again_draws_the_same_noise(tmp_path):
    callback = DIPCallback(CONFIG, [X])
    first, second = (fitted(tmp_path, callback=callback, max_steps=1)[1] for _ in range(2))
    assert first.losses == second.losses


def test_variances_that_a_parametrisation_bounds_are_calibrated(tmp_path):
    class Least(torch.nn.Module):
        def forward(self, values):
            return values.clamp(min=-4.0)

        def right_inverse(self, values):
            return values

    class Bounded(Module):
        def configure_optimizers(self):
            for part in [m for m in self.modules() if isinstance(m, dip.Variance)]:
                torch.nn.utils.parametrize.register_parametrization(part, "log_variance", Least())
            return super().configure_optimizers()

    _, module = fitted(tmp_path, Bounded())
    priors = [m.log_prior for m in module.modules() if isinstance(m, dip.Variance)]
    assert priors and all((prior.exp() - 0.01).abs().min() > 1e-3 for prior in priors)


@pytest.mark.parametrize("interrupted_by", ["a tuner", "an error"])
def test_a_module_that_another_fit_has_converted_is_calibrated_all_the_same(
    interrupted_by, tmp_path
):
    class Tuned(Module):
        lr = 1e-2

        def validation_step(self, batch):
            raise ArithmeticError

    module = Tuned()
    loader = DataLoader(TensorDataset(X, Y), 8)
    trainer = trainer_of(tmp_path, DIPCallback(CONFIG))
    if interrupted_by == "a tuner":  # trains, then loads what it wrote before
        lightning.pytorch.tuner.Tuner(trainer).lr_find(module, loader, num_training=4)
    else:
        with pytest.raises(ArithmeticError):
            trainer.fit(module, loader, loader)  # in the sanity check, before training starts
        module.train()  # which Lightning leaves in eval mode then
    assert module.net[0].variance.log_prior[0] == pytest.approx(math.log(0.01))
    module.losses.clear()
    fitted(tmp_path, module)  # by another callback
    same(module, fitted(tmp_path)[1])


def test_callbacks_that_copy_the_module_come_after_the_conversion(tmp_path):
    averaging = lightning.pytorch.callbacks.StochasticWeightAveraging(1e-2)
    with pytest.raises(ValueError, match="got it behind StochasticWeightAveraging"):
        fitted(tmp_path, callback=[averaging, DIPCallback(CONFIG)])
    fitted(tmp_path, callback=[DIPCallback(CONFIG), averaging], max_epochs=2, max_steps=-1)


def test_half_precision_calibrates_in_it(tmp_path):
    _, module = fitted(tmp_path, precision="bf16-true")
    assert module.net[0].weight.dtype is torch.bfloat16
    assert module.net[0].log_variance.dtype is torch.float32
    assert module.net[0].variance.log_prior.std() == 0 and len(module.losses) == 4


def test_layers_that_configure_model_makes_are_converted(tmp_path):
    class Late(Module):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    assert len(dip_layers(fitted(tmp_path, Late())[1])) == 2


def test_a_compiled_module_trains_the_same_and_stays_compiled(tmp_path):
    module = Module()
    fitted(tmp_path, torch.compile(module, backend="eager"))
    assert module.losses == pytest.approx(fitted(tmp_path)[1].losses, rel=1e-5)
    assert "training_step" in vars(module)


def test_lists_of_a_batch_are_repeated_with_its_tensors(tmp_path):
    """A list of numbers, which nothing but the module makes a tensor of."""

    class Lists(Module):
        def training_step(self, batch):
            return F.cross_entropy(self(batch["x"]), torch.tensor(batch["labels"]))

        def forward(self, x, **options):
            return self.net(x)

    def collate(examples):
        xs, ys = zip(*examples)
        return {"x": torch.stack(xs), "labels": list(ys)}

    callback = DIPCallback(dip.DIPConfig(ratio=0.5, m=3), [X])
    lists = DataLoader(list(zip(X, Y.tolist())), 8, collate_fn=collate)
    _, module = fitted(tmp_path, Lists(), callback, data=lists)
    _, of_tensors = fitted(tmp_path, callback=callback)
    assert module.losses == pytest.approx(of_tensors.losses, rel=1e-5)
    from lightning.pytorch.utilities import CombinedLoader

    both = CombinedLoader({"x": DataLoader(X, 8), "labels": DataLoader(Y, 4)}, mode="min_size")
    with pytest.raises(ValueError, match="m: expected 1, because not all tensors"):
        fitted(tmp_path, Lists(), callback, data=both)


def check_train(rank, world, folder):
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment())
    options = {"max_steps": 2, "devices": world, "use_distributed_sampler": False}
    data = TensorDataset(X, Y)
    # rank 0 has the even examples
    sampler = torch.utils.data.DistributedSampler(data, world, rank, shuffle=False)
    loader = DataLoader(data, 8, sampler=sampler)
    trainer, module = fitted(folder, data=loader, strategy=strategy, **options)
    dip.check_ranks(module)
    return trainer.world_size, {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(ranks, tmp_path):
    (world, first), (_, second) = ranks.run(check_train, str(tmp_path))
    assert world == 2
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    # One process with the same examples in the same places.
    order = [2 * i + rank + 16 * step for step in range(2) for rank in range(2) for i in range(8)]
    data = DataLoader(TensorDataset(X[order], Y[order]), 16)
    _, module = fitted(tmp_path, None, DIPCallback(CONFIG, [X[0::2]]), data=data, max_steps=2)
    torch.testing.assert_close(module.state_dict(), first, rtol=1e-4, atol=1e-5)


def test_fabric_saves_variances_under_the_plain_models_names(tmp_path):
    def net():
        return nn.Sequential(nn.Linear(X.shape[1], 8), nn.ReLU(), nn.Linear(8, 3))

    model = dip.apply(net(), CONFIG, [X])
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    setup, _ = fabric.setup(model, torch.optim.AdamW(dip.param_groups(model, lr=1e-3)))
    assert dip.check(setup, X)
    assert dip.variances(setup).keys() == dip.variances(model).keys()
    dip.save(setup, tmp_path)
    loaded = dip.load(net(), tmp_path)
    dip.load_variances(setup, {name: v + 1 for name, v in dip.variances(loaded).items()})
    for name, value in dip.variances(model).items():
        assert torch.equal(value, dip.variances(loaded)[name] + 1)


def test_batches_of_any_size_have_noise_of_their_own(tmp_path):
    rows = []

    class Counting(Module):
        def training_step(self, batch):
            first = dip.noise.contexts.row0()
            rows.extend(range(first, first + len(batch[0])))
            return super().training_step(batch)

    parts = [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9], [10]]
    data = DataLoader(TensorDataset(X, Y), batch_sampler=parts)
    options = {"max_steps": -1, "max_epochs": 1, "accumulate_grad_batches": 4}
    fitted(tmp_path, Counting(), DIPCallback(CONFIG, [X]), data=data, **options)
    assert len(rows) == len(set(rows)) == 11 * CONFIG.m


def test_micro_batches_have_noise_of_their_own_when_the_last_is_small(tmp_path):
    """10 examples in micro-batches of 4, 4 and 2: the noise is that of the examples' places among
    10."""
    data = DataLoader(TensorDataset(X[:10], Y[:10]), 4)
    options = {"max_steps": -1, "max_epochs": 1, "accumulate_grad_batches": 3}
    _, module = fitted(tmp_path, None, DIPCallback(CONFIG, [X]), data=data, **options)
    hand = dip.apply(Module(), CONFIG, [X])
    for i, (x, y) in enumerate(zip(X[:10].split(4), Y[:10].split(4))):
        with CONFIG.noise(step_of(0, [x]), row0=4 * i * CONFIG.m):
            want = CONFIG.objective(CONFIG.trajectories(hand, x), y, F.cross_entropy, hand)
        assert module.losses[i] * 3 == pytest.approx(want.item(), rel=1e-5)
