"""dipkernels.testing: an operation beside its reference, and the first element that differs."""

import pytest
import torch

from dipkernels import library, reference, testing
from dipkernels.ops import registry

BACKENDS = ["reference", *(["cpu"] if "portable" in library.load().cpu_capabilities else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_operation_agrees_with_its_reference(backend, dtype):
    without = [(op, {"b": None}) for op in ("gate", "gate_bwd")] + [("norm_bwd", {"bias": None})]
    for op, given in [*((op, {}) for op in registry.SCHEMAS), *without]:
        found = testing.compare(op, backend, dtype=dtype, **given)
        assert found, str(found)
        assert str(found) == f"{op} on {backend!r}: as the reference"


def test_what_is_equal_agrees_without_tolerance():
    assert testing.compare("noise", "reference", tolerance=0.0)


@pytest.mark.parametrize("op", registry.SCHEMAS)
def test_every_call_has_the_same_inputs(monkeypatch, op):
    seen, right = [], getattr(reference, op)
    monkeypatch.setattr(
        reference, op, lambda *arguments: seen.append(arguments) or right(*arguments)
    )
    for seed in (0, 1):
        torch.manual_seed(seed)
        testing.compare(op, BACKENDS[-1])
    for once, again in zip(*seen, strict=True):
        same = torch.equal(once, again) if isinstance(once, torch.Tensor) else once == again
        assert same


def test_the_first_element_that_differs_is_named_with_its_draw(monkeypatch):
    right = reference.perturb

    def wrong(*arguments):
        u = right(*arguments)
        u[0, 3, 9] += 1.0
        u[1, 2, 4] += 1.0
        return u

    monkeypatch.setattr(reference, "perturb", wrong)
    found = testing.compare("perturb", BACKENDS[-1], (2, 4, 16), row0=100, col0=8)
    assert not found
    assert (found.output, found.count, found.index) == (0, 2, (0, 3, 9))
    assert found.expected == pytest.approx(found.got + 1, abs=1e-4)
    seed = torch.tensor([0x0123456789ABCDEF, 5])
    words = reference.words(seed, torch.tensor([103]), torch.tensor([2]), 0)[0, 0].tolist()
    assert "row 103, column 17, sample 0: group 2, word 0, its sine" in str(found)
    assert " ".join(f"{word:#010x}" for word in words) in str(found)
    assert f"z {float(reference.standard_normal(seed, 1, 1, 103, 17))!r}" in str(found)


def test_a_nan_and_a_wrong_shape_differ(monkeypatch):
    right = reference.perturb_bwd
    monkeypatch.setattr(
        reference,
        "perturb_bwd",
        lambda *a: right(*a).index_fill(0, torch.tensor([2]), float("nan")),
    )
    assert testing.compare("perturb_bwd", BACKENDS[-1]).index == (2,)
    monkeypatch.setattr(reference, "perturb_bwd", lambda *a: right(*a)[:-1])
    assert not testing.compare("perturb_bwd", BACKENDS[-1])


@pytest.mark.parametrize(
    "arguments, match",
    [
        (("pertub", "cpu"), "op: expected one of"),
        (("perturb", "gpu"), "backend: expected one of"),
        (("perturb", "reference", ()), "shape: expected"),
    ],
)
def test_compare_names_what_is_wrong(arguments, match):
    with pytest.raises(ValueError, match=match):
        testing.compare(*arguments)
    with pytest.raises(ValueError, match="arguments: expected some of"):
        testing.compare("perturb", "reference", rows=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU")
def test_compare_says_which_backend_is_missing():
    with pytest.raises(RuntimeError, match="backend: 'cuda' was asked for, but"):
        testing.compare("perturb", "cuda")
