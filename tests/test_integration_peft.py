"""PEFT: variances are saved and loaded with the adapter, each adapter its own; merged layers keep
their noise."""

import copy
import pickle

import pytest
import torch
from trainer_support import llama
from warning_support import no_warning

import dipkernels as dip
from dipkernels.config import CONFIG_FILE, VARIANCES_FILE, convert_as
from dipkernels.nn.numbering import dip_layers

pytest.importorskip("safetensors")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}
CONFIG = dip.DIPConfig(exclude=["*.lm_head"], ratio=0.3)


def lora(*targets, **options):
    targets = list(targets or ("q_proj", "v_proj"))
    return peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **options)


def adapted(config=CONFIG, base=None):
    return dip.apply(peft.get_peft_model(base or llama(), lora()), config, [BATCH])


def moved(model, by):
    """The variances after a step of training, as it were."""
    with torch.no_grad():
        for layer in dip_layers(model).values():
            layer.log_variance.add_(by)
    return dip.variances(model)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def noisy(model):
    with dip.fixed_noise(3), dip.sampling_on(), torch.no_grad():
        return model(input_ids=IDS).logits


def test_variances_are_saved_with_the_adapter_and_load_with_it(tmp_path):
    model = adapted()
    want = moved(model, 0.5)
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert isinstance(model, peft.PeftModelForCausalLM)
    model.save_pretrained(tmp_path)
    assert {CONFIG_FILE, VARIANCES_FILE, "adapter_model.safetensors"} <= {
        path.name for path in tmp_path.iterdir()
    }
    loaded = dip.load(peft.PeftModel.from_pretrained(llama(), tmp_path), tmp_path)
    assert equal(dip.variances(loaded), want) and dip.config_of(loaded) == CONFIG
    assert torch.equal(noisy(loaded), noisy(model.eval()))
    moved(model, 1.0)
    model.load_adapter(tmp_path, "default")
    assert equal(dip.variances(model), want)


def test_an_adapter_without_variances_is_hot_swapped_and_they_follow(tmp_path):
    swap = pytest.importorskip("peft.utils.hotswap").hotswap_adapter
    model, served = adapted(), peft.get_peft_model(llama(), lora())
    moved(model, 0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.eval().save_pretrained(tmp_path)
    dip.to_plain(copy.deepcopy(model)).save_pretrained(tmp_path / "bare")
    swap(served, tmp_path / "bare", "default", torch_device="cpu")
    assert torch.equal(served.eval()(IDS).logits, model(IDS).logits)
    other = adapted().eval()
    swap(other, tmp_path / "bare", "default", torch_device="cpu")
    assert not equal(dip.variances(other), dip.variances(model))
    dip.load(other, tmp_path)
    assert torch.equal(noisy(other), noisy(model))


def test_two_adapters_have_variances_of_their_own(tmp_path):
    model = adapted()
    model.add_adapter("other", lora())
    first = moved(model, 0.5)
    model.set_adapter("other")
    start = dip.variances(model)
    assert not equal(start, first) and not dip.check(model, BATCH).frozen
    second = moved(model, 1.0)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    assert equal(dip.variances(model), first)
    model.set_adapter("other")
    assert equal(dip.variances(model), second)
    fresh = dip.load(peft.PeftModel.from_pretrained(llama(), tmp_path), tmp_path)
    assert equal(dip.variances(fresh), first)
    fresh.load_adapter(tmp_path / "other", "other")
    assert equal(dip.variances(fresh), first)  # not active yet
    fresh.set_adapter("other")
    assert equal(dip.variances(fresh), second)
    fresh.delete_adapter("other")
    assert fresh.active_adapter == "default" and equal(dip.variances(fresh), first)
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one" / VARIANCES_FILE).exists()
    assert (tmp_path / "one" / "other" / VARIANCES_FILE).exists()


def test_an_adapter_that_peft_makes_of_others_has_the_variances_of_the_moment(tmp_path):
    model = adapted()
    model.add_adapter("other", lora())
    first = moved(model, 0.5)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mix", combination_type="linear")
    model.save_pretrained(tmp_path)
    assert equal(dip.config.load_state(tmp_path / "mix"), first)
    model.set_adapter("mix")
    assert equal(dip.variances(model), first)
    second = moved(model, 1.0)
    model.set_adapter("default")
    assert equal(dip.variances(model), first)
    model.set_adapter("mix")
    assert equal(dip.variances(model), second)


def test_an_adapter_around_a_layer_that_had_noise_takes_the_noise_with_it():
    model = adapted()
    before = dip.variances(model)
    model.add_adapter("wide", lora("q_proj", "down_proj"))
    assert equal(dip.variances(model), before)
    model.set_adapter("wide")
    report = dip.check(model, BATCH)
    assert report.checked == 7
    assert not report.frozen
    assert "down_proj.variance.log_variance" in "".join(before)
    share = [("gate_proj", "up_proj")]
    shared = adapted(dip.DIPConfig(exclude=["*.lm_head"], share=share, ratio=0.3))
    with pytest.raises(ValueError, match=r"add every adapter first, then dip\.apply"):
        shared.add_adapter("wide", lora("up_proj"))


class Packed(torch.nn.Linear):
    """As HQQ's: in place of a weight it has bits."""

    __module__ = "hqq.core.quantize"

    def __init__(self, *sizes):
        super().__init__(*sizes)
        del self.weight


def test_the_noise_of_an_adapter_around_a_layer_without_weight_lies_where_the_adapter_does():
    """As on a GPU; the meta device stands for one."""
    adapter = peft.tuners.lora.Linear(
        torch.nn.Linear(4, 3), "default", config=peft.LoraConfig(r=2), r=2
    )
    adapter.base_layer = Packed(4, 3)
    (layer,) = dip.convert(torch.nn.Sequential(adapter.to("meta")))
    assert layer.log_variance.is_meta


@pytest.mark.parametrize("share", [(), (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))])
@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_a_merged_model_has_the_noise_that_the_adapters_had(share, method):
    base = llama()
    model = peft.get_peft_model(base, lora("q_proj", "k_proj", "v_proj"))
    dip.apply(model, dip.DIPConfig(exclude=["*.lm_head"], share=share, ratio=0.3), [BATCH])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and method == "merge_and_unload":
                parameter.normal_(std=0.1)
    state, want, quiet = moved(model, 0.5), noisy(model.eval()), model(input_ids=IDS).logits
    merged = getattr(model, method)()
    assert merged is base and len(dip_layers(merged)) == 7
    got = dip.variances(merged)
    assert {f"base_model.model.{name}": v.sum() for name, v in got.items()} == {
        n: v.sum() for n, v in state.items()
    }
    torch.testing.assert_close(noisy(merged), want)
    torch.testing.assert_close(merged(input_ids=IDS).logits, quiet)
    assert dip.check(merged, BATCH) and dip.config_of(merged).share == share
    assert type(dip.to_plain(merged).model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize("exclude", [["*.lm_head"], ["*.lm_head", "*.q_proj", "*.v_proj"]])
def test_a_merged_model_whose_other_parts_are_wrapped_keeps_their_noise(exclude):
    base = llama()
    base.model.layers[0].mlp = torch.nn.DataParallel(base.model.layers[0].mlp)
    base.model.layers[0].self_attn.o_proj = torch.nn.DataParallel(
        base.model.layers[0].self_attn.o_proj
    )
    model = adapted(dip.DIPConfig(exclude=exclude, init_variance=0.04), base)
    state = moved(model, 0.5)
    merged = dip.variances(model.merge_and_unload())
    assert equal({f"base_model.model.{name}": values for name, values in merged.items()}, state)


def test_a_head_that_the_adapter_trains_whole_keeps_its_noise():
    config, name = lora("q_proj", modules_to_save=["lm_head"]), "variance.log_variance"
    model = dip.apply(peft.get_peft_model(llama(), config), dip.DIPConfig(), [BATCH])
    want = moved(model, 0.5)[f"base_model.model.lm_head.modules_to_save.default.{name}"]
    assert torch.equal(dip.variances(model.merge_and_unload())[f"lm_head.{name}"], want)


def test_a_head_tied_to_trained_tokens_keeps_its_noise():
    config, base = lora("q_proj", trainable_token_indices=[1, 2]), llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    model = dip.apply(peft.get_peft_model(base, config), dip.DIPConfig(ratio=0.3), [BATCH])
    moved(model, 0.5)
    want, quiet = noisy(model.eval()), model(input_ids=IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(noisy(merged), want)
    torch.testing.assert_close(merged(input_ids=IDS).logits, quiet)


TOKENS = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    "prompt",
    [
        peft.PromptEncoderConfig(**TOKENS, encoder_hidden_size=8),
        peft.PrefixTuningConfig(**TOKENS, encoder_hidden_size=8, prefix_projection=True),
        peft.PromptTuningConfig(**TOKENS),
    ],
    ids=lambda prompt: prompt.peft_type.value,
)
def test_a_saved_prompt_loads_with_the_variances_of_the_model_behind_it(prompt, tmp_path):
    """Without its encoder, of which PEFT saves what it computes."""
    model = dip.apply(peft.get_peft_model(llama(), prompt), dip.DIPConfig(ratio=0.3), [BATCH])
    moved(model, 0.5)
    model.save_pretrained(tmp_path)
    again = dip.load(peft.PeftModel.from_pretrained(llama(), tmp_path), tmp_path)
    state = {n: v for n, v in dip.variances(model).items() if not n.startswith("prompt_encoder.")}
    assert equal(dip.variances(again), state)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert equal(dip.variances(again), state)
    quiet = model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(again.eval()(input_ids=IDS).logits, quiet)


def test_copies_and_pickles_keep_their_variances_with_them(tmp_path):
    model = adapted()
    want = moved(model, 0.5)
    for i, again in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        assert equal(dip.variances(again), want) and type(again) is type(model)
        again.save_pretrained(tmp_path / str(i))
        assert (tmp_path / str(i) / VARIANCES_FILE).exists()
    plain = dip.to_plain(model)
    assert type(plain) is type(peft.get_peft_model(llama(), lora()))
    assert b"dipkernels" not in pickle.dumps(plain)
    plain.save_pretrained(tmp_path / "plain")
    plain.set_adapter("default")
    assert not (tmp_path / "plain" / VARIANCES_FILE).exists()


def test_an_adapter_of_other_layers_is_refused_and_changes_nothing(tmp_path):
    other = dip.apply(peft.get_peft_model(llama(), lora()), dip.DIPConfig(ratio=0.3), [BATCH])
    other.save_pretrained(tmp_path)
    model = adapted()
    before = dip.variances(model)
    with pytest.raises(ValueError, match=r"unknown .*lm_head"):
        model.load_adapter(tmp_path, "default")
    assert equal(dip.variances(model), before)


def test_the_order_of_get_peft_model_and_apply_is_checked(tmp_path):
    base = dip.apply(llama(), dip.DIPConfig(exclude=["lm_head"]), [BATCH])
    model = peft.get_peft_model(base, lora())
    for call in (
        lambda: dip.save(model, tmp_path),
        lambda: dip.apply(model, CONFIG, [BATCH]),
        lambda: convert_as(model, CONFIG),  # a trainer's checkpoint
    ):
        said = r"expected get_peft_model before dip\.apply, got 2 adapter\(s\)"
        with pytest.raises(ValueError, match=said):
            call()
    with no_warning(dip.DIPConversionWarning):
        dip.convert(model, exclude=["*.lm_head"])  # the way out that the message names
    dip.save(model, tmp_path)


def test_keep_variances_wants_a_converted_peft_model():
    from dipkernels.integrations.peft import keep_variances

    with pytest.raises(TypeError, match="expected a PeftModel, got LlamaForCausalLM"):
        keep_variances(llama())
    with pytest.raises(ValueError, match=r"expected one that dip\.apply has converted"):
        keep_variances(peft.get_peft_model(llama(), lora()))
