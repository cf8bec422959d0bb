"""What the tests of transformers' and TRL's trainers train, and how."""

import functools

import pytest
import torch
from trainer_support import llama as one_llama
from trainer_support import texts, vit

import dipkernels as dip

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
from dipkernels.integrations.transformers import DIPTrainer  # noqa: E402

RUN = 2**32  # keys between the runs of two seeds, as docs/guides/trainers.md says


def images(count=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    return [{"pixel_values": x[i], "labels": i % 3} for i in range(count)]


def bert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_labels": 3}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    return transformers.BertForSequenceClassification(config)


llama = functools.partial(one_llama, layers=2)
BATCH = {"pixel_values": torch.stack([each["pixel_values"] for each in images()])}
CONFIG = dip.DIPConfig(ratio=0.5)
SHORT = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
SHORT |= {"save_strategy": "no", "max_steps": 3, "learning_rate": 1e-2}
SHORT |= {"per_device_train_batch_size": 8}
SAVING = {"save_strategy": "steps", "save_steps": 2}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0}


def arguments(folder, **options):
    return transformers.TrainingArguments(folder, **{**SHORT, "weight_decay": 0.1, **options})


def data_of(model):
    if isinstance(model, transformers.BertForSequenceClassification):
        ids = texts()["input_ids"]
        return [{"input_ids": each, "labels": i % 3} for i, each in enumerate(ids)]
    return images() if isinstance(model, transformers.ViTForImageClassification) else texts()


def noisy(folder, config=CONFIG, model=None, *, kind=DIPTrainer, given=None, **options):
    """A trainer of a ViT on images or of a Llama on texts: `given` goes to it, `options` to its
    arguments."""
    model = model or vit()
    given = {"train_dataset": data_of(model), "dip": config, **(given or {})}
    return kind(model, arguments(folder, **options), **given)


def trained(trainer):
    """The batches of a training, and the model's state before it."""
    plain = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    batches, step = [], trainer.training_step

    def training_step(model, inputs, *args, **options):
        batches.append({n: v.clone() for n, v in inputs.items() if isinstance(v, torch.Tensor)})
        return step(model, inputs, *args, **options)

    trainer.training_step = training_step
    trainer.train()
    return batches, plain


def all_moved(model, start):
    """Whether no variance is what it was in `start`."""
    now = dip.variances(model)
    return not any(torch.equal(now[n], v) for n, v in start.items() if n.endswith("log_variance"))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
