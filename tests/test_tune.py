"""tune: successive halving spends what it was given and picks the robust pair among those that stay
clean."""

import builtins

import numpy as np
import pytest
import torch

import dipkernels as dip
from dipkernels.training.objective import KL
from dipkernels.training.tune import plan


def made_up(ratio, kl, budget):
    """Noise helps robustness and, beyond ratio 0.6, costs clean accuracy; the default kl is
    the best of the weights. A score may be a tensor."""
    return {
        "clean": torch.tensor(0.9 - max(0.0, ratio - 0.6) * 0.1),
        "robust": 0.5 + 0.2 * ratio - abs(kl - KL) / 10,
    }


def test_the_most_robust_pair_that_stays_clean_is_chosen():
    found = dip.tune(made_up, 100, progress=False)
    assert (found.ratio, found.kl) == (0.6, KL)
    assert (found.best.ratio, found.best.kl) == (0.6, KL) and type(found.best.clean) is float
    loose = dip.tune(made_up, 100, tolerance=0.2, progress=False)
    assert (loose.ratio, loose.kl) == (1.5, KL)
    chosen = [line for line in str(found).splitlines() if "chosen" in line]
    assert len(chosen) == 1 and chosen[0].split()[:2] == ["0.6", f"{KL:g}"]


def test_each_round_halves_the_pairs_and_doubles_what_they_get():
    spent = []

    def run(ratio, kl, budget):
        spent.append(budget)
        return made_up(ratio, kl, budget)

    found = dip.tune(run, 220, progress=False)
    assert 200 < sum(spent) <= 220
    assert plan(12, 220) == [(12, 4), (6, 8), (3, 16), (2, 32)]
    assert spent == [4] * 12 + [8] * 6 + [16] * 3 + [32] * 2
    assert [t.budget for t in found.trials] == spent
    assert plan(1, 7) == [(1, 7)]


def test_beyond_the_tolerance_the_cleaner_pair_goes_on():
    clean = {1: 0.9, 2: 0.5, 3: 0.6, 4: 0.7}
    run = lambda ratio, kl, budget: {"clean": clean[ratio], "robust": 1 - clean[ratio]}  # noqa: E731
    found = dip.tune(run, 8, ratios=clean, kls=1, progress=False)
    assert [t.ratio for t in found.trials] == [1, 2, 3, 4, 1, 4] and found.ratio == 1


def test_a_bar_and_a_plot_where_there_is_something_to_draw_with(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    found = dip.tune(made_up, 100)
    assert "tune" in capsys.readouterr().err
    drawn = found.plot(tmp_path / "trade.png")
    assert drawn.axes[0].get_xlabel() == found.plot().axes[0].get_xlabel()
    assert (tmp_path / "trade.png").stat().st_size > 5000
    real = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    assert dip.tune(made_up, 100).ratio == 0.6
    assert capsys.readouterr().err == ""


def test_what_was_chosen_of_a_tensor_or_an_array_are_floats():
    for ratios in (torch.tensor([0.5, 1.0]), np.array([0.5, 1.0])):
        found = dip.tune(made_up, budget=6, ratios=ratios, kls=(0.4,), progress=False)
        assert type(found.ratio) is float and type(found.kl) is float


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("a", {"budget": 100}, r"^run: expected a function of .*, got str$"),
        (made_up, {"budget": 10}, "^budget: expected at least 52 units for 12 pairs, got 10"),
        (made_up, {"budget": 100, "ratios": []}, "^ratios, kls: "),
        (made_up, {"budget": 100, "ratios": None}, "^ratios: expected a finite number > 0, got N"),
        (made_up, {"budget": 100, "kls": "0.4"}, "^kls: expected a finite number >= 0, got '0.4'"),
        (lambda *a: {"clean": 1}, {"budget": 100}, "^run: expected a mapping"),
        (lambda *a: 0.5, {"budget": 100}, "^run: expected a mapping"),
        (
            lambda *a: {"clean": 1, "robust": float("nan")},
            {"budget": 100},
            "^run: expected finite scores",
        ),
    ],
)
def test_bad_input_is_named(run, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dip.tune(run, progress=False, **options)
