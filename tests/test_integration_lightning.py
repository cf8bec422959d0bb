"""Lightning with DIPCallback, and accelerate: real training of tiny models."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dipkernels as dip
from dipkernels.layers import dip_layers

lightning = pytest.importorskip("lightning")
from dipkernels.integrations.lightning import DIPCallback, load_from_checkpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
CONFIG = dip.DIPConfig(ratio=0.5)


class Module(lightning.LightningModule):
    def __init__(self, groups=True, answer="tensor"):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.groups, self.answer = (
            nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)),
            groups,
            answer,
        )
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss if self.answer == "tensor" else {"loss": loss, "other": 1}

    def on_before_backward(self, loss):
        self.losses.append(loss.item())

    def configure_optimizers(self):
        if self.groups:
            return torch.optim.SGD(dip.param_groups(self, 0.1, weight_decay=0.1))
        return torch.optim.SGD(self.parameters(), 0.1, weight_decay=0.1)


def fitted(folder, module=None, callback=None, ckpt_path=None, batch=8, shuffle=False, **options):
    module = module or Module()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    given = {"max_steps": 4, "accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": False}
    trainer = lightning.Trainer(callbacks=[callback or DIPCallback(CONFIG)], **{**quiet, **given, **options})
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch, shuffle=shuffle), ckpt_path=ckpt_path)
    return trainer, module


def same(a, b, **tolerance):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("answer", ["tensor", "mapping"])
@pytest.mark.parametrize("config", [CONFIG, dip.DIPConfig(m=1, kl=1.0, ratio=0.5), dip.DIPConfig(variance=0.1, kl=0)])
def test_the_loss_is_the_objective_written_by_hand(config, answer, tmp_path):
    module = Module(answer=answer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dipkernels.*")
        fitted(tmp_path, module, DIPCallback(config))
    hand = Module()
    dip.apply(hand, config, [batch for batch in X.split(8)])
    optimizer = hand.configure_optimizers()
    for step, (x, y) in enumerate(zip(X.split(8), Y.split(8))):
        with config.noise(step):
            loss = config.objective(config.trajectories(hand, x), y, F.cross_entropy, hand)
        assert module.losses[step] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same(module, hand, rtol=1e-4, atol=1e-5)
    assert "training_step" not in vars(module) and len(module.losses) == 4
    assert dip.variances(module)["net.0.variance.log_variance"].std() > 0


def test_accumulated_gradients_are_those_of_the_big_batch(tmp_path):
    _, small = fitted(tmp_path, batch=4, accumulate_grad_batches=2, callback=DIPCallback(CONFIG, [X]))
    _, big = fitted(tmp_path, callback=DIPCallback(CONFIG, [X]))
    same(small, big, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every", [2, 3])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit_and_loads_in_a_new_module(every, tmp_path):
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=every, save_top_k=-1
    )
    options = {"shuffle": True, "max_steps": 6, "enable_checkpointing": True}
    lightning.seed_everything(1, verbose=False)
    trainer, whole = fitted(tmp_path, callback=[DIPCallback(CONFIG), checkpoint][0], **options)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    lightning.seed_everything(1, verbose=False)
    half, _ = fitted(tmp_path, **{**options, "max_steps": 4})  # an epoch
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = fitted(tmp_path, ckpt_path=tmp_path / "half.ckpt", **{**options, "max_steps": 4})[1]
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["dip_config"] == CONFIG.to_dict()
    loaded = load_from_checkpoint(Module, tmp_path / "half.ckpt")
    same(loaded, again)
    assert dip.config_of(loaded) == CONFIG and not loaded.training
    assert torch.equal(dip.predict(loaded, X, k=0), dip.predict(half.lightning_module, X, k=0))
    same(load_from_checkpoint(Module, tmp_path / "whole.ckpt"), whole)


def test_sigma_is_logged_by_the_trainers_logger(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = lightning.pytorch.loggers.TensorBoardLogger(tmp_path)
    _, module = fitted(tmp_path, logger=logger, log_every_n_steps=2)
    events = EventAccumulator(logger.log_dir).Reload()
    assert {"dip/sigma", "dip/share", "dip/kl", "dip/sigma/net"} <= set(events.Tags()["scalars"])
    assert events.Scalars("dip/sigma")[-1].value == pytest.approx(dip.metrics(module)["dip/sigma"], rel=1e-6)


class NoForward(Module):
    forward = lightning.LightningModule.forward

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    "make, callback, message",
    [
        (Module, lambda: DIPCallback(dip.DIPConfig(lambda_s=0.1)), "config: expected lambda_s=0 and k=0"),
        (Module, lambda: DIPCallback(dip.DIPConfig(k=4)), "config: expected lambda_s=0 and k=0"),
        (Module, lambda: DIPCallback(), "config: expected a DIPConfig, or a module"),
        (Manual, lambda: DIPCallback(CONFIG), "expected automatic optimisation"),
        (NoForward, lambda: DIPCallback(CONFIG), "batches: expected some, for a module without a forward"),
        (
            lambda: Module(groups=False),
            lambda: DIPCallback(CONFIG),
            r"optimizer: .*decays 2 variance.*configure_optimizers",
        ),
        (lambda: dip.convert(Module()), lambda: DIPCallback(CONFIG), "expected a plain one beside config"),
    ],
)
def test_what_it_cannot_do_is_refused(make, callback, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, make(), callback())


def test_a_module_that_was_applied_before_needs_no_config(tmp_path):
    module = NoForward()
    dip.apply(module.net, CONFIG, [X])
    _, module = fitted(tmp_path, module, DIPCallback())
    assert len(dip_layers(module)) == 2 and dip.config_of(module) == CONFIG
    other = Module()
    dip.apply(other.net, CONFIG, [X])
    with pytest.raises(ValueError, match=r"got another in {'m': \(2, 4\)"):
        fitted(tmp_path, other, DIPCallback(dip.DIPConfig(ratio=0.5, m=4)))


def test_a_failed_step_leaves_no_noise_context_behind(tmp_path):
    class Failing(Module):
        def training_step(self, batch):
            raise KeyError("no")

    with pytest.raises(KeyError):
        fitted(tmp_path, Failing())
    model = dip.convert(nn.Linear(8, 8))
    assert not torch.equal(model(X), model(X))
