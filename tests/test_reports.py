"""metrics, plot, progress and summary().to_dict(): what the noise of a model is, to look at."""

import io
import json
import math

import pytest
import torch
from torch import nn

import dipkernels as dip

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def model_with(*sigmas):
    """blocks.0.q, blocks.0.k, blocks.1.q, ... each at its sigma, with priors of sigma 1."""
    blocks = nn.ModuleList(
        nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)}) for _ in range(len(sigmas) // 2)
    )
    model = dip.convert(nn.ModuleDict({"blocks": blocks}), 1.0)
    state = dip.variances(model)
    learned = [name for name in state if name.endswith("log_variance")]
    dip.load_variances(
        model, state | {n: torch.full((8,), 2 * math.log(s)) for n, s in zip(learned, sigmas)}
    )
    return model


def test_metrics_are_means_over_layers_and_over_groups_of_one_name():
    model = model_with(0.1, 0.2, 0.3, 0.4)
    with torch.no_grad():
        model["blocks"][0]["q"].variance.log_prior.fill_(2 * math.log(0.5))
    found = dip.metrics(model)
    assert found["dip/sigma"] == pytest.approx(0.25)
    assert found["dip/share"] == pytest.approx((0.2 + 0.2 + 0.3 + 0.4) / 4)
    assert found["dip/sigma/blocks.q"] == pytest.approx(0.2)
    assert found["dip/sigma/blocks.k"] == pytest.approx(0.3)
    assert found["dip/share/blocks.q"] == pytest.approx(0.25)
    assert found["dip/kl"] == pytest.approx(dip.kl_penalty(model, 1.0).item())
    assert all(isinstance(value, float) for value in found.values()) and len(found) == 7
    assert "dip/sigma/DIPLinear" in dip.metrics(dip.convert(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="expected DIP layers"):
        dip.metrics(nn.Linear(8, 8))


def test_summary_as_a_dict_goes_through_json():
    model = dip.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
    table = json.loads(json.dumps(dip.summary(model, [X]).to_dict()))
    assert list(table) == ["0", "1"] and table["0"]["features"] == 8
    assert table["0"].keys() == {
        "type",
        "features",
        "sigma_min",
        "sigma_mean",
        "sigma_max",
        "ratio",
        "number",
    }


def test_plot_draws_sigma_of_every_layer_before_and_after(tmp_path):
    pytest.importorskip("matplotlib")
    model = model_with(0.1, 0.2, 0.3, 0.4)
    figure = dip.plot(model, tmp_path / "sigma.png")
    assert (tmp_path / "sigma.png").stat().st_size > 1000
    drawn = [container.lines[0].get_ydata().tolist() for container in figure.axes[0].containers]
    assert drawn[0] == pytest.approx([1.0] * 4) and drawn[1] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    earlier = dip.variances(model_with(0.5, 0.6, 0.7, 0.8))
    drawn = dip.plot(model, before=earlier).axes[0].containers[0].lines[0].get_ydata()
    assert drawn.tolist() == pytest.approx([0.5, 0.6, 0.7, 0.8])
    with pytest.raises(ValueError, match="before: expected the variances of 4 layers"):
        dip.plot(model, before={})


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_gives_the_batches_and_a_line_with_sigma():
    model, file = model_with(0.2, 0.4), io.StringIO()
    seen = []
    for batch in (line := dip.progress(list(range(20)), model, file=file)):
        seen.append(batch)
        line.update(loss=torch.tensor(0.5) * batch)
    assert seen == list(range(20))
    lines = file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("20/20  loss 9.5  sigma 0.3 (30% of the prior)")
    file = io.StringIO()
    assert list(dip.progress(iter("abc"), model, every=2, file=file)) == list("abc")
    assert file.getvalue().startswith("2  sigma 0.3") and file.getvalue().count("\n") == 1
    file = Terminal()
    assert list(dip.progress("ab", model, file=file)) == ["a", "b"]
    assert file.getvalue().startswith("\r\x1b[K2/2") and file.getvalue().endswith("\n")
    for arguments, message in (
        (([], nn.Linear(2, 2)), "expected DIP layers"),
        (([], model), "every: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            dip.progress(*arguments, every=0)


def test_progress_over_a_loader_without_a_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(X)

    loader, file = torch.utils.data.DataLoader(Stream(), 8), io.StringIO()
    model = dip.convert(nn.Sequential(nn.Linear(8, 2)))
    assert len(list(dip.progress(loader, model, every=2, file=file))) == 4
    assert [line.split()[0] for line in file.getvalue().splitlines()] == ["2", "4"]
