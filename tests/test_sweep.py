"""tools/verify/sweep.py: it finds what is broken, and ends where a model crashes or hangs."""

import contextlib
import os
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
import sweep


def last(kind):
    return list(sweep.examine(kind))[-1]


@pytest.mark.parametrize("kind", ["llama", "resnet"])
def test_a_sound_type_passes(kind):
    row = last(kind)
    assert (row["status"], row["faults"], row["trains"]) == ("passed", [], 1)
    assert row["moved"] > 0


def test_what_cannot_be_built_says_why():
    row = last("bark")
    assert row["status"] == "not built" and "BarkModel" in row["why"]


@pytest.mark.parametrize(
    "kind, name, broken, words",
    [
        ("llama", "noise_off", contextlib.nullcontext, "without noise the training pass is not"),
        (
            "llama",
            "fixed_noise",
            lambda key: contextlib.nullcontext(),
            "fixed_noise does not repeat",
        ),
        ("led", "check", lambda *_, **__: SimpleNamespace(faults={}), "check does not name it"),
        ("llama", "to_plain", lambda model: model, "to_plain does not give the plain state dict"),
    ],
)
def test_what_is_broken_is_a_fault(monkeypatch, kind, name, broken, words):
    monkeypatch.setattr(sweep.dip, name, broken)
    row = last(kind)
    assert row["status"] == "fault" and words in "; ".join(row["faults"])


def test_a_crash_and_a_hang_are_rows_and_the_next_run_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(sweep, "SECONDS", 1)

    def examine(kind):
        if kind == "crash":
            os.abort()
        yield {"status": "fault", "faults": []}
        if kind == "hang":
            time.sleep(60)
        yield {"status": "passed", "faults": [], "trains": 1, "moved": 2, "left": 1}

    monkeypatch.setattr(sweep, "examine", examine)
    kinds = ["sound", "crash", "hang"]
    sweep.sweep(kinds, jobs=2, minutes=0, commit="c")
    assert "3 left for the next run" in capsys.readouterr().out
    sweep.sweep(kinds, jobs=2, minutes=1, commit="c")
    rows = sweep.load()
    assert rows["crash"]["status"] == "not built" and "ended with -6" in rows["crash"]["why"]
    assert (rows["hang"]["status"], rows["hang"]["faults"]) == ("fault", ["out of time"])
    text = sweep.report(kinds, rows)
    assert "| 3 | 3 | 2 | 1 | 1 | 2 of 3 |" in text and "- hang, out of time" in text
