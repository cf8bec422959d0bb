"""transformers' Trainer with DIPMixin and DIPCallback: real training of tiny models."""

import concurrent.futures
import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from program_support import PYTHON, printed
from trainer_support import same, texts, vit
from transformers_support import (
    BATCH,
    COMPILED,
    CONFIG,
    RUN,
    SAVING,
    SGD,
    SHORT,
    all_moved,
    arguments,
    bert,
    data_of,
    images,
    llama,
    losses,
    noisy,
    trained,
)
from warning_support import warned

import dipkernels as dip
from dipkernels.config import CONFIG_FILE, VARIANCES_FILE
from dipkernels.integrations.parts import step_of
from dipkernels.integrations.transformers import DIPCallback, DIPMixin, DIPTrainer, from_pretrained
from dipkernels.integrations.transformers.trl import plain_without_gradients
from dipkernels.nn.numbering import dip_layers
from dipkernels.noise import contexts

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


# ---- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, smoothing",
    [
        (CONFIG, 0.0),
        (dip.DIPConfig(ratio=0.5, m=3, kl=1.0, lambda_s=0.5), 0.3),
        (dip.DIPConfig(m=1), 0.3),
    ],
)
def test_the_loss_is_the_objective_written_by_hand(config, smoothing, tmp_path):
    options = {"label_smoothing_factor": smoothing, "lr_scheduler_type": "constant"}
    trainer = noisy(tmp_path, config, max_grad_norm=0, seed=3, **options)
    start = dip.variances(trainer.model)
    batches, _ = trained(trainer)
    model = dip.convert(vit())
    dip.load_variances(model, start)
    optimizer = torch.optim.AdamW(dip.param_groups(model, 1e-2, weight_decay=0.1))
    cost = functools.partial(F.cross_entropy, label_smoothing=smoothing)
    for step, batch in enumerate(batches):
        with dip.fixed_noise(step_of(3 * RUN + step, batch)):
            out = dip.trajectories(model.train(), batch["pixel_values"], m=config.m).logits
            terms = {"kl": config.kl, "lambda_s": config.lambda_s}
            loss = dip.objective(out, batch["labels"], cost, model, **terms)
        assert losses(trainer)[step] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    want = dip.variances(model)
    torch.testing.assert_close(dip.variances(trainer.model), want, rtol=1e-4, atol=1e-4)
    assert all_moved(model, start)


def test_variances_have_a_group_of_their_own_without_decay_at_ten_times_the_rate(tmp_path):
    trainer = noisy(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decays the log_variance")
        trainer.train()
    learning = {id(layer.log_variance) for layer in dip_layers(trainer.model).values()}
    groups = [g for g in trainer.optimizer.param_groups if learning & {id(p) for p in g["params"]}]
    assert len(groups) == 1 and {id(p) for p in groups[0]["params"]} == learning
    assert groups[0]["weight_decay"] == 0 and groups[0]["initial_lr"] == pytest.approx(1e-1)
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {0.0, 0.1}
    assert dip.check(trainer.model, transformers.default_data_collator(images(4)))


class OwnLoss(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        return (out.loss, out) if return_outputs else out.loss


class Behind(DIPMixin, OwnLoss):
    pass


@pytest.mark.parametrize(
    "make, smoothing, kind",
    [
        (vit, 0.2, DIPTrainer),
        (llama, 0.0, DIPTrainer),
        (llama, 0.2, DIPTrainer),
        (bert, 0.0, DIPTrainer),  # whose loss is a mean, whatever num_items_in_batch is
        (vit, 0.0, Behind),  # this one too
    ],
)
def test_accumulated_gradients_are_those_of_the_big_batch(make, smoothing, kind, tmp_path):
    config = dip.DIPConfig(ratio=0.5, lambda_s=0.1)
    options = {"label_smoothing_factor": smoothing, "kind": kind, **SGD}
    big = noisy(tmp_path, config, make(), **options)
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    small = noisy(tmp_path, config, make(), given={"calibration_batches": 16}, **options)
    dip.load_variances(small.model, dip.variances(big.model))
    big.train()
    is_a_mean = make is bert or kind is Behind
    about = warned(small.train, "num_items_in_batch")
    assert len(about) == is_a_mean and all("make it 2 times as large" in each for each in about)
    assert losses(small) == pytest.approx(losses(big), rel=1e-4)
    same(small.model, big.model, rtol=1e-4, atol=1e-5)


class WithDraw(OwnLoss):
    """A loss with a draw of its own: a diffusion's time, a mask."""

    def compute_loss(self, model, inputs, *args, **options):
        x = inputs["pixel_values"]
        return super().compute_loss(
            model, {**inputs, "pixel_values": x + torch.randn_like(x)}, *args, **options
        )


class UnderAttack(OwnLoss):
    """A loss that takes a gradient, in training alone."""

    def compute_loss(self, model, inputs, *args, **options):
        assert model.training
        x = inputs["pixel_values"].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(**{**inputs, "pixel_values": x}).loss, x)
        x = x.detach() + 0.1 * slope.sign()
        return super().compute_loss(model, {**inputs, "pixel_values": x}, *args, **options)


class Almost(OwnLoss):
    """A loss whose last bits differ from call to call, as a GPU's sums may."""

    calls = 0

    def compute_loss(self, *args, **options):
        self.calls += 1
        return super().compute_loss(*args, **options) * (1 + 1e-6 * self.calls)


class Infinite(transformers.Trainer):
    """A loss that is infinite at the first step."""

    def compute_loss(self, *args, **options):
        return super().compute_loss(*args, **options) + math.inf


class Said(OwnLoss):
    loss_is_scaled_for_ga = False


@pytest.mark.parametrize(
    "base, told",
    [(WithDraw, 1), (UnderAttack, 1), (Almost, 1), (Infinite, 0), (Said, 0)],
)
def test_what_a_loss_is_divided_by_is_found_as_in_a_step(base, told, tmp_path):
    kind = type("Behind", (DIPMixin, base), {})
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = noisy(tmp_path, kind=kind, **options)
    assert len(warned(trainer.train, "num_items_in_batch")) == told
    assert trainer.model_accepts_loss_kwargs is not bool(told)


class Sums(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(pixel_values=inputs["pixel_values"])
        loss = F.cross_entropy(out.logits, inputs["labels"], reduction="sum")
        return (loss, out) if return_outputs else loss


@pytest.mark.parametrize("m", [1, 3])
def test_a_sum_over_the_batch_is_divided_by_the_number_of_trajectories(m, tmp_path):
    config, found = dip.DIPConfig(ratio=0.5, m=m, kl=0), []
    for base in (transformers.Trainer, Sums):
        trainer = noisy(tmp_path, config, kind=type("Behind", (DIPMixin, base), {}), max_steps=1)
        told = warned(trainer.train, "is a sum over the batch")
        assert len(told) == (base is Sums and m > 1)
        found += losses(trainer)
    assert found[1] == pytest.approx(SHORT["per_device_train_batch_size"] * found[0], rel=1e-5)


class Contrast(transformers.Trainer):
    """Negatives from the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(pixel_values=inputs["pixel_values"])
        pairs = torch.arange(len(out.logits))
        loss = F.cross_entropy(out.logits @ out.logits.T, pairs)
        return (loss, out) if return_outputs else loss


class DrawnWeights(transformers.Trainer):
    """A loss of draws that are others for more examples."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(pixel_values=inputs["pixel_values"])
        losses = F.cross_entropy(out.logits, inputs["labels"], reduction="none")
        loss = (losses * 5 * torch.rand(len(losses))).mean()
        return (loss, out) if return_outputs else loss


@pytest.mark.parametrize(
    "base, m, told",
    [(Contrast, 2, 1), (Contrast, 1, 0), (DrawnWeights, 2, 0), (transformers.Trainer, 2, 0)],
)
def test_a_loss_that_compares_an_example_with_its_copies_is_named(base, m, told, tmp_path):
    config, kind = dip.DIPConfig(ratio=0.5, m=m), type("Behind", (DIPMixin, base), {})
    trainer = noisy(tmp_path, config, kind=kind, max_steps=1)
    assert len(warned(trainer.train, "seems to compare the examples of a batch")) == told


def test_an_infinite_first_loss_is_taken_for_no_sum(tmp_path):
    class Infinite(transformers.Trainer):
        def compute_loss(self, model, *args, **options):  # where the trainer asks, in eval mode
            loss = super().compute_loss(model, *args, **options)
            return loss if model.training else loss * torch.inf

    trainer = noisy(tmp_path, kind=type("Behind", (DIPMixin, Infinite), {}), max_steps=1)
    assert not warned(trainer.train, "is a sum over the batch")


def test_the_ctc_loss_of_transformers_is_found_to_be_a_sum(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    sizes |= {"conv_dim": (8,), "conv_stride": (8,), "conv_kernel": (8,), "intermediate_size": 16}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.5}
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(mask_time_length=2, **sizes))
    data = [{"input_values": torch.randn(400), "labels": torch.arange(1, 5)} for _ in range(8)]
    trainer = noisy(tmp_path, model=model, given={"train_dataset": data}, max_steps=1)
    with pytest.warns(UserWarning, match="the loss of Wav2Vec2ForCTC is a sum over the batch"):
        trainer.train()


@pytest.mark.parametrize("kind", ["mixin", "callback"])
def test_early_stopping_leaves_the_best_model_and_its_variances(kind, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    args |= {"learning_rate": 1.0, "weight_decay": 0.0, "max_steps": 6}
    args["load_best_model_at_end"] = True
    stop = transformers.EarlyStoppingCallback(1)
    given = {"eval_dataset": texts(), "callbacks": [stop]}
    if kind == "mixin":
        trainer = noisy(tmp_path, CONFIG, llama(), given=given, **args)
    else:
        own = DIPCallback(batches=[{"input_ids": torch.tensor(texts()["input_ids"])}])
        given |= {"train_dataset": texts(), "callbacks": [own, stop]}
        trainer = transformers.Trainer(llama(), arguments(tmp_path, **args), **given)
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step < 6
    best = from_pretrained(transformers.LlamaForCausalLM, trainer.state.best_model_checkpoint)
    same(trainer.model, best)


def test_calibration_leaves_the_random_state_to_the_training(tmp_path):
    """So data come in the order of a plain run's."""
    states = []
    for kind, given in ((transformers.Trainer, {}), (DIPTrainer, {"dip": CONFIG})):
        kind(vit(), arguments(tmp_path), train_dataset=images(), **given)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_sigma_share_and_kl_are_logged_with_the_loss(tmp_path):
    trainer = noisy(tmp_path, logging_steps=3)
    before = dip.metrics(trainer.model)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    after = dip.metrics(trainer.model)
    assert {n: logged[n] for n in after} == after and after["dip/sigma"] != before["dip/sigma"]
    assert any(name.startswith("dip/sigma/vit.layers") for name in logged)


@pytest.mark.parametrize("average", ["probs", "logits"])
def test_predictions_are_means_of_k_noisy_passes_where_the_config_says_so(average, tmp_path):
    config = dip.DIPConfig(ratio=1.0, k=64, average=average)
    trainer = noisy(tmp_path, config, per_device_eval_batch_size=32)
    modes = []
    hook = trainer.model.register_forward_hook(lambda *call: modes.append(contexts.MODE))
    found = trainer.predict(images())
    hook.remove()
    assert modes.count("on") == 64 * modes.count(None) > 0
    x, labels = BATCH["pixel_values"], torch.tensor([each["labels"] for each in images()])
    want = dip.predict(trainer.model, x, k=64, average=average)
    got = torch.as_tensor(found.predictions)
    got = got.softmax(-1) if average == "probs" else got
    assert (got - want).abs().max() < 0.1
    plain = F.cross_entropy(trainer.model.eval()(x).logits, labels).item()
    assert found.metrics["test_loss"] == pytest.approx(plain, rel=1e-5)


def test_predictions_of_several_outputs_or_of_tokens_are_refused_with_k(tmp_path):
    """Before, the first were the plain network's, and nothing said so."""

    class Answers(DIPTrainer):
        kind = "two"

        def compute_loss(self, model, inputs, return_outputs=False, **options):
            loss, out = super().compute_loss(model, inputs, return_outputs=True, **options)
            one = out.logits if self.kind == "two" else out.logits.argmax(-1)
            parts = [loss, one, one] if self.kind == "two" else [loss, one]
            return (loss, parts) if return_outputs else loss

    trainer = noisy(tmp_path, dip.DIPConfig(ratio=0.5, k=2), kind=Answers)
    for trainer.kind, came in (("two", "tuple|list"), ("tokens", "torch.int64")):
        with pytest.raises(ValueError, match=rf"k: expected 0 for predictions .* 2 and ({came})"):
            trainer.predict(images())


LOAD = """
import sys, torch, transformers
from dipkernels.integrations.transformers import from_pretrained
import dipkernels as dip
model = from_pretrained(transformers.AutoModelForImageClassification, sys.argv[1])
x = torch.load(sys.argv[1] + "/x.pt")
with dip.fixed_noise(1):
    torch.save((model(x).logits, dip.config_of(model).predict(model, x)), sys.argv[1] + "/out.pt")
"""


@pytest.mark.slow
def test_a_saved_folder_is_plain_for_others_and_predicts_the_same_in_a_fresh_process(tmp_path):
    config, folder = dip.DIPConfig(ratio=0.5, k=3), tmp_path / "out"
    trainer = noisy(tmp_path, config)
    trainer.train()
    trainer.save_model(folder)
    load = transformers.ViTForImageClassification.from_pretrained
    plain, report = load(folder, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"] and not dip_layers(plain)
    x = BATCH["pixel_values"][:4]
    torch.save(x, folder / "x.pt")
    printed(PYTHON, "-c", LOAD, folder)
    logits, predicted = torch.load(folder / "out.pt")
    with dip.fixed_noise(1), torch.no_grad():
        assert torch.equal(trainer.model.eval()(x).logits, logits)
        assert torch.equal(plain.eval()(x).logits, logits)
        assert torch.equal(config.predict(trainer.model, x), predicted)


def test_model_init_gives_a_converted_model_each_time(tmp_path):
    args = arguments(tmp_path, max_steps=1)
    trainer = DIPTrainer(
        args=args, model_init=lambda trial=None: vit(), train_dataset=images(), dip=CONFIG
    )
    assert len(dip_layers(trainer.model)) == 14
    first = trainer.model
    trainer.train()
    assert trainer.model is not first and dip.config_of(trainer.model) == CONFIG


def test_what_cannot_be_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="dip: expected a DIPConfig, got float"):
        noisy(tmp_path, 5.0)
    with pytest.raises(ValueError, match="calibration_batches: expected"):
        noisy(tmp_path, given={"calibration_batches": 0})
    for begin in (DIPTrainer.train, DIPTrainer.create_optimizer):
        with pytest.raises(ValueError, match="dip: expected a DIPConfig, or a model"):
            begin(noisy(tmp_path, None))
    with pytest.raises(ValueError, match="train_dataset: expected one, whose first batches"):
        noisy(tmp_path, given={"train_dataset": None})
    model = dip.apply(vit(), CONFIG, [BATCH])
    said = r"dip: expected the model's config or None, got one that differs in {'m': \(2, 3\)"
    with pytest.raises(ValueError, match=said):
        noisy(tmp_path, dip.DIPConfig(ratio=0.5, m=3), model)
    with pytest.raises(ValueError, match="model: expected a plain model beside dip"):
        noisy(tmp_path, CONFIG, dip.convert(vit()))
    for optimizer, why in (
        (torch.optim.AdamW(vit().parameters()), "lacks"),
        (torch.optim.AdamW(model.parameters(), weight_decay=0.1), "decays"),
    ):
        said = rf"optimizer: expected one made from dip\.param_groups.*{why} 14"
        with pytest.raises(ValueError, match=said):
            noisy(tmp_path, None, model, given={"optimizers": (optimizer, None)}).train()
    optimizer = torch.optim.AdamW(dip.param_groups(model, 1e-3, weight_decay=0.1))
    noisy(tmp_path, None, model, given={"optimizers": (optimizer, None)}).train()


def test_the_head_that_ligers_loss_reads_stays_plain(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda *_: None)
    for fused, count in ((False, 15), (True, 14)):
        trainer = noisy(tmp_path, CONFIG, llama(), use_liger_kernel=fused)
        assert len(dip_layers(trainer.model)) == count
        assert ("lm_head" in dip_layers(trainer.model)) is not fused
        assert ("lm_head" in trainer.dip_config.exclude) is fused


def test_replicas_that_would_share_noise_and_zero_3_are_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    args._n_gpu = 2
    said = r"key: expected None under nn\.DataParallel, whose 2 replicas"
    with pytest.raises(ValueError, match=said):
        DIPTrainer(vit(), args, train_dataset=images(), dip=CONFIG)
    DIPTrainer(vit(), args, train_dataset=images(), dip=dip.DIPConfig(key=None))
    zero_3 = "dipkernels.integrations.transformers.trainer.is_deepspeed_zero3_enabled"
    monkeypatch.setattr(zero_3, lambda: True)
    with pytest.raises(ValueError, match="ZeRO up to stage 2, got stage 3"):
        noisy(tmp_path)


def test_a_batch_that_cannot_be_repeated_is_refused_and_m_1_takes_it(tmp_path):
    def collate(examples):
        batch = transformers.default_data_collator(examples)
        return {**batch, "interpolate_pos_encoding": torch.tensor(False)}

    def train(m):
        noisy(tmp_path, dip.DIPConfig(m=m, ratio=0.5), given={"data_collator": collate}).train()

    said = r"m: expected 1, because .*\['interpolate_pos_encoding'\]\": \(\)"
    with pytest.raises(ValueError, match=said):
        train(m=2)
    train(m=1)


def test_sequences_packed_into_one_row_are_refused_where_the_model_would_join_them(tmp_path):
    """transformers' flash attention looks for their starts in a batch of one row."""

    def train(m, kind):
        config = dip.DIPConfig(m=m, init_variance=1e-12, kl=0)
        given = {"data_collator": transformers.DataCollatorWithFlattening()}
        trainer = noisy(tmp_path, config, llama(), given=given, max_steps=1)
        trainer.model.config._attn_implementation = kind
        trainer.train()
        return losses(trainer)[0]

    with pytest.raises(ValueError, match=r"m: expected 1, because position_ids pack .* got 2"):
        train(2, "flash_attention_2")
    try:
        train(1, "flash_attention_2")
    except Exception as error:  # where it is not installed
        assert "m: expected" not in str(error)
    for m in (2, 1):
        assert train(m, "sdpa") == pytest.approx(3.5, abs=0.2)


def test_a_loss_of_ones_own_goes_behind_the_mixin_and_is_refused_before_it(tmp_path):
    """Before it, the trajectories and the KL term would be gone, and nothing would say so."""

    class Before(DIPTrainer):
        compute_loss = OwnLoss.compute_loss

    config = dip.DIPConfig(ratio=0.5, m=3, kl=1.0)
    found = []
    for kind in (DIPTrainer, Behind):
        trainer = noisy(tmp_path, config, kind=kind)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match=r"compute_loss: expected DIPMixin's .*'kl': 1.0, 'm': 3"):
        noisy(tmp_path, config, kind=Before).train()
    asks_nothing_of_the_loss = dip.DIPConfig(ratio=0.5, m=1, kl=0)
    noisy(tmp_path, asks_nothing_of_the_loss, kind=Before).train()


def test_batches_of_any_size_have_noise_of_their_own(tmp_path):
    rows = []

    class Any(DIPTrainer):
        def get_train_dataloader(self):
            parts = [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9], [10]]
            loader = torch.utils.data.DataLoader(
                self.train_dataset, batch_sampler=parts, collate_fn=self.data_collator
            )
            return self.accelerator.prepare(loader)

        def compute_loss(self, model, inputs, *args, **options):
            first, count = dip.noise.contexts.row0(), self.dip_config.m * len(inputs["labels"])
            rows.extend(range(first, first + count))
            return super().compute_loss(model, inputs, *args, **options)

    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    noisy(tmp_path, kind=Any, **small).train()
    assert len(rows) == len(set(rows)) == 11 * CONFIG.m


def test_examples_of_several_lengths_have_noise_of_their_own(tmp_path):
    """Of three micro-batches of 4, two of 6 tokens and one of 4; all tokens in one dimension, as
    experts read them."""
    drawn, probe = [], dip.DIPInput(1)

    class Probing(DIPTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model, inputs, *args, **options):
            count, length = inputs["input_ids"].shape
            drawn.append(probe(torch.zeros(self.dip_config.m * count * length, 1)))
            return super().compute_loss(model, inputs, *args, **options)

    data = [texts(12)[i] for i in range(12)]
    data[8:] = [{name: ids[:4] for name, ids in each.items()} for each in data[8:]]
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 1}
    given = {"train_dataset": data}
    noisy(tmp_path, model=llama(), kind=Probing, given=given, **sizes).train()
    assert len(drawn) == 3 and len(torch.cat(drawn).unique()) == CONFIG.m * 4 * (6 + 6 + 4)


def test_another_config_on_resume_is_said(tmp_path):
    noisy(tmp_path, **SAVING).train()
    folder = tmp_path / "checkpoint-2"
    with pytest.warns(UserWarning, match=r"trained by another config: {'kl': \(0.4, 1.0\)}"):
        noisy(tmp_path, dip.DIPConfig(ratio=0.5, kl=1.0)).train(str(folder))
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        noisy(tmp_path).train(str(folder))


def test_a_layer_that_the_loss_reads_past_is_named_after_the_first_step(tmp_path):
    class PastTheHead(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **options):
            head = self.model.classifier
            self.model.classifier = torch.nn.Identity()
            hidden = model(pixel_values=inputs["pixel_values"]).logits
            self.model.classifier = head
            return F.cross_entropy(F.linear(hidden, head.weight, head.bias), inputs["labels"])

    class Past(DIPMixin, PastTheHead):
        pass

    said = r"classifier: its variance got a gradient of zeros.*fused"
    with pytest.warns(UserWarning, match=said):
        noisy(tmp_path, kind=Past).train()


def test_ctrl_c_in_a_reference_pass_leaves_the_noise_on():
    """Where the training goes on outside, too: a callback is not told of its end by an error."""

    class Interrupted(torch.nn.Sequential):
        def forward(self, x):
            assert contexts.MODE == "off"
            raise KeyboardInterrupt

    callback, of_trl = DIPCallback(), type("Args", (), {"__module__": "trl.stand_in"})
    model, other = (
        dip.apply(k(torch.nn.Linear(3, 2)), dip.DIPConfig(m=1, key=None, init_variance=1.0))
        for k in (Interrupted, torch.nn.Sequential)
    )
    callback.on_train_begin(of_trl(), None, None, model=model)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(torch.ones(1))
    assert contexts.MODE is None and other[0].noisy()
    callback.on_train_begin(of_trl(), None, None, model=model)  # of the next run
    callback.on_train_end(None, None, None)
    assert "forward" not in vars(model)


def test_predict_draws_noise_while_reference_passes_are_plain():
    model, x = dip.convert(torch.nn.Linear(3, 2)), torch.randn(4, 3)
    with plain_without_gradients(model):
        one, other = dip.predict(model, x, k=2, average=None)
        with torch.no_grad():
            assert torch.equal(model(x), model(x))
    assert not torch.equal(one, other)


def test_a_run_that_starts_again_draws_the_noise_of_its_places(tmp_path):
    """As auto_find_batch_size starts it again, with smaller batches, where memory ran out."""

    class RunsOut(DIPTrainer):
        def training_step(self, model, inputs, *args, **options):
            loss = super().training_step(model, inputs, *args, **options)
            if len(inputs["labels"]) == 8:
                raise RuntimeError("CUDA out of memory.")
            return loss

    config = dip.DIPConfig(init_variance=0.05)
    found = noisy(tmp_path, config, kind=RunsOut, auto_find_batch_size=True)
    found.train()
    given = noisy(tmp_path, config, per_device_train_batch_size=7)
    given.train()
    assert losses(found) == losses(given)


def test_what_is_pushed_while_it_trains_has_the_variances_of_its_weights(tmp_path, monkeypatch):
    pushed = []

    class Hub:
        def upload_folder(self, folder_path, **options):
            state = dip.config.load_state(folder_path)
            pushed.append({name: values.clone() for name, values in state.items()})
            done = concurrent.futures.Future()
            done.set_result(None)
            return done

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    monkeypatch.setattr(DIPTrainer, "init_hf_repo", lambda *args, **options: None)
    monkeypatch.setattr(DIPTrainer, "push_in_progress", None, raising=False)
    monkeypatch.setattr(DIPTrainer, "hub_model_id", None, raising=False)
    pushing = {"push_to_hub": True, "hub_always_push": True}
    noisy(tmp_path, save_strategy="steps", save_steps=1, **pushing).train()
    assert len(pushed) == 3
    for step, state in enumerate(pushed, 1):
        saved = dip.config.load_state(tmp_path / f"checkpoint-{step}")
        assert all(torch.equal(values, saved[name]) for name, values in state.items())


# ---- options of the trainer ----------------------------------------------------------------------

PRODUCER = dip.DIPConfig(ratio=0.5, place="producer")
OPTIONS = [
    pytest.param({"dataloader_num_workers": 2}, CONFIG, 0.0, id="workers", marks=pytest.mark.slow),
    pytest.param({"gradient_checkpointing": True}, CONFIG, 1e-5, id="checkpointing"),
    pytest.param({"bf16": True}, CONFIG, 1e-2, id="bf16", marks=pytest.mark.slow),
    pytest.param({}, PRODUCER, None, id="producer"),
    pytest.param({"bf16": True}, PRODUCER, None, id="producer-bf16", marks=pytest.mark.slow),
    pytest.param({"optim": "adafactor"}, CONFIG, None, id="adafactor", marks=pytest.mark.slow),
    pytest.param(COMPILED, CONFIG, 1e-5, id="compiled", marks=pytest.mark.slow),
    pytest.param(COMPILED, PRODUCER, None, id="producer-compiled", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options, config, tolerance", OPTIONS)
def test_under_an_option_the_losses_are_those_without_and_a_run_resumes_to_the_bit(
    options, config, tolerance, tmp_path
):
    def trainer(where, given, **more):
        args = {"max_steps": 4, "gradient_accumulation_steps": 2, **more}
        args["per_device_train_batch_size"] = 2
        return noisy(tmp_path / where, given, llama(), **args)

    whole = trainer("a", config, **SAVING, **options)
    start = dip.variances(whole.model)
    whole.train()
    assert all_moved(whole.model, start)
    folder = tmp_path / "a/checkpoint-2"  # in the middle of an epoch
    found = {path.name for path in folder.iterdir()}
    assert {CONFIG_FILE, VARIANCES_FILE, "model.safetensors"} <= found
    if tolerance is not None:
        plain = trainer("b", config)
        plain.train()
        assert losses(whole) == pytest.approx(losses(plain), rel=tolerance)
    for given in (config, None):  # by the same config, and by the checkpoint's
        torch.manual_seed(9)
        again = trainer("c", given, **options)
        again.train(resume_from_checkpoint=str(folder))
        assert dip.config_of(again.model) == config
        assert losses(again) == losses(whole)
        same(again.model, whole.model)


def sharding(folder, model):
    """A trainer whose checkpoints hold the model in shards."""
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="10KB")
    return noisy(folder, CONFIG, model, max_steps=4, **SAVING)


def test_a_checkpoint_in_shards_resumes_to_the_bit_and_loads(tmp_path):
    whole, again = (sharding(tmp_path / where, vit()) for where in "ab")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    same(again.model, whole.model)
    folder = tmp_path / "a/checkpoint-4"
    assert (folder / "model.safetensors.index.json").is_file()
    assert not (folder / "model.safetensors").exists()
    same(from_pretrained(transformers.ViTForImageClassification, folder), whole.model)


def test_shards_of_a_model_are_loaded_once_and_lack_nothing(tmp_path, monkeypatch):
    sharding(tmp_path, llama()).train()
    monkeypatch.delattr(transformers.PreTrainedModel, "from_pretrained")
    said = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda text, *_: said.append(text))
    sharding(tmp_path, llama()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not [text for text in said if "missing keys" in text]


# ---- several processes ---------------------------------------------------------------------------


def check_train(rank, world, folder, make):
    trainer = noisy(folder, CONFIG, make(), per_device_train_batch_size=4, **SGD)
    start = dip.variances(trainer.model)
    dip.check_ranks(trainer.model)
    trainer.train()
    trainer.save_model(folder + "/out")
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return start, state, losses(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("make", [vit, bert])  # a loss of items, and one that is a mean
def test_two_processes_train_as_one_with_the_whole_batch(make, ranks, tmp_path):
    (start, first, logged), (other, second, _) = ranks.run(check_train, str(tmp_path), make)
    assert all(torch.equal(v, other[n]) for n, v in start.items())  # of one calibration
    assert all(torch.equal(v, second[n]) for n, v in first.items())
    one = noisy(tmp_path / "one", CONFIG, make(), **SGD)
    dip.load_variances(one.model, start)
    one.train()
    assert losses(one) == pytest.approx(logged, rel=1e-4)
    torch.testing.assert_close(one.model.state_dict(), first, rtol=1e-4, atol=1e-5)
    saved = from_pretrained(type(one.model), tmp_path / "out")
    torch.testing.assert_close(saved.state_dict(), first, rtol=0, atol=0)


# ---- the callback --------------------------------------------------------------------------------
def called(folder, callback, model=None, *, given=None, **options):
    """transformers' own trainer with a DIPCallback."""
    model = model or vit()
    given = {"train_dataset": data_of(model), "callbacks": [callback], **(given or {})}
    return transformers.Trainer(model, arguments(folder, **options), **given)


def test_the_callback_trains_the_objective_of_one_pass_and_saves_and_resumes(tmp_path):
    args = {**SAVING, **SGD, "weight_decay": 0.0, "max_steps": 4, "learning_rate": 1e-2}
    args["lr_scheduler_type"] = "constant"
    config = dip.DIPConfig(m=1, key=None, ratio=1.0)

    def trainer(folder):
        batches = [{"input_ids": torch.tensor(texts()["input_ids"])}]
        return called(folder, DIPCallback(config, batches=batches), llama(), **args)

    with pytest.warns(UserWarning, match="the variances learn at the weights' learning rate"):
        whole = trainer(tmp_path / "a")
    before = dip.variances(whole.model)
    whole.train()
    assert whole.state.log_history[0].keys() >= {"dip/sigma", "dip/share", "dip/kl"}
    assert all_moved(whole.model, before)
    folder = tmp_path / "a/checkpoint-2"
    assert dip.DIPConfig.load(folder) == config
    again = trainer(tmp_path / "b")
    again.train(resume_from_checkpoint=str(folder))
    same(again.model, whole.model)
    middle = from_pretrained(transformers.LlamaForCausalLM, folder)
    assert dip.variances(middle).keys() == before.keys()
    assert not torch.equal(middle.lm_head.weight, whole.model.lm_head.weight)


def test_the_callback_trains_where_a_tool_keeps_the_gradients_to_itself(tmp_path):
    class Kept(transformers.Trainer):  # as LOMO, which steps inside backward
        def training_step(self, model, *args, **options):
            loss = super().training_step(model, *args, **options)
            model.zero_grad()
            return loss

    callback = DIPCallback(dip.DIPConfig(m=1, key=None, kl=0.0), batches=[BATCH])
    given = {"train_dataset": images(), "callbacks": [callback]}
    trainer = Kept(vit(), arguments(tmp_path, weight_decay=0.0, max_steps=2), **given)
    assert trainer.train().global_step == 2


def test_the_callbacks_gradient_is_that_of_the_objective(tmp_path):
    args = {**SGD, "weight_decay": 0.0, "max_steps": 1, "learning_rate": 1.0}
    args["lr_scheduler_type"] = "constant"
    trainer = called(tmp_path, DIPCallback(batches=[BATCH]), **args)
    layers = dip_layers(trainer.model)
    with torch.no_grad():
        for layer in layers.values():
            layer.log_variance.sub_(1.0)  # away from the prior, where the KL term has no slope
    start = {name: layer.log_variance.detach().clone() for name, layer in layers.items()}
    learning = [layer.log_variance for layer in layers.values()]
    want = torch.autograd.grad(dip.kl_penalty(trainer.model), learning)
    with dip.noise_off():  # so that the loss itself gives the variances no gradient
        trainer.train()
    for (name, layer), slope in zip(layers.items(), want):
        torch.testing.assert_close(start[name] - layer.log_variance, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "config, message",
    [
        (dip.DIPConfig(), "expected m=1, key=None, all that a callback can do, got m=2, key=0"),
        (dip.DIPConfig(lambda_s=1.0, k=4), "expected m=1, lambda_s=0, k=0, key=None"),
        (None, "batches: expected some"),
    ],
)
def test_the_callback_refuses_what_it_cannot_do(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        called(tmp_path, DIPCallback(config), weight_decay=0.0)
    with pytest.raises(TypeError, match=r"^config: expected a DIPConfig, got dict"):
        DIPCallback({"m": 1})


def test_the_callback_refuses_optimisers_that_decay_or_lack_variances_and_late_additions(tmp_path):
    def trainer(model=None, optimizer=None, **options):
        given = {"optimizers": (optimizer, None)}
        return called(tmp_path, DIPCallback(batches=[BATCH]), model, given=given, **options)

    with pytest.raises(ValueError, match=r"weight_decay: expected 0 with a DIPCallback, got 0\.1"):
        trainer()
    model = vit()
    with pytest.raises(ValueError, match="lacks 14 variance"):
        trainer(model, torch.optim.AdamW(model.parameters()))
    model = dip.apply(vit(), dip.DIPConfig(m=1, key=None), [BATCH])
    with pytest.raises(ValueError, match=r"^config: .* differs in {'kl': \(0\.4, 1\.0\)}"):
        called(tmp_path, DIPCallback(dip.DIPConfig(m=1, key=None, kl=1.0)), model)
    trainer(model, torch.optim.AdamW(dip.param_groups(model, 1e-3, weight_decay=0.1))).train()
    with pytest.raises(ValueError, match="neither FSDP, DeepSpeed nor fp16"):
        trainer(weight_decay=0.0, fp16=True)

    def late(model):
        trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=images())
        trainer.add_callback(callback)
        trainer.train()

    callback = DIPCallback(batches=[BATCH])
    with pytest.raises(ValueError, match="got one that was added later"):
        late(vit())
    for kl in (1.0, 2.0):
        late(dip.apply(vit(), dip.DIPConfig(m=1, key=None, kl=kl), [BATCH]))
        assert callback.config.kl == kl
    with pytest.raises(ValueError, match="config: expected m=1, all that a callback can do"):
        late(dip.apply(vit(), dip.DIPConfig(key=None, m=2), [BATCH]))
