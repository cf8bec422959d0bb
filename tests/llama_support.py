"""A tiny Llama for the tests of trainers and adapters."""

import pytest
import torch


def llama(layers=1, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    config = transformers.LlamaConfig(num_hidden_layers=layers, **sizes, **heads, **options)
    return transformers.LlamaForCausalLM(config)
