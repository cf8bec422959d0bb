"""TRL's trainers with DIPMixin and DIPCallback: real training of tiny models, also under PEFT's
adapters."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from trainer_support import same, texts, words
from transformers_support import (
    COMPILED,
    CONFIG,
    RUN,
    SAVING,
    SHORT,
    all_moved,
    llama,
    losses,
    noisy,
    trained,
)

import dipkernels as dip
from dipkernels.integrations.parts import step_of
from dipkernels.integrations.transformers import DIPCallback, DIPMixin, DIPTrainer, from_pretrained
from dipkernels.nn.numbering import dip_layers

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**options):
    peft = pytest.importorskip("peft")
    given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**given, **options})


def of_trl(kind, folder, config=CONFIG, *, model=None, data=None, given=None, **options):
    """A trainer of TRL with noise, an "SFT" one say: `given` goes to it, `options` to its
    arguments."""
    trl = pytest.importorskip("trl")
    trainer, of_args = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    args = of_args(folder, **{**SHORT, "bf16": False, **options})
    data = texts() if data is None else data
    given = {"args": args, "train_dataset": data, "processing_class": words(), **(given or {})}
    return type(f"DIP{kind}Trainer", (DIPMixin, trainer), {})(model or llama(), dip=config, **given)


def sft(folder, config=CONFIG, *, model=None, adapter=True, **options):
    given = {"peft_config": lora()} if adapter else {}
    return of_trl("SFT", folder, config, model=model, given=given, **options)


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
    start = dip.variances(trainer.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dipkernels.*")
        (batch, *_), plain = trained(trainer)
    assert all_moved(trainer.model, start)
    trainer.model.load_state_dict(plain)
    with dip.fixed_noise(step_of(42 * RUN, batch)):
        out = dip.trajectories(trainer.model.train(), batch["input_ids"], m=2).logits

        def cost(logits, labels):
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        want = dip.objective(out, batch["labels"], cost, trainer.model)
    assert losses(trainer)[0] == pytest.approx(want.item(), rel=1e-5)


def test_a_folder_with_an_adapter_loads_by_pefts_class_and_by_no_other(tmp_path):
    peft = pytest.importorskip("peft")
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = dip.DIPConfig(init_variance=0.01, exclude=["*.lm_head"])
    model = dip.apply(peft.get_peft_model(base, lora()), config)
    model.save_pretrained(tmp_path / "adapter")
    same(from_pretrained(peft.AutoPeftModelForCausalLM, tmp_path / "adapter"), model)
    with pytest.raises(ValueError, match=r"kind: expected a class of PEFT, .*got AutoModelForCau"):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "adapter")


@pytest.mark.slow
def test_sft_with_lora_resumes_to_the_bit_and_its_adapter_loads(tmp_path):
    peft = pytest.importorskip("peft")
    args = {**SAVING, "max_steps": 4, "per_device_train_batch_size": 4}
    whole = sft(tmp_path / "a", **args)
    whole.train()
    for given in (CONFIG, None):  # by the same config, and by the checkpoint's
        again = sft(tmp_path / "b", given, **args)
        again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
        same(again.model, whole.model)
    folder = tmp_path / "a/checkpoint-4"
    loaded = dip.load(peft.PeftModel.from_pretrained(llama(), folder), folder)
    same(loaded, whole.model)


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
        return noisy(tmp_path / where, given, model, max_steps=4, **SAVING)

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
    trainer = sft(tmp_path, dip.DIPConfig(lambda_s=0.1))
    said = "lambda_s: expected logits that the trainer's loss is made of"
    with pytest.raises(ValueError, match=said):
        trainer.train()


@pytest.mark.slow
def test_sft_over_a_converted_base_is_refused_by_the_order(tmp_path):
    ids = torch.randint(3, 32, (4, 6))
    base = dip.apply(llama(), dip.DIPConfig(exclude=["lm_head"]), [{"input_ids": ids}])
    with pytest.raises(ValueError, match=r"expected get_peft_model before dip\.apply"):
        sft(tmp_path, model=base)


def chances(logits, ids):
    """log p of each token but the first, [..., T - 1]."""
    index = ids[..., 1:].expand(*logits.shape[:-2], -1)[..., None]
    return logits[..., :-1, :].log_softmax(-1).gather(-1, index)[..., 0]


@pytest.mark.slow
def test_dpo_compares_noisy_trajectories_with_a_plain_reference(tmp_path):
    """The reference is the model itself with its adapter off; with noise it would be the policy,
    whose adapter starts at zero, and the first loss ln 2."""
    given = {"peft_config": lora()}
    trainer = of_trl("DPO", tmp_path, data=pairs(), given=given, beta=1.0, max_steps=1)
    (batch,), plain = trained(trainer)
    key = step_of(42 * RUN, batch)
    trainer.model.load_state_dict(plain)
    model, mask = trainer.model, batch.pop("completion_mask")[:, 1:]

    def scores(logits):  # [m, 2 B, T, V]: the chosen answers, then the rejected
        return (chances(logits, batch["input_ids"]) * mask).sum(-1)

    with dip.fixed_noise(key):
        policy = scores(dip.trajectories(model.train(), m=2, **batch).logits)
    ratio = policy - scores(model.eval()(**batch).logits[None])
    chosen, rejected = ratio.chunk(2, dim=1)
    want = -F.logsigmoid(chosen - rejected).mean()
    assert abs(want.item() - torch.log(torch.tensor(2.0)).item()) > 1e-3
    assert losses(trainer)[0] == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.slow
def test_a_reward_model_learns_by_the_mean_of_its_trajectories(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**llama().config.to_dict(), "num_labels": 1})
    model = transformers.LlamaForSequenceClassification(config)
    trainer = of_trl("Reward", tmp_path, model=model, data=pairs(), max_steps=1)
    (batch,), plain = trained(trainer)
    model.load_state_dict(plain)
    with dip.fixed_noise(step_of(42 * RUN, batch)):
        rewards = dip.trajectories(model.train(), m=2, **batch).logits[..., 0]
    chosen, rejected = rewards.chunk(2, dim=1)
    want = -F.logsigmoid(chosen - rejected).mean()
    assert losses(trainer)[0] == pytest.approx(want.item(), rel=1e-4)


def preferences():
    """Answers of four words to a prompt of three, every other one desired."""
    each = {"prompt": pairs()["prompt"], "completion": pairs()["chosen"]}
    return datasets.Dataset.from_dict({**each, "label": [i % 2 == 0 for i in range(8)]})


@pytest.mark.slow
def test_kto_compares_noisy_trajectories_with_a_plain_reference(tmp_path):
    given = {"peft_config": lora()}
    trainer = of_trl("KTO", tmp_path, data=preferences(), given=given, beta=1.0, max_steps=1)
    (batch,), plain = trained(trainer)
    model = trainer.model
    model.load_state_dict(plain)
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    given = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    with dip.fixed_noise(step_of(42 * RUN, batch)):
        policy = (chances(dip.trajectories(model.train(), m=2, **given).logits, ids) * mask).sum(-1)
    ratio = policy - (chances(model.eval()(**given).logits, ids) * mask).sum(-1)
    # The adapter starts at zero: the KL estimate of the plain policy from the reference is 0.
    desired = torch.where(batch["label"].bool(), 1.0, -1.0)
    want = (1 - torch.sigmoid(desired * ratio)).mean()
    assert abs(want.item() - 0.5) > 1e-4
    assert losses(trainer)[0] == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.slow
def test_orpo_learns_by_the_mean_of_its_trajectories(tmp_path):
    orpo = pytest.importorskip("trl.experimental.orpo")
    rows = []

    class DIPORPOTrainer(DIPMixin, orpo.ORPOTrainer):
        def compute_loss(self, *args, **options):
            rows.append(dip.noise.contexts.row0())
            return super().compute_loss(*args, **options)

    def trainer(config, **options):
        args = orpo.ORPOConfig(tmp_path, beta=1.0, bf16=False, **{**SHORT, **options})
        given = {"args": args, "train_dataset": pairs(), "processing_class": words()}
        return DIPORPOTrainer(llama(), dip=config, **given)

    with pytest.raises(ValueError, match="train_dataset: expected batches of what the model's for"):
        trainer(CONFIG)
    config = dip.DIPConfig(init_variance=0.1)
    one = trainer(config, max_steps=1)
    (batch,), plain = trained(one)
    model = one.model.train()
    model.load_state_dict(plain)

    def both(what, filler):  # the trajectories of the chosen answers, then of the rejected
        parts = [batch[f"{kind}_{what}"] for kind in ("chosen", "rejected")]
        longest = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, longest - part.shape[1]), value=filler) for part in parts]
        return torch.cat(parts).repeat_interleave(2, 0)

    ids, mask, labels = both("input_ids", 0), both("attention_mask", 0), both("labels", -100)
    with dip.fixed_noise(step_of(42 * RUN, batch)):
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
    given = {"ref_model": llama()}
    with pytest.raises(ValueError, match="sync_ref_model: expected False"):
        of_trl("DPO", tmp_path, data=pairs(), given=given, sync_ref_model=True)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False])
def test_sft_compiled_is_sft(adapter, tmp_path):
    plain, compiled = (sft(tmp_path, adapter=adapter, **options) for options in ({}, COMPILED))
    plain.train()
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.slow
def test_grpo_samples_from_the_plain_network_and_learns_the_noisy_one(tmp_path):

    def lengths(completions, **options):
        return [float(len(each.split()) % 3) for each in completions]

    def trainer(config):
        given = {"reward_funcs": lengths, "peft_config": lora()}
        options = {"num_generations": 4, "max_completion_length": 5, "beta": 0.1}
        data = pairs().select_columns("prompt")
        return of_trl("GRPO", tmp_path, config, data=data, given=given, **options)

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
    assert all_moved(one.model, start)


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

    noisy(tmp_path, kind=OfTRL, max_steps=1).train()
    assert modes == [None, None]


@pytest.mark.slow
def test_the_callback_in_dpo_has_a_plain_reference_and_names_the_head_without_noise(tmp_path):
    trl, modes = pytest.importorskip("trl"), {True: set(), False: set()}
    given = {"processing_class": words(), "train_dataset": pairs(), "peft_config": lora()}
    given["callbacks"] = [DIPCallback(dip.DIPConfig(m=1, key=None, init_variance=0.1))]
    args = trl.DPOConfig(tmp_path, **{**SHORT, "bf16": False, "max_steps": 2})
    trainer = trl.DPOTrainer(llama(), args=args, **given)
    inner = trainer.model.get_base_model()
    own = vars(inner).get("forward")  # TRL's
    next(iter(dip_layers(trainer.model).values())).register_forward_pre_hook(
        lambda *_: modes[torch.is_grad_enabled()].add(dip.noise.contexts.MODE)
    )
    with pytest.warns(UserWarning, match="after the first step") as said:
        trainer.train()
    assert modes == {True: {None}, False: {"off"}}
    (report,) = [str(each.message) for each in said if "after the first step" in str(each.message)]
    assert "1 of 15 DIP layer(s) at fault" in report and "lm_head" in report
    assert vars(inner).get("forward") is own
