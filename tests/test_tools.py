"""The tools that people train with, for real: what holds, what is refused, what `check` finds.
docs/models.md."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trainer_support import X, Y, is_whole, learned, llama, mlp, texts, words
from warning_support import no_warning

import dipkernels as dip
from dipkernels.nn.layer import DIPLayer

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
def test_weight_and_spectral_norm_go_on_after_conversion_or_take_noise_by_name(norm):
    after = dip.convert(mlp())
    norm(after[0])
    assert dip.check(after, X) and isinstance(after[0], DIPLayer)
    before = mlp()
    norm(before[0])
    if hasattr(before[0], "parametrizations"):
        said = r"0 \(ParametrizedLinear\): parametrised"
        with pytest.warns(dip.DIPConversionWarning, match=said):
            dip.convert(copy.deepcopy(before))
        dip.convert(before, before=["0"], batches=[X])
    else:
        dip.convert(before)
    before(X).sum().backward()
    assert dip.check(before) and dip.check(before).checked == 2


def test_calibrate_measures_what_spectral_norm_gives_in_training():
    """torch.nn.utils.spectral_norm starts at random and finds the norm in training mode alone."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))), torch.randn(64, 64)
    older, newer = copy.deepcopy(model), dip.convert(model)
    for old, new in zip(dip.convert(older), newer):
        nn.utils.spectral_norm(old)
        nn.utils.parametrizations.spectral_norm(new)
    before = {name: t.clone() for name, t in older.named_buffers() if "weight_" in name}
    for net in (older, newer):
        dip.calibrate(net, [x])
    for name, values in before.items():
        assert torch.equal(older.get_buffer(name), values)
    for a, b in zip(older, newer):
        torch.testing.assert_close(a.variance.sigma, b.variance.sigma, rtol=0.1, atol=0)


@pytest.mark.parametrize("place", ["input", "in front", "producer"])
def test_a_hook_sees_the_noised_input_of_a_plain_layer_and_not_of_a_dip_layer(place):
    model = mlp()
    if place == "in front":
        dip.convert(model, 1.0, exclude=["2"])
        model.insert(2, dip.DIPInput(32, init_variance=1.0))
    else:
        dip.convert(model, 1.0, place=place, batches=[X] if place == "producer" else None)
    layer, factors = model[-1], []
    layer.register_forward_hook(lambda _, inputs, y: factors.extend((inputs[0], y)))
    model(X)
    read, y = factors
    slopes, dweight = torch.autograd.grad(y.square().sum(), (y, layer.weight))
    assert torch.allclose(slopes.T @ read, dweight, rtol=1e-4, atol=1e-4) == (place != "input")


# ---- torchao -------------------------------------------------------------------------------------


def qat(step):
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup
    from torchao.quantization.qat import QATConfig

    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    )
    return QATConfig(config, step=step)


@pytest.mark.slow
def test_weight_only_quantisation_after_conversion_keeps_noise_and_variances():
    quantization = pytest.importorskip("torchao.quantization")
    model = dip.convert(mlp(), 0.25)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert isinstance(model[0], DIPLayer) and is_whole(model[0], X)
    F.cross_entropy(model(X), Y).backward()  # the variances train, the weights do not
    assert dip.check(model)
    assert dip.predict(model, X, k=2).shape == (32, 4)
    plain = mlp()
    quantization.quantize_(plain, quantization.Int8WeightOnlyConfig())
    assert torch.equal(plain(X), dip.to_plain(model)(X))
    # the other way round is refused, in words that hold
    with pytest.raises(ValueError, match=r"quantised: .*convert the model before quantising it"):
        dip.convert(plain)


@pytest.mark.slow
def test_integer_arithmetic_after_conversion_has_no_gradient_and_check_says_so():
    quantization = pytest.importorskip("torchao.quantization")
    model = dip.convert(mlp())
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    F.cross_entropy(model(X), Y).backward()
    assert "0" in dip.check(model, strict=False).faults


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["qat", "float8"])
def test_training_in_lower_precision_goes_before_conversion_and_check_finds_the_other_order(tool):
    pytest.importorskip("torchao")
    from torchao.float8 import convert_to_float8_training
    from torchao.quantization import quantize_

    def prepare(model):
        return (
            quantize_(model, qat("prepare")) if tool == "qat" else convert_to_float8_training(model)
        )

    swapped = dip.convert(mlp())
    prepare(swapped)
    found = dip.check(swapped, X, strict=False).faults
    assert list(found) == ["0", "2"]
    assert "was replaced since it was converted, by a torchao" in found["0"]
    dip.convert(swapped)
    assert dip.check(swapped, X)
    model = mlp()
    prepare(model)
    plain = copy.deepcopy(model)
    with no_warning(dip.DIPConversionWarning):
        dip.convert(model, 0.25)
    assert is_whole(model[0], X)
    F.cross_entropy(model(X), Y).backward()
    assert dip.check(model) and model[0].weight.grad is not None
    assert torch.equal(model.eval()(X), plain.eval()(X))
    dip.to_plain(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    if tool == "qat":
        quantize_(model, qat("convert"))
        assert model(X).shape == (32, 4)


# ---- trainers ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lightning_trains_checks_saves_and_loads(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.report = dip.convert(mlp()), None

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def on_after_backward(self):
            self.report = self.report or dip.check(self)

        def configure_optimizers(self):
            return torch.optim.AdamW(dip.param_groups(self, 1e-3, weight_decay=0.1))

    module = Module()
    before = dip.variances(module)
    quiet = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 8))
    assert module.report and module.report.checked == 2
    after = dip.variances(module)
    assert not any(torch.equal(after[n], v) for n, v in learned(before))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(after[n], v) for n, v in dip.variances(loaded).items())


def checking():
    """A callback that checks the model at each optimiser step, and keeps the report."""
    import transformers

    class Check(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **options):
            self.report = dip.check(model, strict=False)

    return Check()


QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4}


@pytest.mark.slow
def test_transformers_trainer_trains_checks_and_resumes(tmp_path):
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, save_steps=1, learning_rate=1e-2, **QUIET
    )

    def trainer(model, callbacks=()):
        optimizer = torch.optim.AdamW(dip.param_groups(model, 1e-2))
        return transformers.Trainer(
            model,
            arguments,
            train_dataset=texts(),
            callbacks=list(callbacks),
            optimizers=(optimizer, None),
        )

    model, check = dip.convert(llama()), checking()
    before = dip.variances(model)
    trainer(model, [check]).train()
    assert check.report and check.report.checked == 8
    after = dip.variances(model)
    assert not any(torch.equal(after[n], v) for n, v in learned(before))
    again = trainer(dip.convert(llama()))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(after[n], v) for n, v in dip.variances(again.model).items())


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_trls_fused_head_is_found_and_its_other_layers_train(tmp_path, adapter):
    trl = pytest.importorskip("trl")
    model, check = llama(), checking()
    if adapter:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        )
        dip.convert(model, filter=lambda module, name: hasattr(module, "lora_A"))
    else:
        dip.convert(model)
    config = trl.SFTConfig(tmp_path, max_steps=1, save_strategy="no", bf16=False, **QUIET)
    trl.SFTTrainer(
        model, args=config, train_dataset=texts(), processing_class=words(), callbacks=[check]
    ).train()
    if adapter:
        assert check.report and check.report.checked == 1
    else:
        assert list(check.report.faults) == ["lm_head"]
        assert "read without calling" in check.report.faults["lm_head"]


@pytest.mark.slow
def test_opacus_refuses_dip_layers_and_takes_fixed_noise_before_plain_ones():
    """Its per-example gradients need a layer's own input, which is not what a DIP layer
    multiplies."""
    opacus = pytest.importorskip("opacus")

    def step(model):
        optimizer = torch.optim.SGD(dip.param_groups(model, 0.1), 0.1)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 8)
        model, optimizer, data = opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=data,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        x, y = next(iter(data))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    with pytest.raises((NotImplementedError, RuntimeError)):
        step(dip.convert(mlp()))
    model = mlp()
    model.insert(0, dip.DIPInput(64).requires_grad_(False))
    before = model[1].weight.detach().clone()
    step(model)
    assert not torch.equal(model[1].weight, before)
