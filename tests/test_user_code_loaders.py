"""Loads and offload by transformers, accelerate and PEFT: a variance is trained, computed or
refused, never left over."""

import math

import pytest
import torch
from torch import nn
from variance_support import Branches, noise, spoil, trained, variances

import dipkernels as dip
from dipkernels.nn.numbering import dip_layers

accelerate = pytest.importorskip("accelerate")
safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
START = math.log(0.01)


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def all_are(model, value):
    return all((v.log_variance == torch.tensor(value)).all() for v in variances(model))


# ---- transformers: from_pretrained ---------------------------------------------------------------


class ToyConfig(transformers.PretrainedConfig):
    model_type = "toy-dip"

    def __init__(self, noisy=True, how="convert", **kwargs):
        self.noisy, self.how = noisy, how
        super().__init__(**kwargs)


class Toy(transformers.PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(10, 8)
        if config.noisy and config.how == "by hand":
            self.layers = nn.Sequential(dip.DIPLinear(8, 8), nn.ReLU(), dip.DIPLinear(8, 8))
            self.attention = dip.DIPMultiheadAttention(8, 2, batch_first=True)
        else:
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        if config.noisy and config.how == "convert":
            dip.convert(self)
        elif config.noisy:
            dip.number_layers(self)
        self.post_init()

    def _init_weights(self, module):
        """A user's own, which knows nothing of variances."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids):
        x = self.layers(self.embed(ids))
        return self.attention(x, x, x)[0]


IDS = torch.arange(6).reshape(2, 3)
HOWS = ["convert", "by hand"]


@pytest.mark.parametrize("how", HOWS)
def test_from_pretrained_gives_back_what_was_saved(tmp_path, how):
    model = trained(Toy(ToyConfig(how=how)))
    model.save_pretrained(tmp_path)
    spoil(4, 8, 8, 16)
    again, report = Toy.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all_are(again, -1) and all(v.log_variance.requires_grad for v in variances(again))
    streams = [layer._stream.tolist() for layer in dip_layers(again).values()]
    assert streams == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert torch.equal(noise(again, IDS), noise(model, IDS))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_of_a_plain_checkpoint_starts_from_the_initial_variance(
    tmp_path, how, dtype
):
    plain = Toy(ToyConfig(noisy=False))
    plain.save_pretrained(tmp_path)
    spoil(4, 8, 8, 16)
    model = Toy.from_pretrained(tmp_path, config=ToyConfig(how=how), dtype=dtype)
    assert all_are(model, START)
    assert all(v.log_variance.dtype is torch.float32 for v in variances(model))
    assert torch.equal(model.layers[0].weight, plain.layers[0].weight.to(dtype))
    assert [layer.number for layer in dip_layers(model).values()] == [0, 1, 2, 3]
    y = noise(model, IDS)
    y.sum().backward()
    assert all(v.log_variance.grad is not None for v in variances(model))


def test_a_checkpoint_that_holds_some_of_the_variances_gives_those(tmp_path):
    model = trained(Toy(ToyConfig()))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("layers.2.variance")}
    model.save_pretrained(tmp_path, state_dict=state)
    spoil(4, 8, 8, 16)
    again = Toy.from_pretrained(tmp_path)
    assert (again.layers[2].log_variance == torch.tensor(START)).all()
    rest = [v for v in variances(again) if v is not again.layers[2].variance]
    assert len(rest) == 3 and all((v.log_variance == -1).all() for v in rest)


def test_a_model_of_transformers_that_is_made_leaves_what_its_class_set():
    class Set(Toy):
        def __init__(self, config):
            super().__init__(config)
            trained(self)
            self.post_init()

    assert all_are(Set(ToyConfig()), -1)
    model = trained(Toy(ToyConfig()))
    model.init_weights()
    model.initialize_weights()
    assert all_are(model, -1)


def test_the_trainer_is_told_that_it_decays_variances(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 20}
    config = transformers.BertConfig(num_hidden_layers=1, **sizes)
    model = dip.convert(transformers.BertForSequenceClassification(config))
    data = [{"input_ids": torch.tensor([1, 2, 3]), "labels": 0}] * 4
    quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    args = transformers.TrainingArguments(tmp_path, max_steps=2, weight_decay=0.1, **quiet)
    with pytest.warns(UserWarning, match="param_groups"):
        transformers.Trainer(model, args, train_dataset=data).train()


def test_a_head_that_transformers_resizes_is_plain_again():
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 20}
    config = transformers.GPT2Config(**sizes, tie_word_embeddings=False)
    model = dip.convert(transformers.GPT2LMHeadModel(config))
    assert isinstance(model.lm_head, dip.DIPLinear)
    model.resize_token_embeddings(24)
    assert type(model.lm_head) is nn.Linear
    dip.convert(model)
    assert isinstance(model.lm_head, dip.DIPLinear)


# ---- PEFT ----------------------------------------------------------------------------------------


def test_an_adapter_file_leaves_the_variances_that_it_does_not_name(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        return peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0", "2"], r=2))

    adapted().save_pretrained(tmp_path)
    model = trained(dip.convert(adapted()))
    model.load_adapter(tmp_path, "second")
    assert len(variances(model)) == 2 and all_are(model, -1)
    model.set_adapter("second")
    model.train()(torch.randn(3, 4)).sum().backward()
    assert all(v.log_variance.grad.any() for v in variances(model))


# ---- accelerate: offload, dispatch, empty models -------------------------------------------------

MAPS = [{"": "cpu"}, {"0": "cpu", "1": "cpu", "2": "cpu"}, {"0": "cpu", "1": "cpu", "2": "disk"}]


def load_and_dispatch(model, state, folder, device_map, **options):
    """The model, filled by accelerate from a file that holds the state."""
    safetensors.save_file(state, folder / "model.safetensors")
    options |= {"device_map": device_map, "offload_folder": folder / "disk"}
    return accelerate.load_checkpoint_and_dispatch(
        model, str(folder / "model.safetensors"), **options
    )


def empty():
    with accelerate.init_empty_weights():
        return dip.convert(net())


def dispatched(model, folder, how):
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk_offload":
        return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return accelerate.dispatch_model(model, MAPS[2], main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch"])
def test_an_offloaded_model_draws_its_noise(tmp_path, how):
    model, x = trained(dip.convert(net())), torch.randn(3, 4)
    expected, plain = noise(model, x), model.eval()(x)
    sigma = [(row.sigma_mean, row.number) for row in dip.summary(model)]
    state = dip.variances(model)
    dispatched(model, tmp_path, how)
    assert any(v.log_variance.is_meta for v in variances(model))
    assert torch.equal(noise(model, x), expected) and torch.equal(model.eval()(x), plain)
    assert dip.predict(model, x, k=2).isfinite().all()
    with dip.noise_off():
        assert torch.equal(model.train()(x), plain)
    assert [(row.sigma_mean, row.number) for row in dip.summary(model)] == sigma
    assert all(torch.equal(value, state[name]) for name, value in dip.variances(model).items())
    for call in (lambda: dip.calibrate(model, [x]), lambda: dip.load_variances(model, state)):
        with pytest.raises(ValueError, match="before the model is dispatched"):
            call()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("device_map", MAPS)
def test_an_empty_model_takes_a_whole_checkpoint(tmp_path, device_map, dtype):
    """Its variances in float32, where accelerate casts it too."""
    model, x = trained(dip.convert(net())), torch.randn(3, 4)
    again = load_and_dispatch(empty(), model.state_dict(), tmp_path, device_map, dtype=dtype)
    if dtype is None:
        assert torch.equal(noise(again, x), noise(model, x))
    else:
        y = noise(again, x.to(dtype))
        assert y.isfinite().all() and y.dtype is dtype


def test_layers_that_share_noise_are_offloaded(tmp_path):
    model, x = dip.convert(Branches(4), share=[("q", "k")]), torch.randn(3, 4)
    expected = noise(model, x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(noise(model, x), expected)


@pytest.mark.parametrize("made", ["inside", "with buffers", "afterwards", "by hand"])
def test_an_empty_model_takes_a_plain_checkpoint(tmp_path, made):
    plain, x = net(), torch.randn(3, 4)
    with accelerate.init_empty_weights(include_buffers=made == "with buffers"):
        model = net()
        if made == "by hand":
            layers = dip.DIPLinear(4, 8), nn.ReLU(), dip.DIPLinear(8, 2)
            model = dip.number_layers(nn.Sequential(*layers))
        elif made != "afterwards":
            dip.convert(model)
    if made == "afterwards":
        dip.convert(model)
    spoil(4, 8, 8, 16)
    load_and_dispatch(model, plain.state_dict(), tmp_path, MAPS[1])
    assert all_are(model, START)
    assert torch.equal(noise(model, x), noise(dip.convert(plain), x))


def test_a_plain_checkpoint_on_disk_without_variances_is_refused_with_the_way_out(tmp_path):
    model = load_and_dispatch(empty(), net().state_dict(), tmp_path, MAPS[2])
    with pytest.raises(RuntimeError, match="Load it, convert, then dispatch"):
        noise(model, torch.randn(3, 4))


def test_conversion_after_dispatch_is_refused_and_the_way_out_works(tmp_path):
    model, x = net(), torch.randn(3, 4)
    dispatched(model, tmp_path, "dispatch")
    with pytest.raises(ValueError, match=r"convert before dispatching.*\n?.*remove_hook_from_sub"):
        dip.convert(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    dip.convert(model)
    expected = noise(model, x)
    dispatched(model, tmp_path / "again", "dispatch")
    assert torch.equal(noise(model, x), expected)


def test_an_offloaded_layer_is_named_by_check_for_it_does_not_learn(tmp_path):
    model, x = dip.convert(net()), torch.randn(3, 4)
    dispatched(model, tmp_path, "dispatch")
    assert list(dip.check(model, x, strict=False).faults) == ["2"]
    with pytest.raises(ValueError, match="2: it drew noise, and accelerate has offloaded it"):
        dip.check(model, x)
    model.train()(x).sum().backward()
    assert list(dip.check(model, strict=False).faults) == ["2"]


def test_a_dispatched_model_goes_back_once_its_hooks_are_removed(tmp_path):
    model, x = dip.convert(net()), torch.randn(3, 4)
    expected = model.eval()(x)
    dispatched(model, tmp_path, "dispatch")
    with pytest.raises(ValueError, match="remove_hook_from_submodules"):
        dip.to_plain(model)
    assert torch.equal(model(x), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(dip.to_plain(model)(x), expected)


def test_the_objective_of_an_offloaded_model_counts_the_variances_that_learn(tmp_path):
    model, x = trained(dip.convert(net())), torch.randn(3, 4)
    resident = nn.ModuleList([model[0], model[1]])
    kl, weight = dip.kl_penalty(resident), dip.penalty(resident, 0.1, 0.2)
    dispatched(model, tmp_path, "dispatch")
    torch.testing.assert_close(dip.kl_penalty(model), kl)
    torch.testing.assert_close(dip.penalty(model, 0.1, 0.2), weight)
    out = dip.trajectories(model.train(), x, m=2)
    dip.objective(out, torch.zeros(3, 2), nn.functional.mse_loss, model).backward()
    assert bool(model[0].log_variance.grad.any())
    accelerate.hooks.remove_hook_from_submodules(model)
    accelerate.disk_offload(model, str(tmp_path / "all"), execution_device=torch.device("cpu"))
    assert dip.kl_penalty(model).item() == dip.penalty(model, 0.1, 0.2).item() == 0
