"""convert(place="producer"): the classes of transformers, timm and torchvision that people use."""

import copy
import fnmatch
import re

import pytest
import torch
from plain_support import assert_plain
from plan_support import left, moved

import dipkernels as dip
from dipkernels.nn.numbering import dip_layers
from dipkernels.noise.contexts import fixed_noise, sampling_on

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*converted apart have one number", "ignore::FutureWarning"
)
ATTENDED = "scaled_dot_product_attention"
MODELS = {  # how many projections move, into how many modules; patterns of what is left, and why
    "vit": (11, 7, {"*patch_embeddings.projection": "own input", "*o_proj": ATTENDED}),
    "resnet": (
        6,
        5,
        {"*embedder.convolution": "own input", "classifier.1": "AdaptiveAvgPool2d is no"},
    ),
    "bert": (
        4,
        4,
        {
            "*.0.intermediate.dense": "add in .*BertOutput.* reads it",
            "*.attention.self.key": "(add|dropout) in",
        },
    ),
    "gpt2": (7, 7, {"*attn.c_proj": ATTENDED}),
    "llama": (13, 7, {"*o_proj": ATTENDED}),
    "qwen2": (13, 7, {"*o_proj": ATTENDED}),
    "gemma": (13, 7, {"*o_proj": ATTENDED}),
    "t5": (18, 10, {"*wo": "dropout in", "lm_head": "mul in the model itself"}),
    "peft-llama": (
        5,
        3,
        {
            "*down_proj": "the layer is an adapter",
            "*k_proj": "it is read by .*q_proj, .*v_proj too",
        },
    ),
    "timm-vit": (7, 7, {"*attn.proj": ATTENDED}),
    "torchvision-vit": (7, 7, {"*out_proj": "nn.MultiheadAttention makes its input"}),
    "torchvision-resnet": (
        0,
        0,
        {"layer1.0.conv2": "called in several places", "fc": "AdaptiveAvgPool2d is no"},
    ),
}


def built(name):
    """The plain model of tests/test_models.py in eval mode, its inputs, and what gives its
    logits."""
    models = pytest.importorskip("test_models")
    torch.manual_seed(0)
    build, inputs, _ = models.MODELS[name]
    return build().eval(), inputs, models.logits


@pytest.mark.parametrize("name", MODELS)
def test_models_move_what_they_can(name):
    plain, inputs, logits = built(name)
    model = dip.convert(copy.deepcopy(plain), 0.04, place="producer", batches=[inputs])
    plan, (layers, producers, reasons) = dip.summary(model).plan, MODELS[name]
    assert (sum(len(row.layers) for row in plan.moved), len(plan.moved)) == (layers, producers)
    for pattern, reason in reasons.items():
        found = [why for layer, why in left(plan).items() if fnmatch.fnmatchcase(layer, pattern)]
        assert found and all(re.search(reason, why) for why in found), (pattern, found)
    assert plan == dip.producer_plan(plain, [inputs])
    model.eval()
    with torch.no_grad():
        base = logits(model, inputs)
        assert torch.equal(base, logits(plain, inputs))
        for layer_name, layer in dip_layers(model).items():  # each one draws
            layer.training = True
            assert not torch.equal(logits(model, inputs), base), layer_name
            layer.training = False
    model.train()
    out = logits(model, inputs).float()
    (out * torch.randn_like(out)).sum().backward()
    assert all(bool(layer.log_variance.grad.any()) for layer in dip_layers(model).values())
    dip.calibrate(model, [inputs])
    assert_plain(dip.to_plain(model), plain)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "t5"])
def test_half_precision_moves_what_single_precision_does(name):
    """Also behind a norm that computes in float32 and casts what it returns."""
    plain, inputs, _ = built(name)
    plan = dip.producer_plan(plain, [inputs])
    assert dip.producer_plan(plain.bfloat16(), [inputs]).moved == plan.moved


@pytest.mark.parametrize("name", ["llama", "gemma", "t5"])
def test_weights_without_values_move_as_those_with(name):
    """On the meta device, before a model is sharded."""
    plain, inputs, _ = built(name)
    plan = dip.producer_plan(plain, [inputs])
    empty = copy.deepcopy(plain).to("meta")
    on_meta = {key: value.to("meta") for key, value in inputs.items()}
    assert dip.producer_plan(empty, [on_meta]) == plan
    dip.convert(empty, 0.04, place="producer", batches=[on_meta])
    model = empty.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    want = dip.convert(plain, 0.04, place="producer", batches=[inputs]).state_dict()
    torch.testing.assert_close(dict(model.state_dict()), dict(want), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in MODELS if "resnet" not in name])
def test_models_draw_the_noise_of_layers_that_share(name):
    plain, inputs, logits = built(name)
    at_producer = dip.convert(copy.deepcopy(plain), 0.04, place="producer", batches=[inputs]).eval()
    rows = dip.summary(at_producer).plan.moved
    share = [row.layers for row in rows if len(row.layers) > 1]
    at_layers = dip.convert(copy.deepcopy(plain), 0.04, share=share).eval()
    numbers = {
        layer: row.number
        for row in dip.summary(at_layers)
        for layer in [row.name, row.name.removesuffix(".in_proj")]
    }
    producers = {row.producer: row.layers[0] for row in rows}
    for layer_name, layer in dip_layers(at_producer).items():
        layer.number = numbers[producers.get(layer_name, layer_name)]
    # a head that reads one row of all has another row of the draw
    heads = ("vit.layernorm", "norm", "encoder.2", "classifier", "head", "heads.0")
    for model in (at_producer, at_layers):
        for layer_name, layer in dip_layers(model).items():
            if "vit" in name and layer_name in heads:
                layer.log_variance.data.fill_(-60)
    results = []
    for model in (at_producer, at_layers):
        with torch.no_grad(), sampling_on(), fixed_noise(5):
            results.append(logits(model, inputs))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "t5"])
def test_generation_checkpointing_and_variances(name):
    plain, inputs, logits = built(name)
    model = dip.convert(copy.deepcopy(plain), 0.04, place="producer", batches=[inputs])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    ids = inputs["input_ids"]
    want = plain.generate(input_ids=ids, **options)
    assert torch.equal(model.eval().generate(input_ids=ids, **options), want)
    with sampling_on(), fixed_noise(1):
        noisy = model.generate(input_ids=ids, **options)
        assert torch.equal(model.generate(input_ids=ids, **options), noisy)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        torch.manual_seed(3)
        model(**inputs, labels=ids).loss.backward()
        grads.append([layer.log_variance.grad.clone() for layer in dip_layers(model).values()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*grads))
    assert dip.trajectories(model, m=2, **inputs).logits.shape[:2] == (2, 2)
    again = dip.convert(copy.deepcopy(plain), place="producer", batches=[inputs])
    dip.load_variances(again, dip.variances(model))
    with sampling_on(), fixed_noise(2), torch.no_grad():
        assert torch.equal(logits(again.eval(), inputs), logits(model.eval(), inputs))


def test_clip_draws_behind_its_quick_gelu():
    models = pytest.importorskip("test_models")
    config = models.transformers.CLIPVisionConfig(**models.SMALL, image_size=16, patch_size=8)
    model = models.transformers.CLIPVisionModel(config)
    found = moved(dip.producer_plan(model, [{"pixel_values": models.IMAGES}]))
    behind = {name: layers for name, layers in found.items() if name.endswith("activation_fn")}
    assert len(behind) == 2 and all(layer.endswith("fc2") for (layer,) in behind.values())


def test_t5_without_dropout_moves_its_activations_too():
    models = pytest.importorskip("test_models")
    ids = models.IDS
    for kind in ("relu", "gated-gelu"):
        model = models.t5(num_layers=1, dropout_rate=0.0, feed_forward_proj=kind)
        plan = dip.producer_plan(model, [{"input_ids": ids, "decoder_input_ids": ids}])
        name = "encoder.block.0.layer.1.DenseReluDense"
        if kind == "relu":
            assert moved(plan)[f"{name}.act"] == (f"{name}.wo",)
        else:  # its forward casts on the way
            assert "whose forward is not exactly" in left(plan)[f"{name}.wo"]
        assert "the model returns it" in left(plan)["decoder.block.0.layer.1.EncDecAttention.k"]
