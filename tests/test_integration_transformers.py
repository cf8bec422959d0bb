"""transformers' Trainer and TRL's SFTTrainer with DIPMixin, and DIPCallback: real training of tiny
models."""

import concurrent.futures
import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llama_support import llama as one_llama

import dipkernels as dip
from dipkernels.config import CONFIG_FILE, VARIANCES_FILE
from dipkernels.nn.numbering import dip_layers
from dipkernels.noise import contexts

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
from dipkernels.integrations.transformers import (  # noqa: E402
    DIPCallback,
    DIPMixin,
    DIPTrainer,
    _plain_without_gradients,
    from_pretrained,
)

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
RUN = 2**32  # keys between the runs of two seeds, as docs/guides/trainers.md says


# ---- what is trained -----------------------------------------------------------------------------


def vit(dropout=0.0):
    torch.manual_seed(0)
    sizes = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
    }
    depth = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_labels": 3,
        "hidden_dropout_prob": dropout,
    }
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **depth))


def images(count=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    return [{"pixel_values": x[i], "labels": i % 3} for i in range(count)]


llama = functools.partial(one_llama, layers=2)


def texts(count=16):
    ids = torch.randint(3, 32, (count, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(folder, **options):
    quiet = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    given = {
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
    }
    return transformers.TrainingArguments(folder, **{**quiet, **given, **options})


class Seen(DIPTrainer):
    """Keeps the batches that it trained on."""

    def training_step(self, model, inputs, *args, **options):
        self.__dict__.setdefault("batches", []).append({k: v.clone() for k, v in inputs.items()})
        return super().training_step(model, inputs, *args, **options)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same(a, b, **tolerance):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


CONFIG = dip.DIPConfig(ratio=0.5)


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
    args = arguments(
        tmp_path,
        label_smoothing_factor=smoothing,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        seed=3,
    )
    trainer = Seen(vit(), args, train_dataset=images(), dip=config)
    start = dip.variances(trainer.model)
    trainer.train()
    model = dip.convert(vit())
    dip.load_variances(model, start)
    optimizer = torch.optim.AdamW(
        trainer.optimizer.param_groups[:0] or dip.param_groups(model, 1e-2, weight_decay=0.1)
    )
    for step, batch in enumerate(trainer.batches):
        with dip.fixed_noise(3 * RUN + step):
            out = dip.trajectories(model.train(), batch["pixel_values"], m=config.m).logits
            cost = lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=smoothing)  # noqa: E731
            loss = dip.objective(
                out, batch["labels"], cost, model, kl=config.kl, lambda_s=config.lambda_s
            )
        assert losses(trainer)[step] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, want in dip.variances(model).items():
        torch.testing.assert_close(dip.variances(trainer.model)[name], want, rtol=1e-4, atol=1e-4)
    assert not any(
        torch.equal(v, start[n]) for n, v in dip.variances(model).items() if "variance.log_var" in n
    )


def test_variances_have_a_group_of_their_own_without_decay_at_ten_times_the_rate(tmp_path):
    trainer = DIPTrainer(vit(), arguments(tmp_path), train_dataset=images(), dip=CONFIG)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decays the log_variance")
        trainer.train()
    learning = {id(layer.log_variance) for layer in dip_layers(trainer.model).values()}
    groups = [g for g in trainer.optimizer.param_groups if learning & {id(p) for p in g["params"]}]
    assert len(groups) == 1 and {id(p) for p in groups[0]["params"]} == learning
    assert groups[0]["weight_decay"] == 0 and groups[0]["initial_lr"] == pytest.approx(1e-1)
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {0.0, 0.1}
    assert dip.check(
        trainer.model,
        {k: torch.stack([torch.as_tensor(i[k]) for i in images(4)]) for k in images(1)[0]},
    )


@pytest.mark.parametrize(
    "make, data, smoothing", [(vit, images, 0.2), (llama, texts, 0.0), (llama, texts, 0.2)]
)
def test_accumulated_gradients_are_those_of_the_big_batch(make, data, smoothing, tmp_path):
    config = dip.DIPConfig(ratio=0.5, lambda_s=0.1)
    args = {
        "label_smoothing_factor": smoothing,
        "max_grad_norm": 0,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    big = DIPTrainer(make(), arguments(tmp_path, **args), train_dataset=data(), dip=config)
    args |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    small = DIPTrainer(
        make(),
        arguments(tmp_path, **args),
        train_dataset=data(),
        dip=config,
        calibration_batches=16,
    )
    dip.load_variances(small.model, dip.variances(big.model))
    big.train()
    small.train()
    assert losses(small) == pytest.approx(losses(big), rel=1e-4)
    same(small.model, big.model, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    """Of llama: under options, below."""
    args = {
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
    }
    args |= {"per_device_train_batch_size": 2, "logging_steps": 1}
    whole = DIPTrainer(vit(), arguments(tmp_path / "a", **args), train_dataset=images(), dip=CONFIG)
    whole.train()
    folder = tmp_path / "a" / "checkpoint-2"
    assert {CONFIG_FILE, VARIANCES_FILE, "model.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    for given in (CONFIG, None):  # by the same config, and by the checkpoint's
        torch.manual_seed(99)
        again = DIPTrainer(
            vit(), arguments(tmp_path / "b", **args), train_dataset=images(), dip=given
        )
        again.train(resume_from_checkpoint=str(folder))
        assert dip.config_of(again.model) == dip.config_of(whole.model)
        assert losses(again) == losses(whole)
        same(again.model, whole.model)


@pytest.mark.parametrize("kind", ["mixin", "callback"])
def test_early_stopping_leaves_the_best_model_and_its_variances(kind, tmp_path):
    args = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 1.0,
        "weight_decay": 0.0,
    }
    args |= {"load_best_model_at_end": True, "max_steps": 6}
    stop = transformers.EarlyStoppingCallback(1)
    given = {"args": arguments(tmp_path, **args), "eval_dataset": texts()}
    if kind == "mixin":
        trainer = DIPTrainer(llama(), train_dataset=texts(), callbacks=[stop], dip=CONFIG, **given)
    else:
        own = DIPCallback(batches=[{"input_ids": torch.tensor(texts()["input_ids"])}])
        trainer = transformers.Trainer(
            llama(), train_dataset=texts(), callbacks=[own, stop], **given
        )
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step < 6
    best = from_pretrained(transformers.LlamaForCausalLM, trainer.state.best_model_checkpoint)
    same(trainer.model, best)


def test_sigma_share_and_kl_are_logged_with_the_loss(tmp_path):
    trainer = DIPTrainer(
        vit(), arguments(tmp_path, logging_steps=3), train_dataset=images(), dip=CONFIG
    )
    before = dip.metrics(trainer.model)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    after = dip.metrics(trainer.model)
    assert {n: logged[n] for n in after} == after and after["dip/sigma"] != before["dip/sigma"]
    assert any(name.startswith("dip/sigma/vit.layers") for name in logged)


@pytest.mark.parametrize("average", ["probs", "logits"])
def test_predictions_are_means_of_k_noisy_passes_where_the_config_says_so(average, tmp_path):
    config = dip.DIPConfig(ratio=1.0, k=64, average=average)
    trainer = DIPTrainer(
        vit(),
        arguments(tmp_path, per_device_eval_batch_size=32),
        train_dataset=images(),
        dip=config,
    )
    modes = []
    hook = trainer.model.register_forward_hook(lambda *call: modes.append(contexts.MODE))
    found = trainer.predict(images())
    hook.remove()
    assert modes.count("on") == 64 * modes.count(None) > 0
    x = torch.stack([each["pixel_values"] for each in images()])
    want = dip.predict(trainer.model, x, k=64, average=average)
    got = torch.as_tensor(found.predictions)
    got = got.softmax(-1) if average == "probs" else got
    plain = trainer.model.eval()(x).logits
    assert (got - want).abs().max() < 0.1
    labels = torch.tensor([each["labels"] for each in images()])
    assert found.metrics["test_loss"] == pytest.approx(
        F.cross_entropy(plain, labels).item(), rel=1e-5
    )


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
    config = dip.DIPConfig(ratio=0.5, k=3)
    trainer = DIPTrainer(vit(), arguments(tmp_path), train_dataset=images(), dip=config)
    trainer.train()
    trainer.save_model(tmp_path / "out")
    plain, report = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["unexpected_keys"] and not report["missing_keys"] and not dip_layers(plain)
    x = torch.stack([each["pixel_values"] for each in images(4)])
    torch.save(x, tmp_path / "out/x.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "out")], check=True, cwd=ROOT)
    logits, predicted = torch.load(tmp_path / "out/out.pt")
    with dip.fixed_noise(1), torch.no_grad():
        assert torch.equal(trainer.model.eval()(x).logits, logits) and torch.equal(
            plain.eval()(x).logits, logits
        )
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
    args, data = arguments(tmp_path), images()
    with pytest.raises(TypeError, match="dip: expected a DIPConfig, got float"):
        DIPTrainer(vit(), args, train_dataset=data, dip=5.0)
    with pytest.raises(ValueError, match="calibration_batches: expected"):
        DIPTrainer(vit(), args, train_dataset=data, dip=CONFIG, calibration_batches=0)
    for begin in (DIPTrainer.train, DIPTrainer.create_optimizer):
        with pytest.raises(ValueError, match="dip: expected a DIPConfig, or a model"):
            begin(DIPTrainer(vit(), args, train_dataset=data))
    with pytest.raises(ValueError, match="train_dataset: expected one, whose first batches"):
        DIPTrainer(vit(), args, dip=CONFIG)
    x = {"pixel_values": torch.randn(4, 1, 8, 8)}
    model = dip.apply(vit(), CONFIG, [x])
    with pytest.raises(
        ValueError,
        match=r"dip: expected the model's config or None, got one that differs in {'m': \(2, 3\)",
    ):
        DIPTrainer(model, args, train_dataset=data, dip=dip.DIPConfig(ratio=0.5, m=3))
    with pytest.raises(ValueError, match="model: expected a plain model beside dip"):
        DIPTrainer(dip.convert(vit()), args, train_dataset=data, dip=CONFIG)
    for optimizer, why in (
        (torch.optim.AdamW(vit().parameters()), "lacks"),
        (torch.optim.AdamW(model.parameters(), weight_decay=0.1), "decays"),
    ):
        with pytest.raises(
            ValueError, match=rf"optimizer: expected one made from dip\.param_groups.*{why} 14"
        ):
            DIPTrainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()
    optimizer = torch.optim.AdamW(dip.param_groups(model, 1e-3, weight_decay=0.1))
    DIPTrainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()


def test_replicas_that_would_share_noise_and_zero_3_are_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(
        ValueError, match=r"key: expected None under nn\.DataParallel, whose 2 replicas"
    ):
        DIPTrainer(vit(), args, train_dataset=images(), dip=CONFIG)
    DIPTrainer(vit(), args, train_dataset=images(), dip=dip.DIPConfig(key=None))
    monkeypatch.setattr(
        "dipkernels.integrations.transformers.is_deepspeed_zero3_enabled", lambda: True
    )
    with pytest.raises(ValueError, match="ZeRO up to stage 2, got stage 3"):
        DIPTrainer(vit(), arguments(tmp_path), train_dataset=images(), dip=CONFIG)


def test_a_batch_that_cannot_be_repeated_is_refused_and_m_1_takes_it(tmp_path):
    def collate(examples):
        batch = transformers.default_data_collator(examples)
        return {**batch, "interpolate_pos_encoding": torch.tensor(False)}

    for m in (2, 1):
        config = dip.DIPConfig(m=m, ratio=0.5)
        trainer = DIPTrainer(
            vit(), arguments(tmp_path), train_dataset=images(), dip=config, data_collator=collate
        )
        if m == 1:
            trainer.train()
            continue
        with pytest.raises(
            ValueError,
            match=r"m: expected 1, because .*\['interpolate_pos_encoding'\]\": \(\)",
        ):
            trainer.train()


def test_sequences_packed_into_one_row_are_refused_where_the_model_would_join_them(tmp_path):
    """transformers' flash attention looks for their starts in a batch of one row."""
    options = {"train_dataset": texts(), "data_collator": transformers.DataCollatorWithFlattening()}
    for m, kind in ((2, "flash_attention_2"), (2, "sdpa"), (1, "sdpa")):
        config = dip.DIPConfig(m=m, init_variance=1e-12, kl=0)
        trainer = DIPTrainer(llama(), arguments(tmp_path, max_steps=1), dip=config, **options)
        trainer.model.config._attn_implementation = kind
        if kind == "sdpa":
            trainer.train()
            assert losses(trainer)[0] == pytest.approx(3.5, abs=0.2)
            continue
        with pytest.raises(ValueError, match=r"m: expected 1, because position_ids pack .* got 2"):
            trainer.train()


class OwnLoss(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        return (out.loss, out) if return_outputs else out.loss


def test_a_loss_of_ones_own_goes_behind_the_mixin_and_is_refused_before_it(tmp_path):
    """Before it, the trajectories and the KL term would be gone, and nothing would say so."""

    class Behind(DIPMixin, OwnLoss):
        pass

    class Before(DIPTrainer):
        compute_loss = OwnLoss.compute_loss

    config = dip.DIPConfig(ratio=0.5, m=3, kl=1.0)
    options = {"train_dataset": images(), "dip": config}
    found = []
    for kind in (DIPTrainer, Behind):
        trainer = kind(vit(), arguments(tmp_path), **options)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match=r"compute_loss: expected DIPMixin's .*'kl': 1.0, 'm': 3"):
        Before(vit(), arguments(tmp_path), **options).train()
    options["dip"] = dip.DIPConfig(ratio=0.5, m=1, kl=0)  # which asks nothing of the loss
    Before(vit(), arguments(tmp_path), **options).train()


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
    Any(vit(), arguments(tmp_path, **small), train_dataset=images(), dip=CONFIG).train()
    assert len(rows) == len(set(rows)) == 11 * CONFIG.m


def test_another_config_on_resume_is_said(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    DIPTrainer(vit(), args, train_dataset=images(), dip=CONFIG).train()
    other = DIPTrainer(vit(), args, train_dataset=images(), dip=dip.DIPConfig(ratio=0.5, kl=1.0))
    with pytest.warns(UserWarning, match=r"trained by another config: {'kl': \(0.4, 1.0\)}"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        DIPTrainer(vit(), args, train_dataset=images(), dip=CONFIG).train(
            str(tmp_path / "checkpoint-2")
        )


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

    with pytest.warns(
        UserWarning, match=r"classifier: its variance got a gradient of zeros.*fused"
    ):
        Past(vit(), arguments(tmp_path), train_dataset=images(), dip=CONFIG).train()


def test_ctrl_c_in_a_reference_pass_leaves_the_noise_on():
    """torch calls a module's always-called hooks after an Exception, which KeyboardInterrupt is
    not."""

    class Interrupted(torch.nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model = Interrupted()
        with _plain_without_gradients(model):
            model(torch.ones(1))
    assert contexts.MODE is None and not model._forward_hooks


def test_a_run_that_starts_again_draws_the_noise_of_its_places(tmp_path):
    """As auto_find_batch_size starts it again, with smaller batches, where memory ran out."""

    class RunsOut(DIPTrainer):
        def training_step(self, model, inputs, *args, **options):
            loss = super().training_step(model, inputs, *args, **options)
            if len(inputs["labels"]) == 8:
                raise RuntimeError("CUDA out of memory.")
            return loss

    fixed = {"train_dataset": images(), "dip": dip.DIPConfig(init_variance=0.05)}
    args = arguments(tmp_path, auto_find_batch_size=True)
    found = RunsOut(vit(), args, **fixed)
    found.train()
    given = DIPTrainer(vit(), arguments(tmp_path, per_device_train_batch_size=7), **fixed)
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
    args = arguments(
        tmp_path, push_to_hub=True, hub_always_push=True, save_strategy="steps", save_steps=1
    )
    DIPTrainer(vit(), args, train_dataset=images(), dip=CONFIG).train()
    assert len(pushed) == 3
    for step, state in enumerate(pushed, 1):
        saved = dip.config.load_state(tmp_path / f"checkpoint-{step}")
        assert all(torch.equal(values, saved[name]) for name, values in state.items())


# ---- options of the trainer ----------------------------------------------------------------------

PRODUCER = dip.DIPConfig(ratio=0.5, place="producer")
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
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
    args = {"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2}
    args |= {"per_device_train_batch_size": 4}

    def trainer(where, given, **more):
        return DIPTrainer(
            llama(), arguments(tmp_path / where, **args, **more), train_dataset=texts(), dip=given
        )

    whole = trainer("a", config, save_strategy="steps", **options)
    start = dip.variances(whole.model)
    whole.train()
    moved = [n for n, v in dip.variances(whole.model).items() if not torch.equal(v, start[n])]
    assert len(moved) == len({n for n in start if n.endswith("log_variance")})
    if tolerance is not None:
        plain = trainer("b", config)
        plain.train()
        assert losses(whole) == pytest.approx(losses(plain), rel=tolerance)
    for given in (config, None):
        torch.manual_seed(9)
        again = trainer("c", given, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
        assert losses(again) == losses(whole)
        same(again.model, whole.model)


def test_a_checkpoint_in_shards_resumes_to_the_bit_and_loads(tmp_path):
    def trainer(where):
        model = vit()
        model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="10KB")
        args = arguments(tmp_path / where, save_strategy="steps", save_steps=2, max_steps=4)
        return DIPTrainer(model, args, train_dataset=images(), dip=CONFIG)

    whole, again = trainer("a"), trainer("b")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    same(again.model, whole.model)
    folder = tmp_path / "a/checkpoint-4"
    assert (folder / "model.safetensors.index.json").is_file()
    assert not (folder / "model.safetensors").exists()
    same(from_pretrained(transformers.ViTForImageClassification, folder), whole.model)


# ---- several processes ---------------------------------------------------------------------------


def check_train(rank, world, folder):
    args = arguments(
        folder, per_device_train_batch_size=4, optim="sgd", learning_rate=0.1, max_grad_norm=0
    )
    trainer = DIPTrainer(vit(), args, train_dataset=images(), dip=CONFIG)
    start = dip.variances(trainer.model)
    dip.check_ranks(trainer.model)
    trainer.train()
    trainer.save_model(folder + "/out")
    return (
        start,
        {name: value.clone() for name, value in trainer.model.state_dict().items()},
        losses(trainer),
    )


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(ranks, tmp_path):
    (start, first, logged), (other, second, _) = ranks.run(check_train, str(tmp_path))
    assert all(torch.equal(v, other[n]) for n, v in start.items())  # of one calibration
    assert all(torch.equal(v, second[n]) for n, v in first.items())
    args = arguments(tmp_path / "one", optim="sgd", learning_rate=0.1, max_grad_norm=0)
    one = DIPTrainer(vit(), args, train_dataset=images(), dip=CONFIG)
    dip.load_variances(one.model, start)
    one.train()
    assert losses(one) == pytest.approx(logged, rel=1e-4)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(value, first[name], rtol=1e-4, atol=1e-5)
    saved = from_pretrained(transformers.ViTForImageClassification, tmp_path / "out")
    assert all(torch.equal(v, first[n]) for n, v in saved.state_dict().items())


# ---- TRL and PEFT --------------------------------------------------------------------------------


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    split = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w3"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="w0", eos_token="w1"
    )


def lora(**options):
    peft = pytest.importorskip("peft")
    given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**given, **options})


def sft(folder, *, adapter=True, dip_config=CONFIG, **options):
    trl = pytest.importorskip("trl")

    class DIPSFTTrainer(DIPMixin, trl.SFTTrainer):
        pass

    args = trl.SFTConfig(folder, **{**TRL, **options})
    return DIPSFTTrainer(
        llama(),
        args=args,
        train_dataset=texts(),
        processing_class=words(),
        peft_config=lora() if adapter else None,
        dip=dip_config,
    )


TRL = {
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
    "save_strategy": "no",
    "per_device_train_batch_size": 8,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "logging_steps": 1,
}


def pairs(count=8):
    """Preferences: two answers of four words to a prompt of three."""
    ids = torch.randint(3, 32, (count, 3, 4), generator=torch.Generator().manual_seed(0)).tolist()
    named = [[" ".join(f"w{i}" for i in part) for part in example] for example in ids]
    return datasets.Dataset.from_list(
        [{"prompt": p + " ", "chosen": a, "rejected": b} for p, a, b in named]
    )


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False])
def test_sft_trains_the_objective_and_leaves_its_fused_head_alone(adapter, tmp_path):
    trainer = sft(tmp_path, adapter=adapter, lr_scheduler_type="constant", max_grad_norm=0)
    names = [name.rpartition(".")[2] for name in dip_layers(trainer.model)]
    assert len(names) == 14 and "lm_head" not in names
    assert trainer.model.get_base_model if adapter else True
    start, seen, step = dip.variances(trainer.model), [], trainer.training_step
    plain = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def training_step(model, inputs, *args, **options):
        seen.append({name: value.clone() for name, value in inputs.items()})
        return step(model, inputs, *args, **options)

    trainer.training_step = training_step
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dipkernels.*")
        trainer.train()
    assert not any(
        torch.equal(v, start[n]) for n, v in dip.variances(trainer.model).items() if "log_var" in n
    )
    logged = losses(trainer)
    trainer.model.load_state_dict(plain)
    with dip.fixed_noise(42 * RUN):
        out = dip.trajectories(trainer.model.train(), seen[0]["input_ids"], m=2).logits

        def cost(logits, labels):
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        want = dip.objective(out, seen[0]["labels"], cost, trainer.model)
    assert logged[0] == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.slow
def test_sft_with_lora_resumes_to_the_bit_and_its_adapter_loads(tmp_path):
    peft = pytest.importorskip("peft")
    args = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 4,
    }
    whole = sft(tmp_path / "a", **args)
    whole.train()
    again = sft(tmp_path / "b", **args)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    same(again.model, whole.model)
    folder = tmp_path / "a/checkpoint-4"
    loaded = dip.load(peft.PeftModel.from_pretrained(llama(), folder), folder)
    same(loaded, whole.model)
    fresh = sft(tmp_path / "c", dip_config=None, **args)  # by the checkpoint's config
    fresh.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    same(fresh.model, whole.model)


@pytest.mark.parametrize(
    "names",
    [
        *(pytest.param(n, marks=pytest.mark.slow) for n in (["mine"], ["default", "other"])),
        ["other", "default"],
    ],
)
def test_every_adapter_resumes_with_its_variances_whatever_it_is_named(names, tmp_path):
    peft = pytest.importorskip("peft")

    def trainer(where, given):
        model = peft.get_peft_model(llama(), lora(), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, lora())
        args = arguments(tmp_path / where, save_strategy="steps", save_steps=2, max_steps=4)
        return DIPTrainer(model, args, train_dataset=texts(), dip=given)

    whole = trainer("a", CONFIG)
    with torch.no_grad():
        for layer in dip_layers(whole.model).values():
            layer.log_variance.sub_(1.0)  # so that the adapters' variances differ
    whole.train()
    for given in (CONFIG, None):
        again = trainer("b", given)
        again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
        same(again.model, whole.model)
        for name in names[::-1]:
            whole.model.set_adapter(name)
            again.model.set_adapter(name)
            same(again.model, whole.model)
        whole.model.set_adapter(names[0])


@pytest.mark.slow
def test_sft_refuses_smoothness_of_logits_that_its_loss_never_makes(tmp_path):
    trainer = sft(tmp_path, dip_config=dip.DIPConfig(lambda_s=0.1))
    with pytest.raises(
        ValueError, match="lambda_s: expected logits that the trainer's loss is made of"
    ):
        trainer.train()


@pytest.mark.slow
def test_sft_over_a_converted_base_is_refused_by_the_order(tmp_path, monkeypatch):
    base = dip.apply(
        llama(), dip.DIPConfig(exclude=["lm_head"]), [{"input_ids": torch.randint(3, 32, (4, 6))}]
    )
    monkeypatch.setitem(globals(), "llama", lambda: base)
    with pytest.raises(ValueError, match=r"expected get_peft_model before dip\.apply"):
        sft(tmp_path)


def chances(logits, ids):
    """log p of each token but the first, [..., T - 1]."""
    index = ids[..., 1:].expand(*logits.shape[:-2], -1)[..., None]
    return logits[..., :-1, :].log_softmax(-1).gather(-1, index)[..., 0]


def one_step(kind, model, **options):
    """A trainer of TRL with noise after one step, its model as it began; and that step's tensors."""
    batches = []

    class Watched(DIPMixin, kind):
        def training_step(self, model, inputs, *args, **options):
            batches.append({n: v.clone() for n, v in inputs.items() if isinstance(v, torch.Tensor)})
            return super().training_step(model, inputs, *args, **options)

    trainer = Watched(model, processing_class=words(), dip=CONFIG, **options)
    plain = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    trainer.model.load_state_dict(plain)
    return trainer, batches[0]


@pytest.mark.slow
def test_dpo_compares_noisy_trajectories_with_a_plain_reference(tmp_path):
    """The reference is the model itself with its adapter off; with noise it would be the policy,
    whose adapter starts at zero, and the first loss ln 2."""
    trl = pytest.importorskip("trl")
    args = trl.DPOConfig(tmp_path, beta=1.0, **{**TRL, "max_steps": 1})
    trainer, batch = one_step(
        trl.DPOTrainer, llama(), args=args, train_dataset=pairs(), peft_config=lora()
    )
    model, mask = trainer.model, batch.pop("completion_mask")[:, 1:]

    def scores(logits):  # [m, 2 B, T, V]: the chosen answers, then the rejected
        return (chances(logits, batch["input_ids"]) * mask).sum(-1)

    with dip.fixed_noise(42 * RUN):
        policy = scores(dip.trajectories(model.train(), m=2, **batch).logits)
    ratio = policy - scores(model.eval()(**batch).logits[None])
    chosen, rejected = ratio.chunk(2, dim=1)
    want = -F.logsigmoid(chosen - rejected).mean()
    assert abs(want.item() - torch.log(torch.tensor(2.0)).item()) > 1e-3
    assert losses(trainer)[0] == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.slow
def test_a_reward_model_learns_by_the_mean_of_its_trajectories(tmp_path):
    trl = pytest.importorskip("trl")
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**{**llama().config.to_dict(), "num_labels": 1})
    )
    args = trl.RewardConfig(tmp_path, **{**TRL, "max_steps": 1})
    trainer, batch = one_step(trl.RewardTrainer, model, args=args, train_dataset=pairs())
    with dip.fixed_noise(42 * RUN):
        rewards = dip.trajectories(trainer.model.train(), m=2, **batch).logits[..., 0]
    chosen, rejected = rewards.chunk(2, dim=1)
    want = -F.logsigmoid(chosen - rejected).mean()
    assert losses(trainer)[0] == pytest.approx(want.item(), rel=1e-4)


def preferences(count=8):
    """Answers of four words to a prompt of three, every other one desired."""
    rows = pairs(count)
    return datasets.Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
            for i, row in enumerate(rows)
        ]
    )


@pytest.mark.slow
def test_kto_compares_noisy_trajectories_with_a_plain_reference(tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.KTOConfig(tmp_path, beta=1.0, **{**TRL, "max_steps": 1})
    trainer, batch = one_step(
        trl.KTOTrainer, llama(), args=args, train_dataset=preferences(), peft_config=lora()
    )
    model = trainer.model
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    given = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    with dip.fixed_noise(42 * RUN):
        policy = (chances(dip.trajectories(model.train(), m=2, **given).logits, ids) * mask).sum(-1)
    ratio = policy - (chances(model.eval()(**given).logits, ids) * mask).sum(-1)
    # The adapter starts at zero: the KL estimate of the plain policy from the reference is 0.
    desired = torch.where(batch["label"].bool(), 1.0, -1.0)
    want = (1 - torch.sigmoid(desired * ratio)).mean()
    assert abs(want.item() - 0.5) > 1e-4
    assert losses(trainer)[0] == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.slow
def test_orpo_learns_by_the_mean_of_its_trajectories(tmp_path):
    trl = pytest.importorskip("trl")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    assert trl
    seen, rows = [], []

    class DIPORPOTrainer(DIPMixin, ORPOTrainer):
        def training_step(self, model, inputs, *args, **options):
            seen.append({n: v.clone() for n, v in inputs.items() if isinstance(v, torch.Tensor)})
            return super().training_step(model, inputs, *args, **options)

        def compute_loss(self, *args, **options):
            rows.append(dip.noise.contexts.row0())
            return super().compute_loss(*args, **options)

    def trainer(config, **options):
        args = ORPOConfig(tmp_path, beta=1.0, **{**TRL, **options})
        return DIPORPOTrainer(
            llama(), args=args, train_dataset=pairs(), processing_class=words(), dip=config
        )

    with pytest.raises(
        ValueError, match=r"train_dataset: expected batches of what the model's for"
    ):
        trainer(CONFIG)
    config = dip.DIPConfig(init_variance=0.1)
    one = trainer(config, max_steps=1)
    plain = {name: value.clone() for name, value in one.model.state_dict().items()}
    one.train()
    model, batch = one.model.train(), seen[0]
    model.load_state_dict(plain)

    def both(what, filler):  # the trajectories of the chosen answers, then of the rejected
        parts = [batch[f"{kind}_{what}"] for kind in ("chosen", "rejected")]
        longest = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, longest - part.shape[1]), value=filler) for part in parts]
        return torch.cat(parts).repeat_interleave(2, 0)

    ids, mask, labels = both("input_ids", 0), both("attention_mask", 0), both("labels", -100)
    with dip.fixed_noise(42 * RUN):
        logits = model(input_ids=ids, attention_mask=mask).logits
    each, asked = chances(logits, ids), labels[:, 1:] != -100
    mean = (each * asked).sum(-1) / asked.sum(-1)
    chosen, rejected = mean.chunk(2)
    odds = (chosen - rejected) - ((-chosen.exp()).log1p() - (-rejected.exp()).log1p())
    read = each[: len(each) // 2][mask[: len(each) // 2, 1:].bool()]
    want = -read.mean() - F.logsigmoid(odds).mean()
    assert losses(one)[0] == pytest.approx(want.item(), rel=1e-4)
    del rows[:]
    small = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer(config, max_steps=1, **small).train()
    assert rows == [0, 16]  # two answers to each of four prompts, m times over


@pytest.mark.slow
def test_a_reference_that_follows_the_model_is_refused(tmp_path):
    """It copies parameter by parameter, of which the reference has no variances."""
    trl = pytest.importorskip("trl")

    class DIPDPOTrainer(DIPMixin, trl.DPOTrainer):
        pass

    args = trl.DPOConfig(tmp_path, sync_ref_model=True, **TRL)
    options = {"args": args, "train_dataset": pairs(), "processing_class": words()}
    with pytest.raises(ValueError, match="sync_ref_model: expected False"):
        DIPDPOTrainer(llama(), llama(), dip=CONFIG, **options)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False])
def test_sft_compiled_is_sft(adapter, tmp_path):
    plain, compiled = (sft(tmp_path, adapter=adapter, **options) for options in ({}, COMPILED))
    plain.train()
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.slow
def test_grpo_samples_from_the_plain_network_and_learns_the_noisy_one(tmp_path):
    trl = pytest.importorskip("trl")

    class DIPGRPOTrainer(DIPMixin, trl.GRPOTrainer):
        pass

    def lengths(completions, **options):
        return [float(len(each.split()) % 3) for each in completions]

    def trainer(config):
        given = {"num_generations": 4, "max_completion_length": 5, "beta": 0.1}
        return DIPGRPOTrainer(
            llama(),
            reward_funcs=lengths,
            args=trl.GRPOConfig(tmp_path, **{**TRL, **given}),
            train_dataset=pairs().select_columns("prompt"),
            processing_class=words(),
            peft_config=lora(),
            dip=config,
        )

    with pytest.raises(ValueError, match="m: expected 1, because not all tensors"):
        trainer(dip.DIPConfig(init_variance=0.1)).train()
    with pytest.raises(ValueError, match=r"train_dataset: expected batches that are mappings"):
        trainer(dip.DIPConfig(m=1))
    one = trainer(dip.DIPConfig(init_variance=0.1, m=1))
    modes = {True: set(), False: set()}
    layer = next(iter(dip_layers(one.model).values()))
    layer.register_forward_pre_hook(
        lambda *_: modes[torch.is_grad_enabled()].add(dip.noise.contexts.MODE)
    )
    start = dip.variances(one.model)
    one.train()
    assert modes == {True: {None}, False: {"off"}}
    learned = {n: v for n, v in dip.variances(one.model).items() if "log_var" in n}
    assert not any(torch.equal(values, start[name]) for name, values in learned.items())


def test_a_plain_pass_that_fails_leaves_the_noise_as_it_was(tmp_path):
    modes = []

    class OfTRL(DIPTrainer):
        __module__ = "trl.stand_in"  # by which the mixin knows TRL's

        def compute_loss(self, model, inputs, *args, **options):
            modes.append(dip.noise.contexts.MODE)
            with torch.no_grad(), pytest.raises(ValueError, match="channel"):
                model(pixel_values=torch.ones(1, 9, 8, 8))
            modes.append(dip.noise.contexts.MODE)
            return super().compute_loss(model, inputs, *args, **options)

    trainer = OfTRL(vit(), arguments(tmp_path, max_steps=1), train_dataset=images(), dip=CONFIG)
    trainer.train()
    assert modes == [None, None]


# ---- the callback --------------------------------------------------------------------------------

BATCH = {"pixel_values": torch.stack([each["pixel_values"] for each in images()])}


def test_the_callback_trains_the_objective_of_one_pass_and_saves_and_resumes(tmp_path):
    args = {
        "weight_decay": 0.0,
        "max_grad_norm": 0,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    }
    args |= {"optim": "sgd", "lr_scheduler_type": "constant"}

    config = dip.DIPConfig(m=1, key=None, ratio=1.0)

    def trainer(folder):
        batches = [{"input_ids": torch.tensor(texts()["input_ids"])}]
        callbacks = [DIPCallback(config, batches=batches)]
        return transformers.Trainer(
            llama(), arguments(folder, **args), train_dataset=texts(), callbacks=callbacks
        )

    with pytest.warns(UserWarning, match="the variances learn at the weights' learning rate"):
        whole = trainer(tmp_path / "a")
    before = dip.variances(whole.model)
    whole.train()
    assert whole.state.log_history[0].keys() >= {"dip/sigma", "dip/share", "dip/kl"}
    assert not any(
        torch.equal(v, before[n]) for n, v in dip.variances(whole.model).items() if "log_var" in n
    )
    folder = tmp_path / "a/checkpoint-2"
    assert dip.DIPConfig.load(folder) == config
    again = trainer(tmp_path / "b")
    again.train(resume_from_checkpoint=str(folder))
    same(again.model, whole.model)
    middle = from_pretrained(transformers.LlamaForCausalLM, folder)
    assert dip.variances(middle).keys() == before.keys()
    assert not torch.equal(middle.lm_head.weight, whole.model.lm_head.weight)


def test_the_callbacks_gradient_is_that_of_the_objective(tmp_path):
    args = arguments(
        tmp_path, weight_decay=0.0, max_grad_norm=0, optim="sgd", max_steps=1, learning_rate=1.0
    )
    args.lr_scheduler_type = "constant"
    trainer = transformers.Trainer(
        vit(), args, train_dataset=images(8), callbacks=[DIPCallback(batches=[BATCH])]
    )
    layers = dip_layers(trainer.model)
    with torch.no_grad():
        for layer in layers.values():
            layer.log_variance.sub_(1.0)  # away from the prior, where the KL term has no slope
    start = {name: layer.log_variance.detach().clone() for name, layer in layers.items()}
    want = torch.autograd.grad(
        dip.kl_penalty(trainer.model), [layer.log_variance for layer in layers.values()]
    )
    with dip.noise_off():  # so that the loss itself gives the variances no gradient
        trainer.train()
    for (name, layer), slope in zip(layers.items(), want):
        torch.testing.assert_close(start[name] - layer.log_variance, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: DIPCallback(dip.DIPConfig()),
            r"expected m=1, key=None, all that a callback can do, got m=2, key=0",
        ),
        (
            lambda: DIPCallback(dip.DIPConfig(lambda_s=1.0, k=4)),
            "expected m=1, lambda_s=0, k=0, key=None",
        ),
        (lambda: DIPCallback(), "batches: expected some"),
    ],
)
def test_the_callback_refuses_what_it_cannot_do(make, message, tmp_path):
    args = arguments(tmp_path, weight_decay=0.0)
    with pytest.raises(ValueError, match=message):
        transformers.Trainer(vit(), args, train_dataset=images(), callbacks=[make()])


def test_the_callback_refuses_optimisers_that_decay_or_lack_variances_and_late_additions(tmp_path):
    def trainer(model, **options):
        callbacks = [DIPCallback(batches=[BATCH])]
        return transformers.Trainer(
            model, arguments(tmp_path), train_dataset=images(), callbacks=callbacks, **options
        )

    with pytest.raises(ValueError, match=r"weight_decay: expected 0 with a DIPCallback, got 0\.1"):
        trainer(vit())
    model = vit()
    with pytest.raises(ValueError, match="lacks 14 variance"):
        trainer(model, optimizers=(torch.optim.AdamW(model.parameters()), None))
    model = dip.apply(vit(), dip.DIPConfig(m=1, key=None), [BATCH])
    trainer(
        model, optimizers=(torch.optim.AdamW(dip.param_groups(model, 1e-3, weight_decay=0.1)), None)
    ).train()
    half = arguments(tmp_path, weight_decay=0.0)
    half.fp16 = True
    with pytest.raises(ValueError, match="neither FSDP, DeepSpeed nor fp16"):
        transformers.Trainer(
            vit(), half, train_dataset=images(), callbacks=[DIPCallback(batches=[BATCH])]
        )
    late = transformers.Trainer(vit(), arguments(tmp_path), train_dataset=images())
    late.add_callback(DIPCallback(batches=[BATCH]))
    with pytest.raises(ValueError, match="got one that was added later"):
        late.train()
