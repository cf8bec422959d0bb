"""examples/digits.py: the demonstration runs from end to end and writes what it says."""

import json

import pytest

pytest.importorskip("sklearn")
import digits

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_quick_run_writes_its_table_plot_and_results(tmp_path, capsys):
    digits.main(["--quick", "--epochs", "2", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert all(variant in text for variant in digits.VARIANTS)
    assert "run it without --quick" in text and "What this shows" not in text
    assert all(head in text for head in ("clean", "PGD eps 0.1", "noise 0.5", "over plain"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["accuracy"]) == set(digits.VARIANTS)
    assert all(
        len(runs) == 1 and 0 <= runs[0]["clean"]["0"] <= 100
        for runs in results["accuracy"].values()
    )
    assert results["step_overhead"]["plain, m = 1"]["ratio"] == 1.0
    assert (tmp_path / "robustness.png").read_bytes().startswith(b"\x89PNG")


def test_variants_start_from_the_same_weights_and_only_dip_learns_its_variance():
    x = digits.load(1)[0]
    models = {variant: digits.build(variant, 1, x) for variant in digits.VARIANTS}
    for model in models.values():
        assert model[0].weight.equal(models["plain"][0].weight)
    assert not models["fixed sigma"][0].log_variance.requires_grad
    assert not models["input noise"][0].log_variance.requires_grad
    assert models["dip"][0].log_variance.requires_grad
    assert models["dip"][0].log_variance.equal(models["fixed sigma"][0].log_variance)
    assert [type(m).__name__ for m in models["input noise"] if hasattr(m, "weight")] == [
        "DIPLinear",
        "Linear",
        "Linear",
    ]


def test_pgd_stays_in_its_ball_and_hurts():
    x_train, _, x_test, y_test = digits.load(0)
    assert len(x_train) == digits.NUM_TRAIN
    assert len(x_train) + len(x_test) == 1797
    model = digits.build("plain", 0, x_train).eval()
    attacked = digits.pgd(model, x_test, y_test, 0.1, steps=5)
    assert (attacked - x_test).abs().max() <= 0.1 + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    loss = digits.F.cross_entropy
    assert loss(model(attacked), y_test) > loss(model(x_test), y_test)


@pytest.mark.parametrize(
    "arguments", [["--seeds", "0"], ["--epochs", "0", "--quick"], ["--threads", "0"]]
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        digits.main(arguments)
    assert "expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fixed", "said"), [(80.0, "ahead here: fixed sigma;"), (10.0, "the recipe is ahead")]
)
def test_the_words_at_the_end_are_those_of_the_figures(fixed, said):
    attacked = {"plain": 40.0, "fixed sigma": fixed, "input noise": 60.0, "dip": 70.4}
    results = {
        name: [{"clean": {"0": 95.0 + i}, "pgd": {"0.1": value}}]
        for i, (name, value) in enumerate(attacked.items())
    }
    lines = digits.in_words(results, {"dip, m = 4": {"ratio": 2.08}})
    assert len(lines) == 3
    assert "gets 40 of 100 digits right, the DIP recipe 70 (+30)" in lines[0]
    assert "95.0 and 98.0 (+3.0)" in lines[0]
    assert said.rstrip(";") in lines[1] and "input noise 60" in lines[1]
    assert "2.1 times the plain step" in lines[2]
