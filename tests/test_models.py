"""convert on the model classes that people use: transformers, PEFT, and the structures of timm and
torchvision.

Weights are random and the models small; nothing is downloaded. timm and torchvision are stood for
by classes of their structure: timm imports torchvision, and torchvision has no build for a CPU-only
torch on the package index.
"""

import copy
import pickle
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from plain_support import assert_plain
from timing import saved_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from variance_support import Branches, trains_alike_in_shards
from warning_support import no_warning

import dipkernels as dip
from dipkernels.nn.conv import DIPConv2d
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import dip_layers
from dipkernels.noise.contexts import fixed_noise, noise_off, sampling_on

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*lm_head.*:UserWarning")

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SMALL = {**WIDTHS, "num_hidden_layers": 2}
TEXT = {**SMALL, "vocab_size": 60, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {**TEXT, **TOKENS, "num_key_value_heads": 2}


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=5)
    return transformers.ViTForImageClassification(config)


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
    config = transformers.ResNetConfig(**sizes, layer_type="bottleneck")
    return transformers.ResNetForImageClassification(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))


def gpt2():
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 60}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, **TOKENS))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def qwen2():
    config = transformers.Qwen2Config(**DECODER, tie_word_embeddings=True)
    return transformers.Qwen2ForCausalLM(config)


def gemma():
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**DECODER, head_dim=8))


def t5(**options):
    config = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4} | options
    config = transformers.T5Config(**config, vocab_size=60, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def peft_llama(**options):
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # at zero, the start, an adapter would hide whether it is noised
            nn.init.normal_(parameter, std=0.1)
    return model


# ---- timm and torchvision by their structure -----------------------------------------------------


class TimmAttention(nn.Module):
    """timm.models.vision_transformer.Attention: one linear layer for q, k, v."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(heads.transpose(1, 2).flatten(2))


class TimmBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), TimmAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 48), nn.GELU(), nn.Linear(48, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmViT(nn.Module):
    """timm.models.VisionTransformer: patch_embed.proj, cls_token, pos_embed, blocks, norm, head."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 32, 8, 8)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 32))
        self.blocks = nn.Sequential(TimmBlock(32, 4), TimmBlock(32, 4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class TorchvisionEncoderBlock(nn.Module):
    """torchvision.models.vision_transformer.EncoderBlock: nn.MultiheadAttention,
    need_weights=False."""

    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 48), nn.GELU(), nn.Dropout(0.0), nn.Linear(48, dim), nn.Dropout(0.0)
        )

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TorchvisionViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, 32, 8, 8)
        self.encoder = nn.Sequential(
            TorchvisionEncoderBlock(32, 4), TorchvisionEncoderBlock(32, 4), nn.LayerNorm(32)
        )
        self.heads = nn.Sequential(nn.Linear(32, 5))

    def forward(self, x):
        return self.heads(self.encoder(self.conv_proj(x).flatten(2).transpose(1, 2))[:, 0])


class TorchvisionBottleneck(nn.Module):
    """torchvision.models.resnet.Bottleneck, with groups and a downsample branch."""

    def __init__(self, channels, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 2, padding=1, groups=2, bias=False)
        self.bn2, self.bn3 = nn.BatchNorm2d(width), nn.BatchNorm2d(4 * width)
        self.conv3, self.relu = nn.Conv2d(width, 4 * width, 1, bias=False), nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.Conv2d(channels, 4 * width, 1, 2, bias=False), nn.BatchNorm2d(4 * width)
        )

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + self.downsample(x))


class TorchvisionResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, padding=3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(TorchvisionBottleneck(8, 4))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.avgpool(x).flatten(1))


TEXT_IN, IMAGES_IN = {"input_ids": IDS}, {"pixel_values": IMAGES}
MODELS = {  # how to make it, its inputs, how many DIP layers
    "vit": (vit, IMAGES_IN, 14),
    "resnet": (resnet, IMAGES_IN, 9),
    "bert": (bert, TEXT_IN, 14),
    "gpt2": (gpt2, TEXT_IN, 9),
    "llama": (llama, TEXT_IN, 15),
    "qwen2": (qwen2, TEXT_IN, 15),
    "gemma": (gemma, TEXT_IN, 15),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS}, 33),
    "peft-llama": (peft_llama, TEXT_IN, 15),
    "timm-vit": (TimmViT, {"x": IMAGES}, 10),
    "torchvision-vit": (TorchvisionViT, {"x": IMAGES}, 10),
    "torchvision-resnet": (TorchvisionResNet, {"x": IMAGES}, 6),
}
ALL = pytest.mark.parametrize("name", MODELS)
GENERATING = pytest.mark.parametrize(
    "name", ["gpt2", "llama", "qwen2", "gemma", "t5", "peft-llama"]
)


def make(name):
    """The plain model in eval mode, its converted copy in training mode, and the inputs."""
    torch.manual_seed(0)
    build, inputs, _ = MODELS[name]
    plain = build().eval()
    with no_warning(dip.DIPConversionWarning):
        model = dip.convert(copy.deepcopy(plain), 0.04)
    return plain, model, inputs


def logits(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


class Operations(TorchDispatchMode):
    """Lists every operation, and counts the package's."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self):
        return Counter(n.split(".")[1] for n in self.names if n.startswith("dipkernels"))


@ALL
def test_without_noise_it_is_the_plain_model_to_the_bit_and_each_listed_layer_adds_some(name):
    plain, model, inputs = make(name)
    model.eval()
    rows = dip.summary(model)
    assert [row.number for row in rows] == list(range(MODELS[name][2]))
    with torch.no_grad():
        with Operations() as of_plain:
            base = logits(plain, inputs)
        with noise_off():
            assert torch.equal(logits(model, inputs), base)
        with Operations() as of_model:
            logits(model, inputs)
        assert of_model.names == of_plain.names  # so it costs what the plain model costs
        for row in rows:
            layer = model.get_submodule(row.name)
            layer.training = True
            assert not torch.equal(logits(model, inputs), base), row.name
            layer.training = False
        assert torch.equal(logits(model, inputs), base)


@ALL
def test_every_linear_layer_and_convolution_is_converted_and_no_embedding(name):
    plain, model, _ = make(name)
    modules = dict(plain.named_modules())
    expected = {n for n, m in modules.items() if hasattr(m, "lora_A")}
    inside = tuple(f"{around}." for around in expected)
    for layer_name, module in modules.items():
        linear = isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Conv1D"
        if linear and not layer_name.startswith(inside):
            expected.add(layer_name)
        if isinstance(module, nn.MultiheadAttention):
            expected.add(f"{layer_name}.in_proj")
        if isinstance(module, nn.Embedding):
            assert type(model.get_submodule(layer_name)) is type(module)
    assert set(dip_layers(model)) == expected


@ALL
def test_every_variance_learns(name):
    _, model, inputs = make(name)
    model.train()
    out = logits(model, inputs).float()
    (out * torch.randn_like(out)).sum().backward()  # behind a norm the sum of squares is constant
    for layer_name, layer in dip_layers(model).items():
        assert layer.log_variance.requires_grad
        assert bool(layer.log_variance.grad.any()), layer_name


@ALL
def test_to_plain_gives_the_original_back(name):
    plain, model, inputs = make(name)
    with torch.no_grad():
        model.train()
        logits(model, inputs)
    assert_plain(dip.to_plain(model), plain)
    state = model.state_dict()
    for tensor_name, tensor in plain.state_dict().items():
        # training mode has moved BatchNorm's running statistics
        moved = "running" in tensor_name or "num_batches" in tensor_name
        assert moved or torch.equal(state[tensor_name], tensor)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma", "bert", "t5"])
def test_tied_heads_stay_tied(name):
    plain, model, _ = make(name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert isinstance(head, DIPLinear)
    assert head.weight is embedding.weight
    model.tie_weights()
    assert model.get_output_embeddings().weight is embedding.weight
    dip.to_plain(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@GENERATING
def test_generate_with_a_key_value_cache_works(name):
    plain, model, inputs = make(name)
    model.eval()
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, "min_new_tokens": 5}
    options["input_ids"] = inputs["input_ids"]
    expected = plain.generate(**options)
    assert torch.equal(model.generate(**options), expected)
    # with noise: each step reads keys and values that earlier steps left, noised once
    with sampling_on(), fixed_noise(1):
        noisy = model.generate(**options)
        assert torch.equal(model.generate(**options), noisy)
    assert noisy.shape == expected.shape


@pytest.mark.parametrize("name", ["vit", "gpt2", "llama"])
def test_a_saved_model_comes_back(name, tmp_path):
    plain, model, inputs = make(name)
    for layer in dip_layers(model).values():
        layer.log_variance.data.uniform_(-4, -2)
    model.save_pretrained(tmp_path)
    torch.save(dip.variances(model), tmp_path / "variances.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        served = type(plain).from_pretrained(tmp_path).eval()  # the plain network: Algorithm 3
    with torch.no_grad():
        assert torch.equal(logits(served, inputs), logits(plain, inputs))
    again = dip.convert(served)
    dip.load_variances(again, torch.load(tmp_path / "variances.pt"))
    model.train()
    again.train()
    with fixed_noise(2), torch.no_grad():
        for layer in (
            m for both in (model, again) for m in both.modules() if isinstance(m, nn.Dropout)
        ):
            layer.p = 0.0
        model.config.attention_dropout = again.config.attention_dropout = 0.0
        torch.manual_seed(0)
        got = logits(again, inputs)
        torch.manual_seed(0)
        assert torch.equal(got, logits(model, inputs))


@pytest.mark.parametrize("name", ["llama", "vit", "gpt2"])
def test_trajectories_and_predict_run_on_model_outputs(name):
    _, model, inputs = make(name)
    model.train()
    out = dip.trajectories(model, m=2, **inputs).logits
    assert out.shape[:2] == (2, 2)
    assert not torch.equal(out[0], out[1])
    probs = dip.predict(model, k=2, **inputs)
    torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))


def test_diagnostics_read_model_outputs_and_embeddings():
    plain, model, _ = make("vit")
    kept = dip.diagnostics.lipschitz(plain, IMAGES, iterations=5)
    assert torch.equal(dip.diagnostics.lipschitz(model, IMAGES, iterations=5), kept)
    assert not torch.equal(dip.diagnostics.lipschitz(model, IMAGES, k=2, iterations=5), kept)
    _, model, _ = make("llama")
    embedded = model.get_input_embeddings()(IDS).detach()
    of_embeddings = dip.diagnostics.lipschitz(
        lambda x: model.eval()(inputs_embeds=x, use_cache=False), embedded, k=2, iterations=3
    )
    assert of_embeddings.shape == (2,)
    assert bool((of_embeddings > 0).all())
    assert dip.diagnostics.output_variance(model, IDS, k=2).shape == (2, 7, 60)
    assert len(dip.diagnostics.signal_to_noise(model, [IDS])) == 15


# ---- what looks converted and is not -------------------------------------------------------------


DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
DEEPSEEK |= {"first_k_dense_replace": 0, "kv_lora_rank": 8, "q_lora_rank": 8}
DEEPSEEK |= {"qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}
MIXTURES = {  # class, what its config needs, its modules that hold weights of their own
    "Mixtral": ({"num_local_experts": 4}, ["*.experts", "*.gate"]),
    "Qwen3Moe": ({"num_experts": 4, "moe_intermediate_size": 16}, ["*.experts", "*.gate"]),
    "GptOss": ({"num_local_experts": 4, "head_dim": 8}, ["*.experts", "*.router"]),
    "DeepseekV3": (DEEPSEEK, ["*.experts", "*.gate"]),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_stacked_experts_are_named_and_noised_by_name(name):
    options, modules = MIXTURES[name]
    torch.manual_seed(0)
    sizes = {**WIDTHS, "vocab_size": 60, "num_hidden_layers": 1, "num_experts_per_tok": 2}
    sizes["num_key_value_heads"] = 4 if name == "DeepseekV3" else 2
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    plain = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    said = r"(?s)experts \(\w*Experts\): \d\d\.\d%.*before="
    with pytest.warns(dip.DIPConversionWarning, match=said):
        dip.convert(copy.deepcopy(plain))
    model = copy.deepcopy(plain)
    with no_warning(dip.DIPConversionWarning):
        dip.convert(model, 0.04, before=modules, batches=[TEXT_IN])
    assert any(n.endswith("experts") for n in dip_layers(model))
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, plain(IDS).logits)
    model.train()
    batch = {"input_ids": IDS, "labels": IDS}
    assert dip.check(model, batch)
    model(**batch).loss.backward()
    assert dip.check(model)
    dip.calibrate(model, [IDS])
    assert_plain(dip.to_plain(model), plain)


def test_a_state_space_models_layers_that_are_only_read_are_named():
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    said = r"(?s)conv1d \(Conv1d\): MambaMixer reads.*dt_proj \(Linear\)"
    with pytest.warns(dip.DIPConversionWarning, match=said):
        dip.convert(model)
    assert dip.check(model, {"input_ids": IDS, "labels": IDS})


# ---- PEFT ----------------------------------------------------------------------------------------


def is_lora(module, name):
    return hasattr(module, "lora_A")


def test_an_adapter_checkpoint_keeps_the_variances(tmp_path):
    torch.manual_seed(0)
    model = dip.convert(peft_llama(), filter=is_lora)
    for layer in dip_layers(model).values():
        layer.log_variance.data.uniform_(-4, -2)
    state = peft.get_peft_model_state_dict(model)
    assert sum(n.endswith("variance.log_variance") for n in state) == 6
    assert len(state) == 30  # two of LoRA, a variance, its prior and the pull for each of six
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    dip.convert(again, filter=is_lora)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    loaded = dip.variances(again)
    assert loaded.keys() == dip.variances(model).keys()
    assert all(torch.equal(loaded[n], value) for n, value in dip.variances(model).items())
    model.train()
    again.train()
    with fixed_noise(1):
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_lora_on_attention_is_named():
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 8)})
    attention = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["attn"]))
    said = r"attn \(MultiheadAttention\): an adapter over nn.Multi"
    with pytest.warns(dip.DIPConversionWarning, match=said):
        dip.convert(attention)
    assert [n.rpartition(".")[2] for n in dip_layers(attention)] == ["head"]


# ---- one draw for layers that share an input -----------------------------------------------------

QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def test_sharing_saves_draws_passes_and_bytes():
    torch.manual_seed(0)
    plain = llama()
    apart = dip.convert(copy.deepcopy(plain))
    shared = dip.convert(copy.deepcopy(plain), share=[QKV, MLP])
    counts = []
    for model in (apart, shared):
        with Operations() as calls:
            model(input_ids=IDS, labels=IDS).loss.backward()
        counts.append(dict(calls.count()))
    # two blocks: q, k, v make one of three, gate and up one of two
    assert counts == [{"perturb": 15, "perturb_bwd": 15}, {"perturb": 9, "perturb_bwd": 9}]
    ids = IDS.repeat(8, 8)
    plain_bytes, apart_bytes, shared_bytes = (
        saved_bytes(lambda m=m: m(input_ids=ids).logits, [*m.parameters(), ids])
        for m in (plain, apart, shared)
    )
    print(f"calls: apart {counts[0]}, shared {counts[1]}")
    kept = f"plain {plain_bytes:,}, apart {apart_bytes:,}, shared {shared_bytes:,}"
    print(f"bytes kept for backward: {kept}")
    one_input = 16 * 56 * 32 * 4
    small = 4096  # seeds and variances
    # each of two blocks keeps one u for three, and one for two
    assert abs(apart_bytes - shared_bytes - 2 * (2 + 1) * one_input) < small
    # beyond the plain model only this: attention's backward keeps its output, which is the plain
    # o_proj's input
    assert abs(shared_bytes - plain_bytes - 2 * one_input) < small


def test_shared_layers_read_one_u_and_learn_one_variance():
    torch.manual_seed(0)
    model = dip.convert(llama(), 0.25, share=[QKV])
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.variance is attention.v_proj.variance is attention.q_proj.variance
    assert [n for n, _ in attention.named_parameters() if "variance" in n] == [
        "q_proj.variance.log_variance",
        "o_proj.variance.log_variance",
    ]
    assert attention.q_proj.number == attention.v_proj.number == 0
    assert sorted({row.number for row in dip.summary(model)}) == list(range(11))
    x = torch.randn(2, 3, 32)
    with fixed_noise(1):
        q, k = attention.q_proj(x), attention.k_proj(x)
    u = x + attention.q_proj.variance.sigma * dip.functional.noise((2, 3, 32), torch.tensor([1, 0]))
    torch.testing.assert_close(q, F.linear(u, attention.q_proj.weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k, F.linear(u, attention.k_proj.weight), rtol=1e-5, atol=1e-5)


def test_a_share_draws_afresh_for_another_tensor_another_pass_and_another_mode():
    eye = nn.ModuleDict({n: nn.Linear(6, 6, bias=False) for n in "qkv"})
    for layer in eye.values():
        nn.init.eye_(layer.weight)  # so that a layer's output is its u
    model = dip.convert(eye, 0.25, share=[("q", "k", "v")])
    x = torch.randn(4, 6)
    q, k, v = (model[name](x) for name in "qkv")
    assert torch.equal(q, k) and torch.equal(q, v)
    assert not model["q"].share._entries  # let go when all have had it
    assert not torch.equal(model["q"](x), q)
    # unfinished passes do not leak into the next one
    first = model["q"](x)
    assert not torch.equal(model["q"](x), first)
    second = model["k"](x.clone())
    assert not torch.equal(second - x, first - x)
    model["q"](x)
    with torch.no_grad():
        x.add_(1.0)  # changed in place: u is no longer this tensor's
    assert not torch.equal(model["k"](x) - x, first - x)
    with torch.no_grad():
        without_grad = model["q"](x)
    assert not torch.equal(model["k"](x), without_grad)
    model["q"].eval()
    assert torch.equal(model["q"](x), x)
    with torch.inference_mode():
        y = torch.randn(2, 6)
        model.train()
        assert torch.equal(model["q"](y), model["k"](y))


def test_shared_layers_survive_copies_state_dicts_checkpointing_and_casts():
    torch.manual_seed(0)
    model = dip.convert(llama(), share=[QKV, MLP])
    # a pass left unfinished goes into no copy
    model.model.layers[0].self_attn.q_proj(torch.randn(2, 32))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        attention = again.model.layers[0].self_attn
        assert attention.k_proj.variance is attention.q_proj.variance
        assert attention.k_proj.share is attention.q_proj.share
        assert attention.q_proj.share is not model.model.layers[0].self_attn.q_proj.share
        again.load_state_dict(model.state_dict())
        with fixed_noise(1):
            assert torch.equal(again(IDS).logits, model(IDS).logits)
    unshared = dip.convert(llama())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*k_proj\.variance\.log_variance"):
        model.load_state_dict(unshared.state_dict())
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(torch.allclose(grads[1][n], g, rtol=1e-4, atol=1e-7) for n, g in grads[0].items())
    model.bfloat16()
    assert model.model.layers[0].self_attn.v_proj.log_variance.dtype is torch.float32
    model(input_ids=IDS, labels=IDS).loss.backward()
    dip.calibrate(model, [IDS])
    dip.to_plain(model)
    assert list(model.state_dict()) == list(llama().state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_shared_layers_and_attention_train_under_fsdp(one_rank):
    torch.manual_seed(0)
    encoder = dip.convert(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    for model, inputs in (
        (dip.convert(llama(), share=[QKV, MLP]), {"input_ids": IDS}),
        (encoder, {"src": IMAGES[0, :, :, :8]}),
    ):
        trains_alike_in_shards(model, lambda each, inputs=inputs: logits(each, inputs))


def test_lora_layers_share_too():
    torch.manual_seed(0)
    model = dip.convert(peft_llama(), share=[QKV])  # LoRA on q and v, none on k
    with Operations() as calls:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert calls.count() == {"perturb": 11, "perturb_bwd": 11}


def test_t5s_cross_attention_shares_what_is_one_tensor():
    torch.manual_seed(0)
    model = dip.convert(t5(), share=[("q", "k", "v")])
    with Operations() as calls:
        model(input_ids=IDS, decoder_input_ids=IDS)
    # 33 layers: six attentions of three; two of them, the cross-attentions, read two tensors
    assert calls.count()["perturb"] == 33 - 4 * 2 - 2 * 1


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (["q_proj"], "groups of two or more"),
        ([("q_proj",)], "groups of two or more"),
        ([("q_proj", "q")], r"\['q'\] that match none"),
        ([("o_proj", "down_proj")], "two layers of one parent"),
        ([("gate_proj", "down_proj")], "the same number of input features"),
        ([QKV, ("k_proj", "v_proj")], "in two"),
    ],
)
def test_bad_groups_are_named_and_change_nothing(share, message):
    model = llama()
    with pytest.raises(ValueError, match=f"^share: .*{message}"):
        dip.convert(model, share=share)
    assert not dip_layers(model)


def test_sharing_compiles_into_one_graph():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    block = dip.convert(nn.Sequential(nn.Tanh(), Branches(8)), share=[("q", "k", "v")])
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    x = torch.randn(4, 8)
    with fixed_noise(3):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), block(x))
    compiled(x).sum().backward()
    # torch 2.10 names a node after its variable
    calls = [str(node.target) for node in graphs[0].graph.nodes]
    assert calls.count("autograd_function_apply") == 1
    assert not block[1].q.share._entries


# ---- convolutions of other ranks -----------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"padding_mode": "circular", "padding": 1, "groups": 2, "dilation": 2}]
)
@pytest.mark.parametrize("batched", [True, False])
def test_convolutions_of_every_rank_have_a_variance_per_channel(rank, options, batched):
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](4, 6, 3, **options)
    layer = dip.convert(copy.deepcopy(plain), 0.25)
    x = torch.randn(*([2] if batched else []), 4, *[7] * rank)
    assert layer.log_variance.shape == (4,)
    with fixed_noise(1):
        y = layer(x)
        u = x + 0.5 * dip.functional.noise(tuple(x.shape), torch.tensor([1, 0]), dim=-rank - 1)
    torch.testing.assert_close(y, plain(u), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.eval()(x), plain(x))
    assert dip.summary(dip.convert(nn.Sequential(copy.deepcopy(plain))), [x])[0].ratio is not None
    assert isinstance(layer, DIPConv2d) == (rank == 2)
