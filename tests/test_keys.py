"""What a network learns of a noise that comes again. docs/guides/reproducibility.md."""

import contextlib
import copy
import functools
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from warning_support import no_warning

import dipkernels as dip
from dipkernels import worlds


@pytest.mark.parametrize("place", ["input", "producer"])
def test_one_key_for_support_and_query_gives_the_classes_away(place):
    """MAML on tasks with nothing to learn, ordered by class: five classes, told by the noise."""
    plain = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    plain.append(nn.Linear(64, 5))
    order = torch.arange(5).repeat_interleave(4)

    def right(keys):
        """The share of queries that are answered, late in training."""
        torch.manual_seed(0)
        x = torch.randn(64, 16)
        batches = {"batches": [x]} if place == "producer" else {}
        model = dip.convert(copy.deepcopy(plain), place=place, **batches)
        dip.calibrate(model, [x], ratio=1.0)
        optimizer, hits = torch.optim.Adam(dip.param_groups(model, lr=3e-3)), []
        weights = {n: p for n, p in model.named_parameters() if not n.endswith("log_variance")}
        for step in range(80):
            support, query, y = torch.randn(20, 16), torch.randn(20, 16), torch.randperm(5)[order]
            adapted = weights
            with dip.fixed_noise(keys * step):
                for _ in range(2):
                    out = torch.func.functional_call(model, adapted, (support,))
                    loss = F.cross_entropy(out, y)
                    slopes = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
                    adapted = {n: p - 0.4 * g for (n, p), g in zip(adapted.items(), slopes)}
            with dip.fixed_noise(keys * step + keys - 1):
                out = torch.func.functional_call(model, adapted, (query,))
            optimizer.zero_grad()
            F.cross_entropy(out, y).backward()
            optimizer.step()
            hits.append((out.argmax(-1) == y).float().mean())
        return torch.stack(hits[-30:]).mean().item()

    assert right(keys=1) > 0.6
    assert right(keys=2) < 0.3


def steps_of(model, context_of, number=11):
    """What a training says of its keys."""
    optimizer = torch.optim.AdamW(dip.param_groups(model, lr=1e-3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(number):
            with context_of(step):
                loss = dip.trajectories(model, torch.ones(2, 4), m=2).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [str(each.message) for each in caught]


def test_a_training_under_one_key_is_told_once():
    model = dip.convert(nn.Sequential(nn.Linear(4, 2)))
    assert steps_of(model, lambda step: dip.fixed_noise(3), number=10) == []
    (message,) = steps_of(model, lambda step: dip.fixed_noise(4), number=40)
    assert "11 steps" in message
    with dip.fixed_noise(5):
        assert steps_of(model, contextlib.nullcontext) == [message]


def test_keys_that_no_training_repeats_are_not_told():
    model = dip.convert(nn.Sequential(nn.Linear(4, 2)))

    def attack():
        """And a prediction under one key, in each step."""
        x = torch.ones(2, 4, requires_grad=True)
        with dip.fixed_noise(6):
            torch.autograd.grad(model(x).sum(), x)
            dip.predict(model, x, k=2)

    @contextlib.contextmanager
    def beside(step, after):
        if not after:
            attack()
        with dip.fixed_noise(step):
            yield
        if after:
            attack()

    assert steps_of(model, dip.fixed_noise, number=20) == []
    for after in (False, True):
        assert steps_of(model, functools.partial(beside, after=after), number=20) == []
    every_other = (contextlib.nullcontext(), dip.fixed_noise(6))
    assert steps_of(model, lambda step: every_other[step % 2], number=40) == []
    on_another_device = torch.tensor([7])  # its number is not read
    with mock.patch.object(worlds, "has_values", lambda key: False):
        assert steps_of(model, lambda step: dip.fixed_noise(on_another_device + step)) == []


def test_an_attack_under_one_key_is_not_told():
    """It has its own optimiser, of its input (Carlini and Wagner)."""
    model = dip.convert(nn.Sequential(nn.Linear(4, 2)))
    predict, x = dip.diagnostics.predictor(model, 2, key=7), nn.Parameter(torch.ones(2, 4))
    optimizer = torch.optim.Adam([x])
    with no_warning():
        for _ in range(20):
            predict(x).sum().backward()
            optimizer.step()


def test_trainings_that_are_compared_under_one_key_are_not_told():
    for _ in range(4):
        model = dip.convert(nn.Sequential(nn.Linear(4, 2)))
        assert steps_of(model, lambda step: dip.fixed_noise(8), number=5) == []


def test_steps_without_noise_are_not_told():
    """Nor those of a compiled model that are outside of the context: nobody sees its keys."""
    model, x = dip.convert(nn.Sequential(nn.Linear(4, 2))), torch.ones(2, 4)
    optimizer = torch.optim.AdamW(dip.param_groups(model, lr=1e-3))
    with no_warning():
        with dip.fixed_noise(10):
            model(x).sum().backward()
        for _ in range(20):
            optimizer.step()
            with dip.noise_off():
                model(x).sum().backward()


@pytest.mark.parametrize("first", ["weights", "variances"])
def test_a_training_of_two_optimisers_is_told(first):
    model, x = dip.convert(nn.Sequential(nn.Linear(4, 2))), torch.ones(2, 4)
    *weights, variances = dip.param_groups(model, lr=1e-3)
    optimizers = [torch.optim.AdamW(weights), torch.optim.AdamW([variances])]
    optimizers.sort(key=lambda o: o.param_groups[0] is variances, reverse=first == "variances")
    with pytest.warns(UserWarning, match="11 steps") as found, dip.fixed_noise(9):
        for _ in range(20):
            model(x).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert len(found) == 1


def test_lbfgs_learns_a_key_that_stays_and_no_key_of_few_iterations():
    def losses(iterations, step_of):
        """The loss under the last key, and under others."""
        torch.manual_seed(0)
        x = torch.randn(128, 6)
        y = (x @ torch.randn(6, 3) + 0.5 * torch.randn(128, 3)).argmax(1)
        model = dip.convert(nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)))
        dip.calibrate(model, [x])
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=iterations, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = dip.objective(dip.trajectories(model, x, m=4), y, F.cross_entropy, model)
            loss.backward()
            return loss

        for step in range(160 // iterations):
            with dip.fixed_noise(step_of(step)):
                optimizer.step(closure)
        with dip.fixed_noise(step_of(step)):
            own = closure().item()
        others = []
        for key in range(1000, 1010):
            with dip.fixed_noise(key):
                others.append(closure().item())
        return own, sum(others) / len(others)

    own, others = losses(20, lambda step: 0)
    assert others > 3 * own
    own, others = losses(4, lambda step: step)
    assert others < 1.5 * own


def test_a_compiled_training_under_one_key_is_told_where_its_steps_are_inside():
    """Nobody sees the passes of a compiled model, but what the steps are inside of."""
    torch._dynamo.reset()
    model = torch.compile(dip.convert(nn.Sequential(nn.Linear(4, 2))), backend="eager")
    with dip.fixed_noise(11):
        (message,) = steps_of(model, contextlib.nullcontext, 40)
    assert "11 steps" in message
    assert steps_of(model, dip.fixed_noise, number=20) == []
    optimizer = torch.optim.AdamW(dip.param_groups(model, lr=1e-3))
    with dip.fixed_noise(11), no_warning():
        for step in range(20):
            with dip.fixed_noise(step):
                model(torch.ones(4, 4)).sum().backward()  # of the size that is compiled
            optimizer.step()
    for mode, off in ((True, dip.noise_off()), (False, contextlib.nullcontext())):
        model.train(mode)
        with dip.fixed_noise(12), off:
            model(torch.ones(2, 4))  # compiled here, for torch itself warns then
            optimizer = torch.optim.AdamW(dip.param_groups(model, lr=1e-3))
            optimizer.zero_grad()
            with no_warning():
                for _ in range(20):
                    model(torch.ones(2, 4)).sum().backward()
                    optimizer.step()
