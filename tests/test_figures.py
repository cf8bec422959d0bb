"""The documentation's figures: drawn from committed records, for both themes, each line in the
legend, no baseline hidden."""

import json
import re
from pathlib import Path

import pytest
from source_support import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
import cost
import defaults
import features
import figures
import overhead
import report
import vision

RECORD = ROOT / "benchmarks" / "results" / "amd-0.1.0.json"
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def words(path: Path) -> str:
    return " ".join(re.findall(r">([^<>]+)</text>", path.read_text()))


def test_every_figure_is_shown_and_opens_large():
    shown = {}
    for page in PAGES:
        for link, target in re.findall(r"\[!\[[^\]]+\]\(([^)]+)\)\]\(([^)]+)\)", page.read_text()):
            assert link == target, page
            shown[(page.parent / link).resolve()] = page
    drawn = set((ROOT / "docs").rglob("*.svg"))
    assert set(shown) == drawn
    assert not [page for page in PAGES if re.search(r"(?<!\[)!\[", page.read_text())]


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.svg")), ids=lambda path: path.stem)
def test_a_figure_follows_the_theme_and_keeps_its_text(path):
    text = path.read_text()
    assert "prefers-color-scheme:dark" in text
    assert not [
        color for color in (figures.FOREGROUND, figures.BACKGROUND, figures.GRID) if color in text
    ]
    assert "<text" in text and len(words(path)) > 20
    assert not re.search(r"#(000000|ffffff)\b", text.split("</style>")[1]), (
        "a colour that one of the themes swallows"
    )


@pytest.mark.slow
def test_the_published_figures_are_those_of_the_records(tmp_path):
    """By their words: layout may move with matplotlib's release."""
    overhead.plot(report.load(RECORD, "overhead"), tmp_path / "overhead.svg")
    cost.plot(report.load(RECORD, "cost"), tmp_path / "cost.json")
    defaults.plot_ratio(
        json.loads((ROOT / "docs" / "results" / "ratio.json").read_text()), tmp_path
    )
    defaults.plot_gains((ROOT / "docs" / "results_defaults.md").read_text(), tmp_path)
    features.plot((ROOT / "docs" / "results_defaults.md").read_text(), tmp_path)
    vision.plots(["MLP"], vision.TRAININGS, ROOT / "docs" / "results", tmp_path)
    drawn = list(tmp_path.glob("*.svg"))
    assert len(drawn) == 1 + 3 + 3 + 2 + 2 + 4
    for path in drawn:
        (published,) = (ROOT / "docs").rglob(path.name)
        assert words(path) == words(published), path.name


def test_dip_lies_below_every_baseline_and_all_are_told_apart_without_colour():
    order = {method: figures.line_of(method)["zorder"] for method in figures.LINES}
    assert all(order["DIP"] < other for method, other in order.items() if method != "DIP")
    for several in (vision.METHODS, ("plain", "NEFTune", "DIP")):
        looks = {
            (str(figures.line_of(m)["linestyle"]), figures.line_of(m)["marker"]) for m in several
        }
        assert len(looks) == len(several)


def test_a_curve_figure_names_every_method():
    text = words(ROOT / "docs" / "results" / "vision_vit_clean.svg")
    assert all(method in text for method in vision.METHODS)
    # what lies outside is said
    assert "-51.8" in words(ROOT / "docs" / "assets" / "gains_clean.svg")
