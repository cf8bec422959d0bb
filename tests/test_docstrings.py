"""Docstrings of public functions: in Google form, their examples run, and the API page shows
signatures that can be read."""

import doctest
import importlib
import inspect
import io
import os
import re

import pytest
import torch
import torch.nn.functional as F
from source_support import ROOT
from torch import nn

import dipkernels as dip
from dipkernels.models.convertible import TWINS
from dipkernels.ops.activations import ACTIVATIONS

PAGE = (ROOT / "docs" / "api.md").read_text()
NAMES = re.findall(r"^::: (dipkernels\.[\w.]+)", PAGE, re.MULTILINE)
DIAGNOSTICS = "predictor", "lipschitz", "smoothness", "output_variance", "signal_to_noise"
NAMES += [f"dipkernels.diagnostics.{name}" for name in DIAGNOSTICS]
# Each of these wants processes, another package or a result to be of use: docs/cluster.md and
# docs/guides/trainers.md have theirs.
WITHOUT_EXAMPLE = {
    "dipkernels.distributed.shard_variances",
    "dipkernels.distributed.parallelize_module",
}


def found(name):
    module, _, own = name.rpartition(".")
    return getattr(importlib.import_module(module), own)


def public(kind):
    for name in NAMES:
        if name == "dipkernels.diagnostics":
            continue
        if name.startswith("dipkernels.integrations"):
            # their classes want packages that are not always installed;
            # tests/test_trainers_guide.py runs them
            continue
        thing = found(name)
        if kind(thing) and not issubclass(type(thing), type(dip)):
            yield name, thing


EXAMPLES = [(name, thing) for name, thing in public(callable) if ">>>" in (thing.__doc__ or "")]


@pytest.mark.parametrize(
    ("name", "thing"), EXAMPLES, ids=[name.rpartition(".")[2] for name, _ in EXAMPLES]
)
def test_the_example_runs(name, thing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {
        "torch": torch,
        "nn": nn,
        "F": F,
        "dip": dip,
        "io": io,
        "os": os,
        "folder": str(tmp_path / "folder"),
    }
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), names, name, None, None)
    told = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=told.write)
    assert runner.failures == 0 and runner.tries > 0, told.getvalue()


def test_every_public_function_has_an_example():
    results = {
        "Report",
        "Tuned",
        "ProducerPlan",
        "PlanRow",
        "Certificate",
        "DIPConversionWarning",
    }  # what functions with an example return or warn
    with_example = {name for name, _ in EXAMPLES}
    missing = {name for name, _ in public(callable)} - with_example - WITHOUT_EXAMPLE
    assert {name.rpartition(".")[2] for name in missing} <= results


PUBLIC_ROUTINES = list(public(inspect.isroutine))


@pytest.mark.parametrize(
    ("name", "thing"), PUBLIC_ROUTINES, ids=[name for name, _ in PUBLIC_ROUTINES]
)
def test_a_docstring_names_every_argument_and_says_what_comes_back(name, thing):
    text = inspect.getdoc(thing)
    listed = set(
        re.findall(
            r"^    (\w+(?:, \w+)*): ",
            text.partition("Args:\n")[2].partition("\n\n")[0],
            re.MULTILINE,
        )
    )
    listed = {each for group in listed for each in group.split(", ")}
    assert listed == set(inspect.signature(thing).parameters), name
    if inspect.signature(thing).return_annotation not in ("None", None, inspect.Signature.empty):
        assert "Returns:\n" in text, name


def test_docstrings_list_every_activation():
    for thing in (dip.functional.dip_linear, dip.DIPActivation):
        assert [f'"{name}"' for name in ACTIVATIONS if f'"{name}"' not in thing.__doc__] == []


def test_defaults_can_be_read():
    """A signature shows values that a reader can type: no private name, no expression."""
    for name, thing in public(inspect.isroutine):
        for parameter in inspect.signature(thing).parameters.values():
            assert parameter.default is parameter.empty or "<" not in repr(parameter.default), (
                name,
                parameter,
            )
    tree = "".join(
        (ROOT / "dipkernels" / path).read_text() for path in ("models/convert.py", "config.py")
    )
    assert not re.search(r"^    \w+: [^\n]+ = tuple\(", tree, re.MULTILINE)
    # written out, for a reader
    assert dip.DIPConfig().types == tuple(kind.__name__ for kind in TWINS)
