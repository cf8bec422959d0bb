"""PEFT: every adapter that PEFT has is noised as a whole at its input, Layer(x + sigma z), or
named."""

import copy
import os
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from trainer_support import is_whole, llama
from warning_support import no_warning

import dipkernels as dip
from dipkernels.models.convertible import is_adapter
from dipkernels.nn.layer import DIPLayer
from dipkernels.nn.numbering import dip_layers

peft = pytest.importorskip("peft")
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_extension():
    # BOFT compiles one for CUDA, waits for ever where a process that did so was killed, and leaves
    # CXX=gcc behind where it does not build
    failed = RuntimeError("no extension is wanted")
    with (
        mock.patch.dict(os.environ),
        mock.patch("torch.utils.cpp_extension.load", side_effect=failed),
    ):
        yield


# What each kind needs beside target_modules to fit a layer of 32 features.
OPTIONS = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "C3A": {"block_size": 8},
    "TRAINABLE_TOKENS": {"token_indices": [1, 3]},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "VBLORA": {"vector_length": 8, "num_vectors": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 16},
    "FOURIERFT": {"n_frequency": 16},
}
# What puts no layer around a linear one: prompts, and XLORA and SHADOW, which need a transformers
# model.
NO_LAYER = {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING"}
NO_LAYER |= {"PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA"}
CONFIGS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
KINDS = sorted(CONFIGS)
LAYERED = [kind for kind in KINDS if kind not in NO_LAYER]
VARIANTS = {
    "DoRA": ("LORA", {"use_dora": True}),
    "rsLoRA": ("LORA", {"use_rslora": True}),
    "dropout": ("LORA", {"lora_dropout": 0.5}),
    "bias": ("LORA", {"lora_bias": True}),
    "LoHa rank": ("LOHA", {"rank_dropout": 0.5}),
    "OFT scaled": ("OFT", {"oft_block_size": 8, "coft": True}),
    **{kind: (kind, OPTIONS.get(kind, {})) for kind in LAYERED},
}


class Net(nn.Module):
    def __init__(self, conv=False):
        super().__init__()
        self.q = nn.Conv2d(4, 8, 3) if conv else nn.Linear(32, 32)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x):
        return self.q(x)


def adapted(kind, options, net=None, targets=("q",)):
    torch.manual_seed(0)
    config = CONFIGS[kind](target_modules=list(targets), **options)
    model = peft.get_peft_model(net or Net(), config)
    with torch.no_grad():  # away from the start, where many adapters do nothing
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def the_adapter(model):
    return next(m for m in model.modules() if is_adapter(m))


def converted(model, **options):
    with no_warning(dip.DIPConversionWarning):
        return dip.convert(model, 0.25, **options)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_adapter_is_noised_as_a_whole(name):
    kind, options = VARIANTS[name]
    model = converted(adapted(kind, options))
    layer, x = the_adapter(model), torch.randn(16, 2, 32)
    assert isinstance(layer, DIPLayer)
    noised = [n for n in dip_layers(model) if ".q" in n]
    assert noised == ["base_model.model.q"]  # and nothing inside it
    task = {"task_ids": torch.zeros(16, dtype=torch.long)} if kind == "POLY" else {}
    assert is_whole(layer.eval(), x, **task)
    layer.train()(x, **task).square().sum().backward()
    assert bool(layer.log_variance.grad.any())
    back = dip.to_plain(copy.deepcopy(model).eval())
    with dip.noise_off():
        assert torch.equal(the_adapter(back)(x, **task), layer.eval()(x, **task))
    assert not any(isinstance(m, DIPLayer) for m in back.modules())


def test_no_kind_of_peft_is_left_out_here():
    """A new kind in PEFT lands in the test above, or fails here until it is known to have no
    layer."""
    assert set(KINDS) >= NO_LAYER
    modelled = {
        type(the_adapter(adapted(kind, OPTIONS.get(kind, {})))).__module__.split(".")[2]
        for kind in LAYERED
    }
    assert len(modelled) == len(LAYERED)


@pytest.mark.parametrize(
    "kind", ["LORA", "LOHA", "LOKR", "BOFT", "OFT", "HRA", "IA3", "ADALORA", "HIRA"]
)
def test_adapters_around_convolutions_have_a_variance_for_each_channel(kind):
    options = {**OPTIONS.get(kind, {}), **({"oft_block_size": 6} if kind == "OFT" else {})}
    options |= {"r": 2} if kind in ("LORA", "LOHA", "LOKR", "HRA", "HIRA") else {}
    try:
        model = adapted(kind, options, Net(conv=True))
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"PEFT makes none here: {error}")
    layer = the_adapter(converted(model, exclude=["*.head"]))
    assert layer.log_variance.shape == (4,)
    assert is_whole(layer.eval(), torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("kind", ["LOHA", "VERA", "MISS", "LORA"])
def test_an_adapted_model_merges_unloads_copies_and_pickles(kind):
    model, x = converted(adapted(kind, OPTIONS.get(kind, {}))), torch.randn(5, 32)
    with dip.noise_off():
        expected = model.eval()(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with dip.sampling_on(), dip.fixed_noise(1):
            assert torch.equal(again(x), model(x))
    merged = copy.deepcopy(model).merge_and_unload()
    assert [n for n in dip_layers(merged)] == ["head"]  # the noise of q went with its adapter
    assert "q" in dip.check(merged, x, strict=False).faults
    torch.testing.assert_close(merged.eval()(x), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert not torch.equal(model.train()(x), model(x))
    assert [n for n in dip_layers(model.unload())] == ["head"]


def test_several_adapters_share_the_layers_variance():
    model = adapted("LORA", {"r": 4})
    model.add_adapter("other", model.peft_config["default"])
    converted(model)
    layer, x = the_adapter(model), torch.randn(8, 32)
    for active in ("other", "default", ["default", "other"]):
        model.base_model.set_adapter(active)
        assert is_whole(layer.eval(), x)
        assert layer.log_variance.requires_grad


def test_an_adapter_added_after_conversion_leaves_the_variances_trainable():
    model = converted(adapted("LORA", {"r": 4}), exclude=["*.head"])
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    report = dip.check(model, torch.randn(8, 32))
    assert report.checked == 1 and not report.frozen


@pytest.mark.parametrize("kind", ["LORA", "LOHA", "IA3"])
def test_peft_over_a_converted_model_is_mended_by_converting_again(kind):
    net = dip.convert(Net(), 0.25)
    variance = net.q.variance
    model = adapted(kind, OPTIONS.get(kind, {}), net)
    assert "put inside a peft" in dip.check(net, torch.randn(3, 32), strict=False).faults["q"]
    dip.convert(model, 0.01)
    layer = the_adapter(model)
    assert layer.variance is variance and variance.log_variance.requires_grad
    assert is_whole(layer.eval(), torch.randn(8, 32))


@pytest.mark.parametrize("kind", ["LORA", "IA3"])
def test_peft_over_a_converted_conv1d_is_mended_by_converting_again(kind):
    net = Net()
    net.q = Conv1D(8, 32)
    variance = dip.convert(net, 0.25).q.variance
    model = adapted(kind, {**OPTIONS.get(kind, {}), "fan_in_fan_out": True}, net)
    layer = the_adapter(converted(model))
    assert layer.variance is variance and variance.log_variance.requires_grad
    assert is_whole(layer.eval(), torch.randn(8, 32))
    assert list(dip_layers(model).values()) == [layer, net.head]


def test_what_peft_keeps_whole_of_a_converted_model_is_noised_once_by_converting_again():
    net = Net()
    net.forward = lambda x: net.head(net.q(x))
    dip.convert(net, 0.25)
    model = adapted("LORA", {"modules_to_save": ["head"]}, net)
    x = torch.randn(8, 32)
    wrapper, said = net.head, dip.check(net, x, strict=False).faults["head"]
    assert "ModulesToSaveWrapper since it was converted: convert again" in said
    converted(model)
    kept, called = wrapper.original_module, wrapper.modules_to_save["default"]
    assert type(kept) is nn.Linear and called.log_variance.requires_grad
    dip.calibrate(model, [x])
    for each in (model, net):
        report = dip.check(each, x)
        assert report.checked == 2 and not report.frozen
    assert len(dip.variances(model)) == 6


def test_adapters_over_norms_and_embeddings_are_left_alone():
    model = converted(adapted("LN_TUNING", {}, targets=["norm"]))
    assert list(dip_layers(model)) == ["base_model.model.q", "base_model.model.head"]
    net = nn.Sequential(nn.Embedding(9, 32), nn.Linear(32, 32))
    for kind in ("LORA", "HIRA", "TRAINABLE_TOKENS", "OFT"):
        options = {"token_indices": [1]} if kind == "TRAINABLE_TOKENS" else {}
        try:
            model = adapted(kind, options, copy.deepcopy(net), ["0"])
        except (ValueError, TypeError) as error:
            assert "support" in str(error)
            continue
        assert [n.rpartition(".")[2] for n in dip_layers(converted(model))] == ["1"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 32, 32))

    def forward(self, x):
        return x @ self.up[0].mT


def test_adapters_of_bare_parameters_are_named_and_can_be_noised_by_name():
    net = nn.ModuleDict({"experts": Experts(), "head": nn.Linear(32, 4)})
    net.forward = lambda x: net["head"](net["experts"](x))
    config = peft.LoraConfig(target_modules=[], target_parameters=["experts.up"], r=2)
    model = peft.get_peft_model(net, config)
    said = r"experts \(ParamWrapper\): an adapter over Experts"
    with pytest.warns(dip.DIPConversionWarning, match=said):
        dip.convert(copy.deepcopy(model))
    layer, by_name = the_adapter(model), {"before": ["*.experts"], "exclude": ["*.base_layer"]}
    dip.convert(model, 0.25, **by_name, batches=[torch.randn(3, 32)])
    assert isinstance(layer, DIPLayer) and is_whole(layer.eval(), torch.randn(8, 32))


# ---- prompts and whole models --------------------------------------------------------------------


PROMPTS = {
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_leave_every_layer_noised_their_own_encoders_too(kind):
    config = CONFIGS[kind](task_type="CAUSAL_LM", **PROMPTS[kind])
    model = converted(peft.get_peft_model(llama(), config))
    ids = torch.randint(32, (2, 6))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    report = dip.check(model, batch)
    assert report and report.checked == 8 + {"PREFIX_TUNING": 2, "P_TUNING": 3}.get(kind, 0)


def test_xlora_which_replaces_forwards_is_named(tmp_path):
    for name in ("0", "1"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(llama(), config).save_pretrained(tmp_path / name)
    adapters = {name: str(tmp_path / name) for name in ("0", "1")}
    sizes = {"hidden_size": 16, "xlora_depth": 1}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", adapters=adapters, **sizes)
    model = peft.get_peft_model(llama(use_cache=False), config)
    said = r"(?s)1 module.*q_proj \(Linear\): its forward was replaced"
    with pytest.warns(dip.DIPConversionWarning, match=said):
        dip.convert(model)
    assert not any("q_proj" in name for name in dip_layers(model))


def test_a_head_kept_whole_and_trained_tokens_are_noised_once():
    options = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [1, 2]}}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    model, ids = converted(peft.get_peft_model(llama(), config)), torch.randint(32, (2, 6))
    report = dip.check(model, {"input_ids": ids, "labels": ids})
    assert report and report.checked == 8


class _Scaled(dip.DIPLinear):
    def forward(self, input):
        return 10 * super().forward(input)


class _PlainScaled(nn.Linear):
    def forward(self, input):
        return 10 * super().forward(input)


class _Known(_Scaled):
    plain_type = _PlainScaled


@pytest.mark.parametrize("kind", [_Scaled, _Known])
def test_a_users_subclass_of_a_dip_layer_stays_itself_inside_an_adapter(kind):
    model, x = nn.ModuleDict({"a": kind(8, 8), "b": nn.Linear(8, 8)}), torch.randn(3, 8)
    model.forward = lambda x: model["b"](model["a"](x))
    plain = model.eval()(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["a", "b"])).eval()
    if kind is _Known:
        converted(adapted)
    else:
        said = "an adapter over a subclass of a DIP layer.*set plain_type"
        with pytest.warns(dip.DIPConversionWarning, match=said):
            dip.convert(adapted)
    assert torch.equal(adapted(x), plain)
    assert len(dip_layers(adapted)) == 2
