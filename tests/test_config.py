"""DIPConfig: one value for a whole training, its JSON, and what apply, save and load make of it."""

import copy
import dataclasses
import json
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from plain_support import assert_plain
from program_support import PYTHON, printed
from source_support import ROOT
from torch import nn

import dipkernels as dip
from dipkernels.config import CONFIG_FILE, VARIANCES_FILE
from dipkernels.nn.numbering import dip_layers

safetensors = pytest.importorskip("safetensors")
X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
FULL = dip.DIPConfig(
    types=("Linear",),
    include=("0", "body.*"),
    exclude=("head",),
    before={"*.experts": -1},
    place="producer",
    share=(("q", "k"),),
    ratio={"body.*": 0.3, "*": 1.0},
    per="feature",
    start=0.3,
    m=4,
    kl=0.5,
    lambda_s=0.1,
    k=8,
    average="logits",
    key=7,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.body = nn.Linear(8, 16), nn.ModuleList([nn.Linear(16, 16)])
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body[0](self.up(x).relu()).relu())


def net():
    torch.manual_seed(0)
    return Net()


def assert_same_variances(model, like):
    got, want = dip.variances(model), dip.variances(like)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], values) for name, values in want.items())


def test_config_goes_through_json_and_back():
    for config in (dip.DIPConfig(), FULL, dip.DIPConfig(init_variance={"*": 0.1}, key=None)):
        assert dip.DIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config.to_dict()["version"] == 1
        assert dataclasses.replace(config, m=3).m == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.m = 2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"types": ("Liner",)}, r"types: expected names of some of .*got \['Liner'\]"),
        ({"types": ()}, "types: expected names"),
        ({"include": [1]}, "include: expected strings"),
        ({"exclude": 5}, "exclude: expected strings, got 5"),
        ({"share": "q_proj"}, "share: expected groups"),
        ({"share": None}, "share: expected strings"),
        ({"share": ["q_proj"]}, "share: expected groups"),
        ({"before": {1: 1}}, "before: expected strings"),
        ({"place": 3}, r"place: expected one of \('input', 'producer'\)"),
        ({"ratio": {1: 1.0}}, "ratio: expected a finite number > 0, or {pattern"),
        ({"ratio": {}}, "ratio: expected a finite number > 0"),
        ({"ratio": {"a": float("nan")}}, "ratio: expected a finite number > 0"),
        ({"ratio": 1.0, "init_variance": 0.1}, "ratio: expected None with init_variance"),
        ({"per": "all"}, r"per: expected one of \('layer', 'feature'\)"),
        ({"per": "feature", "init_variance": 0.1}, "per: expected 'layer' with init_variance"),
        ({"start": 0.3, "init_variance": 0.1}, "start: expected None with init_variance"),
        ({"lambda_s": 1.0, "m": 1}, "lambda_s: expected 0 with m = 1"),
        ({"average": None}, "average: expected one of"),
        ({"average": "mean"}, "average: expected one of"),
    ],
)
def test_config_refuses_by_name(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        dip.DIPConfig(**fields)


def test_unknown_keys_and_other_versions_are_refused(tmp_path):
    data = dip.DIPConfig().to_dict()
    with pytest.raises(ValueError, match=r"expected keys among .*unknown \['neftune'\]"):
        dip.DIPConfig.from_dict({**data, "neftune": 5})
    with pytest.raises(ValueError, match=r"version: expected 1, .*got 2"):
        dip.DIPConfig.from_dict({**data, "version": 2})
    with pytest.raises(
        ValueError,
        match=r"version: expected 1, .*None; for fields written by hand take DIPConfig\(\*\*data\)",
    ):
        dip.DIPConfig.from_dict({"m": 4})
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=CONFIG_FILE):
        dip.DIPConfig.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"folder: expected a dip_config\.json"):
        dip.DIPConfig.load(tmp_path / "other")


def test_apply_is_convert_and_calibrate():
    model, want = net(), net()
    assert dip.apply(model, dip.DIPConfig(), iter(X.split(16))) is model
    dip.convert(want)
    dip.calibrate(want, X.split(16))
    assert_same_variances(model, want)
    dip.calibrate(want, [X], start=0.3)
    assert_same_variances(dip.apply(net(), dip.DIPConfig(start=0.3), [X]), want)
    assert dip.config_of(model) == dip.config_of(copy.deepcopy(model)) == dip.DIPConfig()
    assert dip.config_of(dip.to_plain(model)) is None
    dip.apply(model, dip.DIPConfig(init_variance=0.04, types=["Linear"]))
    assert all(row.sigma_mean == pytest.approx(0.2) for row in dip.summary(model))


def test_to_plain_forgets_the_config():
    """A server reads the plain model without this package, and what is converted next is another
    model."""
    model = dip.apply(net(), dip.DIPConfig(), [X])
    dip.to_plain(model)
    assert_plain(model, net())
    assert b"dipkernels" not in pickle.dumps(model)
    assert dip.config_of(dip.convert(model)) is None


def test_apply_chooses_layers_and_amounts_by_pattern():
    ratio = {"body.*": 0.25, "*": 1.0}
    config = dip.DIPConfig(include=["up", "body"], ratio=ratio)
    model, whole = dip.apply(net(), config, X), net()
    assert list(dip_layers(model)) == ["up", "body.0"]
    dip.convert(whole, exclude=["head"])
    dip.calibrate(whole, [X], ratio=1.0)
    for name, factor in (("up", 1.0), ("body.0", 0.25)):
        got, want = (m.get_submodule(name).variance for m in (model, whole))
        assert torch.allclose(got.sigma, factor * want.sigma)
        assert torch.equal(got.log_prior, got.log_variance)
    dip.calibrate(whole, [X], ratio=ratio)
    assert all(torch.equal(v, dip.variances(whole)[n]) for n, v in dip.variances(model).items())
    low = dip.apply(net(), dip.DIPConfig(include=["up", "body"], ratio=ratio, start=0.5), X)
    assert torch.equal(low.up.variance.log_prior, model.up.variance.log_prior)
    assert torch.allclose(low.up.variance.sigma, 0.5 * model.up.variance.sigma)
    model = dip.apply(net(), dip.DIPConfig(init_variance={"head": 1.0, "*": 0.25}, exclude=["up"]))
    assert [round(row.sigma_mean, 5) for row in dip.summary(model)] == [0.5, 1.0]


def test_a_last_pattern_for_all_others_may_be_left_with_none():
    for fields in ({"ratio": {"up": 0.5, "*": 1.0}}, {"init_variance": {"up": 0.5, "*": 1.0}}):
        config = dip.DIPConfig(exclude=["body.*", "head"], **fields)
        assert list(dip_layers(dip.apply(net(), config, [X]))) == ["up"]
    with pytest.raises(ValueError, match=r"narrow patterns before wide ones, got \['up'\] behind"):
        dip.apply(net(), dip.DIPConfig(ratio={"*": 1.0, "up": 0.5}), [X])


def test_apply_noises_modules_by_name_and_shares():
    config = dip.DIPConfig(types=["Linear"], include=["up"], before=["body.0"], ratio=0.5)
    assert list(dip_layers(dip.apply(net(), config, [X]))) == ["up", "body.0"]


def test_parts_with_configs_that_differ_have_no_config_together(tmp_path):
    def parts(*kls):
        made = [dip.DIPConfig(init_variance=0.01, kl=kl) for kl in kls]
        return nn.ModuleList(dip.apply(net(), config) for config in made)

    model = parts(0.1, 0.2)
    for call in (dip.config_of, lambda model: dip.save(model, tmp_path)):
        with pytest.raises(ValueError, match=r"^model: expected one config .* \['0', '1'\]; apply"):
            call(model)
    assert not list(tmp_path.iterdir())
    assert dip.config_of(model[1]).kl == 0.2 and dip.config_of(parts(0.1, 0.1)).kl == 0.1
    dip.to_plain(model[0])
    assert dip.config_of(model).kl == 0.2


def test_what_a_folder_sets_in_a_model_of_parts_is_of_its_config(tmp_path):
    saved, model = (nn.Sequential(net(), nn.Linear(4, 2)) for _ in range(2))
    dip.apply(saved[0], dip.DIPConfig(ratio=0.3, kl=0.2), [X])
    dip.save(saved, tmp_path)
    dip.apply(model[0], dip.DIPConfig(ratio=0.3, kl=0.1), [X])
    dip.load(model, tmp_path)
    assert dip.config_of(model).kl == dip.config_of(model[0]).kl == 0.2


def test_a_folder_of_a_model_with_one_converted_part_loads_where_that_part_is_converted(tmp_path):
    model, same = (nn.Sequential(net(), nn.Linear(4, 2)) for _ in range(2))
    dip.apply(model[0], dip.DIPConfig(ratio=0.3), [X])
    dip.save(model, tmp_path)
    with pytest.raises(
        ValueError, match=r"got none for \['1\.variance.* convert that part of this"
    ):
        dip.load(same, tmp_path)
    assert not dip_layers(same)
    dip.apply(same[0], dip.DIPConfig.load(tmp_path), [X])
    assert_same_variances(dip.load(same, tmp_path), model)


def test_layers_that_share_a_variance_take_one_ratio():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.q(x) * self.k(x)

    share, model = [("q", "k")], Pair()
    alike = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"^ratio: expected one value .* \['q', 'k'\]; let one"):
        dip.apply(model, dip.DIPConfig(share=share, ratio={"q": 0.5, "*": 0.1}), [X])
    assert not dip_layers(model)
    dip.apply(model, dip.DIPConfig(share=share, ratio={"q": 0.5, "k": 0.5}), [X])
    dip.apply(alike, dip.DIPConfig(share=share, ratio=0.5), [X])
    assert torch.allclose(model.q.variance.sigma, alike.q.variance.sigma)


LIKE_HEAD = r"\['haed'\] that match none; names like them: \['head'\]"


@pytest.mark.parametrize(
    "fields, batches, message",
    [
        ({}, None, "batches: expected some, because ratio"),
        ({}, [], "batches: expected at least one batch"),
        ({}, [torch.ones(4, 8)], "batches: expected inputs that vary"),
        ({"include": ["nothing"]}, [X], r"include: expected patterns .*'nothing'"),
        ({"exclude": ["nothing"]}, [X], "exclude: expected patterns"),
        (
            {"ratio": {"up": 1.0}},
            [X],
            r"ratio: expected a pattern for every layer, .* matches \['body.0', 'head'\]",
        ),
        ({"ratio": {"no": 1.0, "*": 1.0}}, [X], r"\['no'\] that match none$"),
        ({"ratio": {"haed": 1.0, "*": 1.0}}, [X], LIKE_HEAD),
        ({"ratio": {"*": 1.0, "up": 2.0}}, [X], r"narrow .* \['up'\] behind"),
        ({"before": ["body.0"], "init_variance": 0.1}, None, "batches: expected a batch"),
    ],
)
def test_a_refused_apply_leaves_the_model_plain(fields, batches, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        dip.apply(model, dip.DIPConfig(**fields), batches)
    assert not dip_layers(model) and dip.config_of(model) is None and type(model.up) is nn.Linear


def test_a_config_that_is_a_mapping_is_named():
    with pytest.raises(TypeError, match="config: expected a DIPConfig, got dict"):
        dip.apply(net(), {"m": 2}, [X])


def test_place_producer_is_applied_saved_and_loaded(tmp_path):
    def normed():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))

    model, x = normed(), torch.randn(5, 4)
    dip.apply(model, dip.DIPConfig(place="producer"), [x])
    assert type(model[1]).__name__ == "DIPLayerNorm" and type(model[2]) is nn.Linear
    dip.save(model, tmp_path)
    again = dip.load(normed(), tmp_path, [x])
    with dip.fixed_noise(5):
        assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="batches"):
        dip.load(normed(), tmp_path)


def test_apply_twice_is_refused():
    model = dip.apply(net(), dip.DIPConfig(), [X])
    with pytest.raises(ValueError, match="model: expected one without DIP layers"):
        dip.apply(model, dip.DIPConfig(), [X])
    assert len(dip_layers(model)) == 3


PREDICT = """
import sys, torch, dipkernels as dip
sys.path.insert(0, sys.argv[1])
from test_config import X, Net
model = Net()
model.load_state_dict(torch.load(sys.argv[2] + "/plain.pt", weights_only=True))
dip.load(model, sys.argv[2])
with dip.fixed_noise(3):
    torch.save(dip.config_of(model).predict(model, X), sys.argv[2] + "/predicted.pt")
"""


def test_a_saved_folder_loads_in_a_fresh_process_and_predicts_the_same(tmp_path):
    model = dip.apply(net(), dip.DIPConfig(k=4, ratio={"up": 0.5, "*": 1.0}), [X])
    with torch.no_grad():
        for layer in dip_layers(model).values():
            layer.log_variance.add_(torch.randn_like(layer.log_variance))
    with dip.fixed_noise(3):
        want = dip.config_of(model).predict(model, X)
    dip.save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [VARIANCES_FILE, CONFIG_FILE]
    with safetensors.safe_open(tmp_path / VARIANCES_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers reads no file without
    torch.save(dip.to_plain(copy.deepcopy(model)).state_dict(), tmp_path / "plain.pt")
    printed(PYTHON, "-c", PREDICT, ROOT / "tests", tmp_path)
    assert torch.equal(torch.load(tmp_path / "predicted.pt"), want)
    loaded = dip.load(net(), tmp_path)
    assert dip.config_of(loaded) == dip.config_of(model)
    assert_same_variances(loaded, model)


def test_of_several_ranks_the_first_alone_writes(tmp_path, monkeypatch):
    model = dip.apply(net(), dip.DIPConfig(init_variance=0.1))
    monkeypatch.setattr("dipkernels.config.has_ranks", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank, raising=False)
        dip.save(model, tmp_path / str(rank))
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_load_refuses_what_does_not_fit_and_leaves_a_plain_model_plain(tmp_path):
    model = dip.apply(net(), dip.DIPConfig(), [X])
    dip.save(model, tmp_path)
    wide = net()
    wide.up = nn.Linear(9, 16)
    said = r"dip.safetensors: .*\(given, expected\).*up.variance.log_variance"
    with pytest.raises(ValueError, match=said):
        dip.load(wide, tmp_path)
    assert not dip_layers(wide)
    config = dip.config_of(dip.apply(wide, dip.DIPConfig(init_variance=0.04)))
    with pytest.raises(ValueError, match=said):
        dip.load(wide, tmp_path)
    assert config is not None and dip.config_of(wide) == config  # of one with noise, its own
    with pytest.raises(ValueError, match="expected the variances of this model"):
        dip.load(nn.Sequential(nn.Linear(8, 3)), tmp_path)
    (tmp_path / VARIANCES_FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected a file of safetensors"):
        dip.load(net(), tmp_path)
    (tmp_path / VARIANCES_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a dip\.safetensors.*load_variances"):
        dip.load(net(), tmp_path)
    with pytest.raises(ValueError, match=r"model: expected one that dip\.apply has converted"):
        dip.save(dip.convert(net()), tmp_path)
    with pytest.raises(TypeError, match="model: expected"):
        dip.save(tmp_path, model)


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    model = dip.apply(net(), dip.DIPConfig(), [X])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        dip.save(model, tmp_path)


def test_a_loop_by_the_config_is_the_loop_by_hand():
    config = dip.DIPConfig(m=3, kl=0.5, lambda_s=0.1, k=5, average="logits", key=40)
    model = dip.apply(net(), config, [X])
    with config.noise(2, row0=6):
        loss = config.objective(config.trajectories(model, X), Y, F.cross_entropy, model)
    with dip.fixed_noise(42, row0=6):
        out = dip.trajectories(model, X, m=3)
        want = dip.objective(out, Y, F.cross_entropy, model, kl=0.5, lambda_s=0.1)
    assert torch.equal(loss, want)
    with dip.fixed_noise(1):
        got = config.predict(model, X)
        assert torch.equal(got, dip.predict(model, X, k=5, average="logits"))
        assert not torch.equal(got, config.predict(model, X, k=0))
    with pytest.raises(ValueError, match="step: expected an integer"):
        config.noise(-1)
    drawn = dip.DIPConfig(key=None)
    with drawn.noise(0):
        first = model(X)
    with drawn.noise(0):
        assert not torch.equal(first, model(X))


def check_sharded(rank, world, folder):
    from torch.distributed.fsdp import fully_shard

    model = dip.apply(net(), dip.DIPConfig(ratio=0.5), [X])
    want = dip.variances(model)
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    fully_shard(dip.shard_variances(model, mesh=mesh), mesh=mesh)
    assert dip.metrics(model)["dip/share"] == pytest.approx(1.0)
    dip.save(model, folder)
    torch.distributed.barrier()
    dip.load_variances(model, {name: torch.zeros_like(v) for name, v in want.items()})
    dip.load(model, folder)
    got = dip.variances(model)
    assert all(torch.equal(got[name], v) for name, v in want.items())
    return dip.config_of(model).ratio


@pytest.mark.slow
def test_a_sharded_model_saves_whole_variances_and_loads_them(ranks, tmp_path):
    assert ranks.run(check_sharded, str(tmp_path)) == [0.5, 0.5]
    whole = dip.load(net(), tmp_path)
    assert dip.variances(whole)["up.variance.log_variance"].shape == (8,)
