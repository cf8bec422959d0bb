"""studies/: parts are stored and resumed, intervals are Student's, splits keep test data out, each
study runs."""

import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
import augmix
import extrapolation
import features
import images
import parts
import plots
import run_all
import tables
import tasks
import training
import uncertainty

import dipkernels as dip


def test_intervals_are_students_and_undecided_where_they_hold_zero():
    stats = pytest.importorskip("scipy.stats")
    values = [1.0, 2.5, 0.3, 1.9]
    mean, half = tables.interval(values)
    low, high = stats.t.interval(0.95, 3, mean, stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-3)
    assert tables.verdict(values) == "undecided" and tables.signed(values).endswith("?")
    assert tables.verdict([1.0, 1.1, 0.9]) == "better"
    assert tables.verdict([-1.0, -1.1, -0.9]) == "worse"
    assert tables.verdict([5.0]) == "undecided"


def test_methods_are_compared_by_seed_and_by_what_is_better():
    runs = {
        "plain": {0: {"nll": 1.0}, 1: {"nll": 3.0}},
        "other": {1: {"nll": 2.0}, 0: {"nll": 0.1}},
    }
    row = tables.compared(runs, {"nll": (-1, 2)}, {"plain": 1, "other": -1, "absent": 1})
    assert row["other"]["nll"]["text"] == "1.05" and set(row["other"]["nll"]) >= {"plain", "other"}
    assert row["other"]["nll"]["plain"]["mean"] == pytest.approx(-0.95)
    assert row["plain"]["nll"]["other"]["mean"] == pytest.approx(-0.95)
    assert row["other"]["nll"]["plain"]["verdict"] == "better"
    assert row["other"]["nll"]["plain"]["text"] == "-0.95 ± 0.64"
    assert "absent" not in row["plain"]["nll"]


def test_tables_are_drawn_with_their_intervals(tmp_path):
    assert tables.points("+1.2 ± 0.8 ?") == [(1.2, 0.8)]
    assert tables.points("80.9 (+0.4 ± 0.8)") == [(80.9, 0)]
    assert tables.points("-1.5? / +3.4") == [(-1.5, 0), (3.4, 0)]
    assert tables.points("0.42 0.81") == tables.points("plain") == tables.points("") == []
    pytest.importorskip("matplotlib")
    first = tables.markdown(
        ["task", "method", "clean", "sigma"],
        [["wine", "plain", "97.7", ""], ["wine", "1", "+0.5 ± 0.4", "0.6 0.9"]],
    )
    second = tables.markdown(["AdamW", "a", "b"], [["moons", "+1 / -2?", "-"]])
    paths = plots.draw(first + "\n\n" + second, tmp_path, ("clean", "pgd"))
    assert [path.name for path in paths] == ["table_1.svg", "table_2.svg"]
    shown, other = (path.read_text() for path in paths)
    assert "wine, plain" in shown and "wine, 1" in shown and "0.6 0.9" not in shown
    assert "moons" in other and "pgd" in other


def test_parts_are_stored_and_not_run_twice(tmp_path):
    calls = []

    def part(key):
        calls.append(key["n"])
        if key["n"] == 2 and len(calls) == 3:
            raise KeyboardInterrupt
        return {"square": key["n"] ** 2}

    keys = [{"n": n} for n in range(4)]
    with pytest.raises(KeyboardInterrupt):
        parts.run(part, keys, tmp_path)
    stored = [json.loads(file.read_text()) for file in tmp_path.glob("parts/*.json")]
    assert sorted(part["n"] for part in stored) == [0, 1]
    assert [r["square"] for r in parts.run(part, keys, tmp_path)] == [0, 1, 4, 9]
    assert calls == [0, 1, 2, 2, 3]


def test_all_studies_run_and_a_second_run_starts_what_did_not_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_all, "FOLDER", tmp_path)
    monkeypatch.setattr(run_all, "COMMANDS", ["works.py", "fails.py --once"])
    (tmp_path / "works.py").write_text("print('worked'); sum(range(10**6))")
    (tmp_path / "fails.py").write_text(
        "import pathlib, sys\nseen = pathlib.Path(__file__ + sys.argv[1])\n"
        "if not seen.exists(): seen.touch(); sys.exit(3)"
    )
    out = tmp_path / "out"
    assert run_all.main(["--out", str(out)]) == 1
    assert "failed: fails.py --once" in capsys.readouterr().out
    first = json.loads((out / "run_all.json").read_text())
    assert first["fails.py --once"]["status"] == 3 and first["works.py"]["seconds"] > 0
    assert run_all.main(["--out", str(out)]) == 0
    second = json.loads((out / "run_all.json").read_text())
    assert second["works.py"] == first["works.py"]  # not started again
    assert second["fails.py --once"]["seconds"] > first["fails.py --once"]["seconds"]
    assert (out / "run_all_0.log").read_text() == "worked\n"
    assert "hours of one core" in (out / "run_all.md").read_text()


def test_every_study_is_among_all():
    commands = " ".join(run_all.COMMANDS)
    for line in (Path(run_all.__file__).parent / "README.md").read_text().splitlines():
        if line.startswith("| `python studies/") and "run_all.py" not in line:
            name = line.split("/")[1].split(".py")[0]
            assert f"{name}.py" in commands or name == "fit_mixtures", name


def test_all_studies_average_as_their_page_says():
    page = (Path(run_all.__file__).parents[1] / "docs" / "results_averaging.md").read_text()
    named = set(re.findall(r"`python studies/(where_to_average\.py --[^`]+)`", page))
    assert len(named) == 2 and named <= set(run_all.COMMANDS)


def test_parts_of_other_defaults_are_not_taken(tmp_path, monkeypatch):
    def part(key):
        return {"kl": parts.DEFAULTS["kl"]}

    parts.run(part, [{"n": 0}], tmp_path)
    monkeypatch.setattr(parts, "DEFAULTS", parts.DEFAULTS | {"kl": 7.0})
    assert parts.run(part, [{"n": 0}], tmp_path) == [{"n": 0, "kl": 7.0}]


def test_a_search_never_sees_test_data():
    task = tasks.TASKS["wine"]
    data = tasks.split(task, 0)
    _, inner = tasks.validation(task, data)
    seen = torch.cat([inner.x, inner.x_test])
    assert torch.equal(seen, data.x)
    assert len(inner.x) < len(data.x) == task.train


def test_a_search_has_the_labels_at_hand(monkeypatch):
    seen = []
    monkeypatch.setattr(uncertainty, "train", lambda task, data, *rest: seen.append(data))
    monkeypatch.setattr(uncertainty.dip, "predict", lambda model, x, k: torch.ones(len(x), 3) / 3)
    key = {"task": "classes 20", "share": 0.4, "epochs": 0, "method": "plain", "options": None}
    assert uncertainty.part({**key, "stage": "search", "seed": 100}).keys() == {"nll"}
    whole, _ = uncertainty.without_last_class(tasks.split(tasks.TASKS["classes 20"], 100))
    noisy = uncertainty.mislabelled(whole, 0.4, 100)
    (inner,) = seen
    assert torch.equal(torch.cat([inner.x, inner.x_test]), whole.x)
    assert torch.equal(torch.cat([inner.y, inner.y_test]), noisy.y)


@pytest.mark.parametrize("method", ["plain, squared", "DIP, energy"])
def test_a_search_stays_inside(method, monkeypatch):
    pytest.importorskip("engression")
    seen = []

    def sampler(x, y, *how):
        return lambda at: seen.extend((x, at)) or torch.zeros(2, len(at))

    monkeypatch.setattr(extrapolation, "sampler", sampler)
    key = {"function": "square", "steps": 1, "method": method, "options": {}, "seed": 100}
    extrapolation.part({**key, "stage": "search"})
    fitted, held = seen
    assert held.max() <= extrapolation.UPPER and len(held) * 3 == len(fitted)
    assert not torch.isin(held, fitted).any()
    extrapolation.part({**key, "stage": "test"})
    assert len(seen[2]) == extrapolation.COUNT and seen[5].max() > extrapolation.UPPER


@pytest.mark.parametrize(
    ("score", "wanted"),
    [(parts.total, [{"ratio": 2}, {"ratio": 1}]), (lambda r: -r["clean"], [{"ratio": 1}] * 2)],
)
def test_a_search_takes_the_best_mean_over_seeds_of_its_own(score, wanted, tmp_path):
    scores = {("a", 1): (90, 10), ("a", 2): (40, 70), ("b", 1): (5, 0)}  # of seeds 100 and 101
    seen = []

    def part(key):
        seen.append((key["case"], key["stage"], key["seed"]))
        score = scores[key["method"], key["options"]["ratio"]][key["seed"] - 100]
        return {"clean": score, "pgd": 0, "noise": 0}

    search = {"a": [{"ratio": 1}, {"ratio": 2}], "b": [{"ratio": 1}]}
    best = parts.chosen(part, {"case": "x"}, search, tmp_path, 1, score=score)
    assert best == dict(zip("ab", wanted, strict=True))
    assert set(seen) == {("x", "search", 100), ("x", "search", 101)}


def test_every_method_has_as_many_settings_to_choose_from():
    for study in (features, uncertainty, extrapolation):
        assert {len(settings) for settings in study.SEARCH.values()} == {6}
    kept = {"fixed": True, "where": "input", "ratio": 0.3, "variance_rate": 3.0, "noise_dim": 20}
    assert tables.named(kept) == "ratio 0.3, rate 3, noise dim 20"


def test_every_method_on_images_has_as_many_settings_to_choose_from():
    counts = {method: len(settings) for method, settings in images.SEARCH.items()}
    assert counts == dict.fromkeys(set(images.TRAINED) - {"plain"}, 6)
    x, y = torch.rand(4, 1, 28, 28), torch.arange(4)
    task = tasks.Task(lambda: (x, y), images.bench("cnn", 1000).net, 4, 3, 4, 0.1, 0.1, image=True)
    data = tasks.Split(x, y, x, y)
    for method, settings in images.SEARCH.items():  # each makes another network
        several = method in ("learned", "AugMix")  # options, so that the ends do not show each
        tried = settings if several else settings[::5]
        trained = [images.train(task, data, 0, method, options, "tuned", 0.0) for options in tried]
        sums = [sum(p.double().sum().item() for p in model.parameters()) for model in trained]
        assert len(set(sums)) == len(tried) > 1, method


def test_a_table_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        images.main(["--model", "vit", "--trainings", "Gaussian"])
    assert "--trainings: expected tuned, or others of the CNN" in capsys.readouterr().err


def test_methods_of_a_seed_share_weights_and_start():
    task = tasks.TASKS["iris"]
    data = tasks.split(task, 0)
    plain, noisy, fixed = (
        training.train(task, data, 0, method, {"epochs": 0})
        for method in (None, {"ratio": 1.0}, {"ratio": 0.5, "fixed": True})
    )
    for model in (noisy, fixed):
        assert torch.equal(plain[0].weight, model[0].weight)
    assert training.kept(noisy) == [1.0] * 3
    assert fixed[0].variance.sigma[0] == pytest.approx(noisy[0].variance.sigma[0].item() / 2)
    only = training.prepare(task.net(), data.x, {"where": "input"})
    kinds = [type(m) for m in only if hasattr(m, "weight")]
    assert kinds == [dip.DIPLinear, torch.nn.Linear, torch.nn.Linear]


def test_pgd_stays_in_its_ball():
    task = tasks.TASKS["digits MLP"]
    data = tasks.split(task, 0)
    model = training.train(task, data, 0, None, {"epochs": 1})
    moved = training.pgd(task, data, model, 0, steps=3)
    assert (moved - data.x_test).abs().max() <= task.eps + 1e-6
    assert moved.min() >= 0 and moved.max() <= 1
    assert training.score(task, data, model, moved) < training.score(task, data, model, data.x_test)


def test_the_variances_follow_the_schedule():
    model = dip.convert(torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD(dip.param_groups(model, lr=1.0, variance_lr=1.0))
    schedule = training.cosine(optimizer, 4)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.5, 0.5])


def test_calibration_error_and_auroc():
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    # 0.1 / 2 + 0.1 / 2
    assert uncertainty.calibration_error(probs, torch.tensor([0, 0, 1, 0])) == pytest.approx(10.0)
    auroc = uncertainty.auroc(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1]))
    assert auroc == pytest.approx(87.5)


def test_labels_are_drawn_anew_in_training_only_and_the_last_class_is_left_out():
    data, unknown = uncertainty.without_last_class(tasks.split(tasks.TASKS["classes 20"], 0))
    assert data.y.max() == data.y_test.max() == 2 and len(unknown) > 100
    noisy = uncertainty.mislabelled(data, 0.4, 0)
    wrong = (noisy.y != data.y).double().mean().item()
    assert wrong == pytest.approx(0.4 * 2 / 3, abs=0.07) and noisy.y_test is data.y_test
    assert torch.equal(uncertainty.mislabelled(data, 0.0, 0).y, data.y)


def test_augmix_operations_are_pillows():
    image_ops = pytest.importorskip("PIL.ImageOps")
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    grey = torch.randint(40, 250, (2, 28, 28), generator=torch.Generator().manual_seed(0))
    grey[:, :9] = 40  # so that one value has more than its share
    level, sign = torch.tensor([2.5, 0.2]), torch.tensor([1.0, -1.0])
    bits, thresholds = (3, 4), (256 - 64, 256 - 5)
    for name, arguments in (
        ("autocontrast", ((), ())),
        ("equalize", ((), ())),
        ("posterize", tuple((n,) for n in bits)),
        ("solarize", tuple((n,) for n in thresholds)),
    ):
        came = getattr(augmix, name)(grey[:, None] / 255.0, level, sign)
        for own, source, given in zip(came, grey, arguments, strict=True):
            pillow = image.fromarray(source.byte().numpy())
            wanted = torch.tensor(np.array(getattr(image_ops, name)(pillow, *given)))
            # autocontrast rounds down in Pillow
            assert (255 * own[0] - wanted).abs().max() < (1.001 if name == "autocontrast" else 1e-3)
    x = torch.zeros(1, 1, 27, 27)
    x[..., 13, 13] = 1.0
    level, sign = torch.tensor([20 / 9]), torch.tensor([-1.0])  # 2 of 27 pixels
    assert augmix.translate_x(x, level, sign)[0, 0, 13, 15] == pytest.approx(1.0, abs=1e-4)
    assert augmix.translate_y(x, level, sign)[0, 0, 15, 13] == pytest.approx(1.0, abs=1e-4)
    x[..., 13, 13], x[..., 13, 20] = 0.0, 1.0
    turned = augmix.rotate(x, torch.tensor([30.0]), sign)  # a quarter
    assert turned[0, 0, 20, 13] == pytest.approx(1.0, abs=1e-4)
    assert augmix.shear_x(x, torch.tensor([3.0]), sign)[0, 0, 13, 20] == pytest.approx(1, abs=1e-4)
    assert augmix.shear_y(x, torch.tensor([0.0]), sign)[0, 0, 13, 20] == pytest.approx(1, abs=1e-4)


def test_augmix_mixes_images_and_pulls_predictions_together():
    x = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    first, again, other = (
        augmix.mixture(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == x.shape and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again)
    assert all((first - each).abs().flatten(1).amax(1).median() > 0.05 for each in (x, other))
    logits, y = torch.randn(5, 3), torch.tensor([0, 2, 1, 0, 0])
    plain = torch.nn.functional.cross_entropy(logits, y)
    torch.testing.assert_close(augmix.loss(logits, (logits, logits + 1), y), plain)
    sure = torch.tensor([[30.0, 0.0, 0.0]])  # one of three sure of another class
    apart = augmix.loss(sure, (sure, sure.roll(1, 1)), torch.tensor([0])).item()
    entropy = -(2 / 3) * math.log(2 / 3) - math.log(1 / 3) / 3
    assert apart == pytest.approx(augmix.WEIGHT * entropy, rel=1e-4)


def test_fashion_mnist_is_read_packed_or_not(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr(tasks, "FASHION", tmp_path)
    with pytest.raises(FileNotFoundError, match="FASHION_MNIST"):
        tasks.fashion()
    pixels = bytes(range(256)) * 49  # 16 images
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes(16) + pixels)
    labels = gzip.compress(bytes(8) + bytes(range(16)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(labels)
    x, y = tasks.fashion()
    assert x.shape == (16, 784) and y.tolist() == list(range(16))
    assert x[0, :3].tolist() == pytest.approx([0, 1 / 255, 2 / 255])


STUDIES = ["defaults", "features", "attacks", "uncertainty", "extrapolation", "held_back", "depth"]
STUDIES += ["images", "arithmetic_paired", "where_to_average"]


@pytest.mark.parametrize("flag", ["--seeds", "--workers"])
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_of_no_seeds_or_processes_is_refused(name, flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(name).main([flag, "0", "--out", str(tmp_path)])
    assert f"{flag}: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_each_study_runs(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    if name == "extrapolation":
        pytest.importorskip("engression")
    importlib.import_module(name).main(["--quick", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "summary.json").read_text())
    assert "plain" in capsys.readouterr().out
    assert (tmp_path / "table.md").stat().st_size > 100
    assert [*tmp_path.glob("table*.svg")]
