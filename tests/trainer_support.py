"""Tiny models and data for the tests of trainers and adapters."""

import pytest
import torch
from torch import nn

import dipkernels as dip

X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 4


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def llama(layers=1, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": layers}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **options}))


def vit(layers=2):
    """Of images of 8 by 8 pixels in one channel."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
    sizes |= {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.ViTConfig(num_hidden_layers=layers, **sizes)
    return transformers.ViTForImageClassification(config)


def texts(count=16):
    datasets = pytest.importorskip("datasets")
    ids = torch.randint(3, 32, (count, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


WORDS = " ".join(f"w{i}" for i in range(3, 32))


def words(text=WORDS):
    """A tokenizer of the words of a text, behind those for padding, the end and what is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter, names = pre_tokenizers.Whitespace(), dict.fromkeys(("w0", "w1", "w2"))
    names |= dict.fromkeys(word for word, _ in splitter.pre_tokenize_str(text))
    split = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="w2"))
    split.pre_tokenizer = splitter
    special = {"pad_token": "w0", "eos_token": "w1", "unk_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=split, **special)


def same(a, b, **tolerance):
    """Two models have one state, to the bit where no tolerance is given."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(a.state_dict(), b.state_dict(), **tolerance)


def is_whole(layer, x, **options):
    """Whether what the layer draws is itself on x + sigma z."""
    seed, where = torch.tensor([2, layer.number]), {"dim": layer.feature_dim}
    u = dip.functional.perturb(x, layer.log_variance, seed, log_variance=True, **where)
    with torch.no_grad():
        with dip.noise_off():
            clean, want = layer(x, **options), layer(u, **options)
        with dip.sampling_on(), dip.fixed_noise(2):
            got = layer(x, **options)
    assert (got - clean).norm() > 0.1 * clean.norm()
    return torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def learned(state):
    """The variances of `dip.variances`, without the priors, which training leaves alone."""
    return [(name, values) for name, values in state.items() if name.endswith("log_variance")]
