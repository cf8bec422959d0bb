"""studies/: parts are stored and resumed, intervals are Student's, splits keep test data out, each study runs."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
import features
import parts
import tables
import tasks
import training

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
    assert parts.run(part, keys, tmp_path, stored=True) == [{"n": 0, "square": 0}, {"n": 1, "square": 1}]
    assert [r["square"] for r in parts.run(part, keys, tmp_path)] == [0, 1, 4, 9]
    assert calls == [0, 1, 2, 2, 3]


def test_a_search_never_sees_test_data():
    task = tasks.TASKS["wine"]
    data = tasks.split(task, 0)
    _, inner = features.validation(task, data)
    seen = torch.cat([inner.x, inner.x_test])
    assert torch.equal(seen, data.x)
    assert len(inner.x) < len(data.x) == task.train


def test_methods_of_a_seed_share_weights_and_start():
    task = tasks.TASKS["iris"]
    data = tasks.split(task, 0)
    plain, noisy, fixed = (
        training.train(task, data, 0, method, {"epochs": 0}) for method in (None, {}, {"ratio": 0.5, "fixed": True})
    )
    assert torch.equal(plain[0].weight, noisy[0].weight) and torch.equal(plain[0].weight, fixed[0].weight)
    assert training.kept(noisy) == [1.0] * 3
    assert fixed[0].variance.sigma[0] == pytest.approx(noisy[0].variance.sigma[0].item() / 2)
    only = training.prepare(task.net(), data.x, {"where": "input"})
    assert [type(m) for m in only if hasattr(m, "weight")] == [dip.DIPLinear, torch.nn.Linear, torch.nn.Linear]


def test_pgd_stays_in_its_ball():
    task = tasks.TASKS["digits MLP"]
    data = tasks.split(task, 0)
    model = training.train(task, data, 0, None, {"epochs": 1})
    moved = training.pgd(task, data, model, 0, steps=3)
    assert (moved - data.x_test).abs().max() <= task.eps + 1e-6
    assert moved.min() >= 0 and moved.max() <= 1
    assert training.score(task, data, model, moved) < training.score(task, data, model, data.x_test)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["defaults", "features", "attacks"])
def test_each_study_runs(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    importlib.import_module(name).main(["--quick", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "summary.json").read_text())
    assert "default" in capsys.readouterr().out or name == "features"
    assert (tmp_path / "table.md").stat().st_size > 100
