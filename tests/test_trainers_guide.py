"""docs/guides/trainers.md: each recipe runs, trains its variances, saves what loads, and is few
lines more than without."""

import contextlib
import io
import re

import pytest
import torch
from source_support import ROOT

import dipkernels as dip
from dipkernels.nn.numbering import dip_layers

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = (ROOT / "docs/guides/trainers.md").read_text()
RECIPES = dict(re.findall(r"^## ([^\n]+)\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
NEEDS = {
    "transformers": ["accelerate", "transformers"],
    "TRL": ["trl", "peft"],
    "Lightning": ["lightning"],
    "Plain": [],
}


def ran(name, folder, monkeypatch):
    """What the recipe leaves behind."""
    for module in NEEDS[name]:
        pytest.importorskip(module)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    code = next(code for title, code in RECIPES.items() if title.startswith(name))
    left = {"__name__": "recipe"}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(code, name, "exec"), left)
    return left


def learned(model):
    assert not any(
        torch.equal(layer.log_variance, layer.variance.log_prior)
        for layer in dip_layers(model).values()
    )
    return len(dip_layers(model))


def test_there_is_a_recipe_for_each_audience_and_each_is_short():
    assert [next(need for need in NEEDS if title.startswith(need)) for title in RECIPES] == list(
        NEEDS
    )
    for name, code in RECIPES.items():
        added = [
            line
            for line in code.splitlines()
            if re.search(r"dip|config\.(noise|traj|obj)|line\.", line, re.IGNORECASE)
        ]
        assert 3 <= len(added) <= 15, (name, added)


@pytest.mark.slow
def test_the_vision_recipe(tmp_path, monkeypatch):
    trainer = ran("transformers", tmp_path, monkeypatch)["trainer"]
    from transformers import AutoModelForImageClassification

    from dipkernels.integrations.transformers import from_pretrained

    assert learned(trainer.model) == 14
    loaded = from_pretrained(AutoModelForImageClassification, tmp_path / "out/vit/final")
    assert all(
        torch.equal(v, dip.variances(loaded)[n]) for n, v in dip.variances(trainer.model).items()
    )


@pytest.mark.slow
def test_the_lora_recipe(tmp_path, monkeypatch):
    left = ran("TRL", tmp_path, monkeypatch)
    import peft

    assert learned(left["trainer"].model) == 14
    folder = tmp_path / "out/sft/final"
    loaded = dip.load(
        peft.PeftModel.from_pretrained(left["LlamaForCausalLM"](left["config"]), folder), folder
    )
    want = dip.variances(left["trainer"].model)
    assert all(torch.equal(v, dip.variances(loaded)[n]) for n, v in want.items())


def test_the_lightning_recipe(tmp_path, monkeypatch):
    trainer = ran("Lightning", tmp_path, monkeypatch)["trainer"]
    assert learned(trainer.lightning_module) == 2 and trainer.global_step == 8


def test_the_plain_recipe(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    left = ran("Plain", tmp_path, monkeypatch)
    assert learned(left["model"]) == 2
    nn = torch.nn
    plain = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    plain.load_state_dict(torch.load(tmp_path / "model.pt"), strict=False)
    loaded = dip.load(plain, tmp_path)
    with dip.fixed_noise(1), dip.sampling_on():
        assert torch.equal(loaded(left["x"]), left["model"](left["x"]))
