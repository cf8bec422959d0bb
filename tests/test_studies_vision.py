"""studies/vision.py: attacks and corruptions do what they say, methods differ where they should,
the command runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import results_page
import vision
import vision_methods
import vision_setup

import dipkernels as dip

SHARED = {"seed": 1, "lr": 1e-3, "weight_decay": 0.01, "m": 2, "batch": 50, "epochs": 1}
SHARED["training"] = "clean"
SETTINGS = {
    "plain": {"m": 1},
    "input noise": {"sigma": 0.2},
    "fixed variance": {"sigma": 0.2},
    "GaussianDropout": {"rate": 0.2},
    "SAM": {"m": 1, "rho": 0.05},
    "DIP": {"sigma": 0.2, "alpha": 0.1},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(method, arch="MLP"):
    return SHARED | SETTINGS[method] | {"method": method, "arch": arch}


# ---- data, corruptions, attacks ------------------------------------------------------------------


def test_test_images_are_never_trained_or_validated_on():
    x, _ = vision_setup.digits()
    test = {image.numpy().tobytes() for image in x[vision_setup.NUM_DEV :]}
    for seed in (0, 100):
        parts = vision_setup.split(seed)
        assert [len(parts[name][0]) for name in ("train", "val", "test")] == [500, 400, 897]
        assert parts["test"][0].equal(x[vision_setup.NUM_DEV :])
        train, val = (
            {image.numpy().tobytes() for image in parts[name][0]} for name in ("train", "val")
        )
        assert not train & val and not (train | val) & test
    assert not vision_setup.split(0)["train"][0].equal(vision_setup.split(1)["train"][0])


def test_corruptions_keep_the_shape_and_strength_zero_is_the_limit():
    x = vision_setup.digits()[0][:40]
    torch.manual_seed(0)
    for corrupt, strengths in vision_setup.CORRUPTIONS.values():
        for strength in strengths:
            changed = corrupt(x, strength)
            assert changed.shape == x.shape
            assert not changed.allclose(x)
    assert vision_setup.contrast(x, 0.0).allclose(x)
    assert vision_setup.blur(x, 0.05).allclose(x, atol=1e-6)
    constant = torch.full((2, 1, 8, 8), 0.7)
    assert vision_setup.blur(constant, 1.0).allclose(constant)
    assert vision_setup.contrast(x, 1.0).std((1, 2, 3)).max() < 1e-6


def test_translation_moves_four_ways_and_fills_with_zeros():
    x = torch.zeros(4, 1, 8, 8)
    x[:, 0, 3, 4] = 1
    moved = vision_setup.translation(x, 2)
    places = [tuple(int(v) for v in torch.nonzero(image[0])[0]) for image in moved]
    assert sorted(places) == sorted([(1, 4), (5, 4), (3, 2), (3, 6)])
    assert vision_setup.translation(torch.ones(4, 1, 8, 8), 1).sum((1, 2, 3)).eq(56).all()


def test_attacks_stay_in_their_ball_and_pgd_hurts_most():
    x, y = (part[:100] for part in vision_setup.split(0)["train"])
    model, _ = vision_methods.train(config_of("plain") | {"epochs": 5}, x, y)
    loss = nn.CrossEntropyLoss()
    attacked = [vision_setup.fgsm(model, x, y, 0.1), vision_setup.pgd(model, x, y, 0.1, 10)]
    for images in attacked:
        assert (images - x).abs().max() <= 0.1 + 1e-6
        assert images.min() >= 0 and images.max() <= 1
    losses = [loss(model(images), y).item() for images in (x, *attacked)]
    assert losses[0] < losses[1] and losses[0] < losses[2]


# ---- methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", vision_setup.NETWORKS)
def test_every_method_starts_from_the_same_weights_and_predicts_without_noise(arch):
    x = vision_setup.digits()[0][:4]
    outs = {}
    for method in SETTINGS:
        model, _ = vision_methods.build(config_of(method, arch))
        outs[method] = model.eval()(x)
    assert all(out.equal(outs["plain"]) for out in outs.values())


@pytest.mark.parametrize("method", SETTINGS)
def test_noise_in_training_is_what_the_method_says(method):
    x = vision_setup.digits()[0][:4]
    model, _ = vision_methods.build(config_of(method))
    model.train()
    noisy = not model(x).equal(model(x))
    assert noisy == (method in vision_methods.SEVERAL)
    variances = [module for module in model.modules() if isinstance(module, dip.Variance)]
    assert len(variances) == {"input noise": 1, "fixed variance": 3, "DIP": 3}.get(method, 0)
    learns = [v.log_variance.requires_grad for v in variances]
    assert all(learns) if method == "DIP" else not any(learns)


def test_gaussian_dropout_multiplies_and_ends_when_removed():
    linear = nn.Sequential(nn.Linear(6, 6, bias=False))
    nn.init.eye_(linear[0].weight)
    hooks = vision_methods.GaussianDropout(linear, ["0"], rate=0.2)
    x = torch.cat([torch.zeros(1, 6), torch.full((20000, 6), 2.0)])
    out = linear.train()(x)
    assert out[0].eq(0).all()
    assert out[1:].mean().item() == pytest.approx(2, abs=0.02)
    assert out[1:].std().item() == pytest.approx(2 * (0.2 / 0.8) ** 0.5, rel=0.02)
    hooks.remove()
    assert linear(x).equal(x)


def test_sam_takes_its_gradient_at_the_ascended_weights():
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3).double(), torch.randn(7, 5).double(), torch.randint(3, (7,))
    start = [p.detach().clone() for p in model.parameters()]

    def loss():
        return nn.functional.cross_entropy(model(x), y)

    loss().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    vision_methods.ascend_and_return(model, 0.3, loss)
    assert all(p.allclose(s, atol=1e-12) for p, s in zip(model.parameters(), start))
    norm = torch.stack([g.norm() for g in grads]).norm()
    other = nn.Linear(5, 3).double()
    with torch.no_grad():
        for p, s, g in zip(other.parameters(), start, grads):
            p.copy_(s + 0.3 * g / norm)
    nn.functional.cross_entropy(other(x), y).backward()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


PLACEMENTS = {"every layer": 10, "first layer": 1, "blocks": 8, "attention": 4}
PLACEMENTS |= {"block MLPs": 4, "head": 1}


@pytest.mark.parametrize(("placement", "count"), PLACEMENTS.items())
def test_placements_reach_their_layers(placement, count):
    model, _ = vision_methods.build(config_of("DIP", "ViT") | {"placement": placement})
    assert len(dip.summary(model)) == count


def test_batch_norm_is_settled_without_noise():
    x, y = (part[:100] for part in vision_setup.split(0)["train"])
    model, _ = vision_methods.train(config_of("DIP", "ResNet") | {"sigma": 2.0}, x, y)
    first = model[0](x)  # eval mode: no noise
    assert model[1].running_mean.allclose(first.mean((0, 2, 3)), atol=1e-5)


# ---- results -------------------------------------------------------------------------------------


def test_a_stored_run_is_made_once_for_its_configuration(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": len(made)}

    store = results_page.Store(tmp_path / "runs")
    assert store.run({"a": 1, "b": 2}, make)["result"] == {"value": 1}
    again = results_page.Store(tmp_path / "runs")
    assert again.run({"b": 2, "a": 1}, make)["result"] == {"value": 1}
    assert again.run({"a": 1, "b": 3}, make)["result"] == {"value": 2}
    assert len(results_page.Store(tmp_path / "runs").runs) == 2
    assert again.runs[0]["environment"]["torch"] == torch.__version__


def test_processes_that_share_a_store_lose_nothing(tmp_path):
    one, two = (results_page.Store(tmp_path / "runs") for _ in range(2))
    one.run({"a": 1}, lambda: {"by": "one"})
    two.value("v", lambda: 5)
    two.run({"a": 2}, lambda: {"by": "two"})
    one.run({"a": 3}, lambda: {"by": "one"})
    found = two.run({"a": 1}, lambda: {"by": "two"})["result"]
    assert found == {"by": "one"}  # not made again
    whole = results_page.Store(tmp_path / "runs")
    assert [run["config"]["a"] for run in whole.runs] == [1, 2, 3]
    assert whole.values == {"v": 5}


@pytest.mark.parametrize("arch", vision_setup.NETWORKS)
def test_the_published_table_is_that_of_the_summary(arch):
    """Git keeps no run: what a table shows must stand in docs/results."""
    summary = json.loads((results_page.FOLDER / "vision.json").read_text())
    found = {}
    for run in summary["runs"]:
        setting = run["setting"]
        of_arch = setting["of"] == f"vision_{arch.lower()}"
        if of_arch and is_main(setting, summary["values"], arch):
            is_long = setting["epochs"] > vision.EPOCHS[arch]
            found[setting.get("training"), setting["method"], is_long] = run
    page = results_page.PAGE.read_text(encoding="utf-8")
    lines = page.split(f"<!-- vision-{arch.lower()}:begin -->")[1].split("<!--")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line[:2] == "| " and " ± " in line]
    assert len(rows) == len(found) == len(vision.TRAININGS) * len(vision.METHODS)
    for training, method, *cells in rows:
        run = found[training, method.split(",")[0], method.endswith("equal time")]
        for (kind, strength), cell in zip(vision.COLUMNS, cells):
            shown = [float(part) for part in cell.split(" ± ")]
            stored = run["result"]["scores"][kind][strength]
            assert shown == pytest.approx(stored, abs=0.056), (training, method, kind)


def is_main(setting, values, arch):
    """Whether a setting is a row of the main table: as chosen, on test images."""
    chosen = values[f"vision_{arch.lower()}"]["chosen"]
    wanted = chosen["plain"] | chosen[setting["method"]] | {"split": "test"}
    extra = {"variance_lr", "placement", "beta_factor", "lambda_s"} & setting.keys()
    several = vision.M[arch] if setting["method"] in vision.SEVERAL else 1
    return (
        not extra
        and setting["m"] == several
        and all(setting.get(name) == value for name, value in wanted.items())
    )


def test_a_summary_has_mean_and_spread_of_each_setting(tmp_path):
    store = results_page.Store(tmp_path / "runs")
    for seed in (0, 1):
        for method in ("a", "b"):
            result = {"clean": {"0": 90.0 + seed}, "sigma": {"1": [0.0, seed, 5.0]}}
            store.run({"method": method, "seed": seed}, lambda result=result: result)
    store.value("chosen", lambda: {"a": 1})
    results_page.summarise([store], tmp_path / "summary.json")
    found = json.loads((tmp_path / "summary.json").read_text())
    settings = [run["setting"] for run in found["runs"]]
    assert settings == [{"of": "runs", "method": name} for name in "ab"]
    assert found["runs"][0]["result"] == {"clean": {"0": [90.5, 0.71]}, "sigma": {"1": 0.5}}
    assert found["runs"][0]["seeds"] == 2 and found["values"] == {"runs": {"chosen": {"a": 1}}}
    assert len(found["environments"]) == 1


def test_the_published_page_has_every_section():
    text = results_page.PAGE.read_text(encoding="utf-8")
    names = ["averages", "search", "needs", "k", "smoothness", "mlp", "resnet", "vit"]
    names += [f"ablations-{arch.lower()}" for arch in vision.ABLATIONS]
    for name in names:
        for mark in ("begin", "end"):
            assert text.count(f"<!-- vision-{name}:{mark} -->") == 1


def test_a_run_of_one_network_leaves_what_is_of_all(monkeypatch):
    filled = []
    monkeypatch.setattr(vision.report, "fill", lambda page, name, text: filled.append(name))
    for table in ("main_table", "ablation_table"):
        monkeypatch.setattr(vision, table, lambda study: "")
    vision.write([SimpleNamespace(name="MLP")], None, vision.FOLDER)
    assert filled == ["vision-mlp", "vision-ablations-mlp"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["MLP", "ResNet", "ViT"])
def test_the_quick_run_writes_tables_figures_and_results(tmp_path, arch, monkeypatch):
    monkeypatch.setattr(vision, "KS", (1, 2))
    monkeypatch.setattr(vision, "SMOOTH_IMAGES", 4)
    monkeypatch.setattr(vision, "SMOOTH_K", 2)
    flags = ["--quick", "--archs", arch, "--out", str(tmp_path)]
    vision.main(flags)
    text = (tmp_path / "results.md").read_text()
    section = text.split(f"<!-- vision-{arch.lower()}:begin -->")[1].split("<!--")[0]
    assert all(f"| clean | {method} |" in section for method in vision.METHODS)
    assert "Algorithm 3" in text.split("<!-- vision-k:begin -->")[1]
    assert "deterministic" in text.split("<!-- vision-smoothness:begin -->")[1]
    assert (tmp_path / f"vision_{arch.lower()}_clean.svg").stat().st_size > 1000
    stored = results_page.Store(tmp_path / f"vision_{arch.lower()}")
    runs, values = stored.runs, stored.values
    monkeypatch.setattr(vision_methods, "train", None)  # from what is stored: nothing is trained
    vision.main(flags)
    assert (stored.runs, stored.values) == (runs, values)
    assert (tmp_path / "results.md").read_text() == text
