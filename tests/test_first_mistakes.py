"""What a newcomer gets wrong in the first hour is answered in a newcomer's words."""

import functools
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dipkernels as dip
from dipkernels import library, producers

X, Y = torch.randn(6, 8), torch.randint(4, (6,))


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("model, name", [(X, "Tensor"), (nn.Linear, "the class Linear")])
@pytest.mark.parametrize(
    "call",
    [
        dip.convert,
        dip.to_plain,
        dip.check,
        dip.summary,
        dip.number_layers,
        lambda model: dip.calibrate(model, [X]),
        lambda model: dip.apply(model, dip.DIPConfig(init_variance=0.01)),
        lambda model: dip.param_groups(model, lr=0.1),
        lambda model: dip.predict(model, X, k=2),
        lambda model: dip.producer_plan(model, [X]),
        lambda model: dip.objective(torch.randn(2, 6, 4), Y, F.cross_entropy, model),
        lambda model: dip.penalty(model, 1.0, 0.1),
        dip.kl_penalty,
        dip.config_of,
    ],
)
def test_what_is_no_module_is_named(call, model, name):
    with pytest.raises(TypeError, match=rf"^model: expected a torch.nn.Module, got {name}$"):
        call(model)


def test_one_batch_stands_for_a_list_of_one():
    by_tensor, by_list = dip.convert(network()), dip.convert(network())
    by_list.load_state_dict(by_tensor.state_dict())
    dip.calibrate(by_tensor, X)
    dip.calibrate(by_list, [X])
    for name, variance in dip.variances(by_list).items():
        assert torch.equal(dip.variances(by_tensor)[name], variance), name
    rows = dip.summary(by_tensor, X), dip.summary(by_tensor, {"input": X})
    assert [row.ratio for row in rows[0]] == [row.ratio for row in rows[1]]


@pytest.mark.parametrize(
    "loss_fn, got", [(nn.CrossEntropyLoss, "the class CrossEntropyLoss"), (None, "None")]
)
def test_a_loss_that_cannot_be_called_is_named(loss_fn, got):
    model = dip.convert(network())
    out = dip.trajectories(model, X, m=2)
    with pytest.raises(TypeError, match=rf"loss_fn: expected a function .*\(\), got {got}$"):
        dip.objective(out, Y, loss_fn, model)
    dip.objective(out, Y, nn.CrossEntropyLoss(), model).backward()


def test_a_single_class_stands_for_a_list_of_one():
    model = dip.convert(network(), types=nn.Linear)
    assert len(dip.summary(model)) == 2


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.down_proj(x))


@pytest.mark.parametrize(
    "pattern, like",
    [("haed", r"\['1.head'\]"), ("down_proj", r"\['1.down_proj'\]"), ("*.dwn_proj", r"\['1.down")],
)
def test_a_pattern_that_matches_nothing_is_answered_with_the_names_like_it(pattern, like):
    model = nn.Sequential(nn.ReLU(), Named())
    config = dip.DIPConfig(include=[pattern], init_variance=0.01)
    calls = {
        "exclude": lambda: dip.convert(model, exclude=[pattern]),
        "include": lambda: dip.apply(model, config),
        "before": lambda: dip.convert(model, before=[pattern], batches=[torch.randn(2, 8)]),
        "init_variance": lambda: dip.convert(model, {pattern: 0.1, "*": 0.01}),
    }
    if pattern != "down_proj":  # share compares with a layer's own name too
        calls["share"] = lambda: dip.convert(model, share=[(pattern, "*head")])
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: .* match none; names like them: {like}"):
            call()
    with pytest.raises(ValueError, match=r"match none$"):
        dip.convert(model, exclude=["quite_another"])


def test_the_name_of_a_module_around_layers_is_answered_with_their_names():
    model = nn.Sequential(nn.ReLU(), Named())
    inside = r"names like them: \['1.down_proj', '1.head'\]$"
    with pytest.raises(ValueError, match=f"^init_variance: .*{inside}"):
        dip.convert(model, {"1": 0.1, "*": 0.01})
    with pytest.raises(ValueError, match=f"^share: .*{inside}"):
        dip.convert(model, share=[("1", "*head")])


def test_save_without_a_config_says_how_to_save(tmp_path):
    with pytest.raises(ValueError, match=r"torch\.save\(model\.state_dict\(\), path\)"):
        dip.save(dip.convert(network()), tmp_path)


def refused(stat, folder, path, *args, **options):
    if str(path).startswith(folder):
        raise PermissionError(13, "Permission denied", path)
    return stat(path, *args, **options)


def test_a_folder_of_source_that_hides_the_installed_package_is_named(tmp_path, fresh_library):
    """Python was started in the clone, whose package has no kernels, after pip install."""
    source, site = tmp_path / "clone" / "dipkernels", tmp_path / "site" / "dipkernels"
    source.mkdir(parents=True)
    site.mkdir(parents=True)
    (site / "_C.so").touch()
    fresh_library.setattr(library, "__file__", str(source / "library.py"))
    fresh_library.setattr("sys.path", [str(source.parent), str(site.parent)])
    error = library.load().error
    assert f"the installed package, in {site}, has one. Run Python from another fold" in error
    shutil.rmtree(site)
    library.load.cache_clear()
    assert "it was not built" in library.load().error
    with fresh_library.context() as unreadable:  # another user's folder is on PYTHONPATH
        unreadable.setattr(os, "stat", functools.partial(refused, os.stat, str(site)))
        (gone := tmp_path / "gone").mkdir()
        unreadable.chdir(gone)
        unreadable.setattr("sys.path", ["", str(site.parent)])
        gone.rmdir()  # Python was started in a folder that is there no more
        library.load.cache_clear()
        assert "it was not built" in library.load().error
    (wheel := tmp_path / "dipkernels.whl").touch()  # on PYTHONPATH as it is
    fresh_library.setattr(library, "__file__", str(wheel / "dipkernels" / "library.py"))
    library.load.cache_clear()
    assert f"imported from inside {wheel}, and none loads" in library.load().error


def test_a_name_with_brackets_matches_itself():
    model = nn.ModuleDict({"a[0]": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    dip.convert(model, {"a[0]": 0.1, "*": 0.2})
    assert [row.sigma_mean for row in dip.summary(model)] == pytest.approx([0.1**0.5, 0.2**0.5])
    dip.to_plain(model)
    assert [row.name for row in dip.summary(dip.convert(model, exclude=["a[0]"]))] == ["b"]


@pytest.mark.parametrize(
    "options",
    [{"exclude": None}, {"exclude": [0]}, {"before": 3}, {"share": [(0, 1)]}, {"share": [(None,)]}],
)
def test_patterns_that_are_no_strings_are_named(options):
    (name,) = options
    with pytest.raises(TypeError, match=f"^{name}: expected strings, got"):
        dip.convert(
            network(), batches=[torch.randn(2, 8)] if "before" in options else None, **options
        )
    with pytest.raises(TypeError, match=r"^init_variance: expected strings, got"):
        dip.convert(network(), {0: 0.1})


def test_patterns_of_any_iterable_are_taken_once():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4), "v": nn.Linear(4, 4)})
    dip.convert(model, share=[iter(("q", "k"))], exclude=iter(["v"]))
    assert model["q"].share is model["k"].share is not None
    assert dip.DIPConfig(exclude=iter(["v"])) == dip.DIPConfig(exclude=["v"])


def test_a_number_that_is_none_is_named_before_what_it_goes_with():
    options = {"num_samples": "3", "estimator": "analytic"}
    with pytest.raises(TypeError, match=r"^num_samples: expected an integer >= 1, got '3'"):
        dip.functional.dip_linear(ROWS, ROWS, None, SIGMA, SEED, **options)


def test_a_filter_that_cannot_be_called_is_named():
    with pytest.raises(TypeError, match=r"^filter: expected a function of \(module, name\), got"):
        dip.convert(network(), filter="head")


@pytest.mark.parametrize(
    "call",
    [
        lambda: dip.calibrate(dip.convert(network()), None),
        lambda: dip.summary(dip.convert(network()), 3),
        lambda: dip.convert(network(), place="producer", batches=3),
    ],
)
def test_batches_that_are_none_are_named(call):
    with pytest.raises(TypeError, match=r"^batches: expected a batch or an iterable"):
        call()


def test_complex_batches_are_refused():
    model = dip.convert(nn.Linear(8, 4, dtype=torch.complex64))
    with pytest.raises(TypeError, match="noise is real"):
        dip.calibrate(model, torch.randn(3, 8, dtype=torch.complex64))


ROWS, SIGMA, SEED = torch.ones(3, 4), torch.ones(4), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: dip.functional.noise((3, 4), 7), "seed"),
        (lambda: dip.functional.perturb(ROWS, 0.1, SEED), "sigma"),
        (lambda: dip.functional.perturb(ROWS, SIGMA, 7), "seed"),
        (lambda: dip.functional.perturb(ROWS.numpy(), SIGMA, SEED), "x"),
        (lambda: dip.functional.dip_linear(ROWS, None, None, SIGMA, SEED), "weight"),
        (lambda: dip.functional.dip_linear(ROWS, ROWS, None, 0.1, SEED), "sigma"),
        (lambda: dip.functional.expectation(ROWS, 0.1, "relu"), "v"),
        (lambda: producers.norm(ROWS, None, None, 0.1, SEED, kind="layer", eps=0), "sigma"),
        (lambda: producers.norm(ROWS, [1.0] * 4, None, SIGMA, SEED, kind="rms", eps=0), "weight"),
        (lambda: producers.activate([1.0], SIGMA, SEED, kind="relu"), "x"),
        (lambda: producers.gate(ROWS, 1.0, SIGMA, SEED, kind="silu"), "b"),
    ],
)
def test_what_is_no_tensor_is_named(call, name):
    with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got"):
        call()


@pytest.mark.parametrize("model", [3, None, [nn.Linear(8, 4)], nn.Linear])
def test_what_cannot_be_called_has_no_trajectories(model):
    for call in (dip.trajectories, dip.diagnostics.predictor):
        said = r"^model: expected a torch.nn.Module or a function, got"
        with pytest.raises(TypeError, match=said):
            call(model, X, m=2) if call is dip.trajectories else call(model)


def test_a_state_of_no_tensors_is_named():
    model = dip.convert(network())
    state = dip.variances(model)
    for given, kind in (
        (
            {name: values.numpy() for name, values in state.items()},
            "dense floating tensors with values.*ndarray",
        ),
        (
            {name: values.tolist() for name, values in state.items()},
            "dense floating tensors with values.*list",
        ),
        ({name: values.cfloat() for name, values in state.items()}, "dense floating.*complex64"),
        ({name: values.bool() for name, values in state.items()}, "dense floating.*torch.bool"),
        ({name: values.to("meta") for name, values in state.items()}, "dense.*the meta device"),
        (list(state.items()), "a mapping.*list"),
        (None, "a mapping.*NoneType"),
    ):
        with pytest.raises(TypeError, match=f"^state: expected {kind}"):
            dip.load_variances(model, given)


@pytest.mark.parametrize("context", [dip.noise_off, dip.sampling_on])
def test_a_context_that_is_given_a_model_or_a_function_says_how_it_is_written(context):
    name = context.__name__
    for given in (dip.convert(network()), F.relu):  # the latter by @dip.noise_off alone
        said = rf"^{name}: expected no argument, .* got \w+; write `with dip.{name}\(\):`"
        with pytest.raises(TypeError, match=said):
            context(given)


@pytest.mark.parametrize("types", [3, [[nn.Linear]], "Linear", nn.ReLU, [], [nn.Linear, None]])
def test_types_that_are_no_classes_to_convert_are_named(types):
    said = r"^types: expected some of the classes nn\.Linear, "
    said += ".*, got 'Linear'$" if types == "Linear" else ""
    with pytest.raises(ValueError, match=said):
        dip.convert(network(), types=types)


def test_a_single_example_is_told_from_a_batch():
    model = dip.convert(network())
    with pytest.raises(
        ValueError, match=r"^batches: expected inputs that vary, .*several examples"
    ):
        dip.calibrate(model, [X[:1]])
    with pytest.raises(ValueError, match=r"^average: expected .* shape \(4,\), got .* x\[None\]"):
        dip.predict(model, X[0], k=2)


def test_a_loss_among_the_outputs_of_folded_passes_asks_for_chunk_1():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x, labels):
            logits = self.network(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = dip.convert(WithLoss())
    with pytest.raises(
        ValueError, match=r"^output\['loss'\]: .* B \* chunk = 12, .* chunk=1; where"
    ):
        dip.predict(model, X, Y, k=4, chunk=2, average=None)
    assert dip.predict(model, X, Y, k=4, average=None)["loss"].shape == (4,)
    # an average is of the logits, and reads no loss
    with dip.fixed_noise(0):
        averaged = dip.predict(model, X, Y, k=4, chunk=2)
    with dip.fixed_noise(0):
        assert torch.equal(averaged, dip.predict(model.network, X, k=4, chunk=2))


PAIR = r"^batches: expected tensors of one kind, .* and .*make one batch, \[\(x, y\)\]"


@pytest.mark.parametrize(
    ("target", "said", "said_of_images"),
    [
        (Y, PAIR, PAIR),
        (Y.float(), PAIR, PAIR),
        (F.one_hot(Y), PAIR, PAIR),
        # which may be a batch of the same model
        (
            F.one_hot(Y).float(),
            r"^DIPLinear\(.*: expected an input of",
            r"^DIPConv2d\(.*: expected an input of",
        ),
    ],
)
def test_a_batch_and_its_target_taken_for_two_batches_are_told(target, said, said_of_images):
    for call in (dip.calibrate, dip.summary, dip.diagnostics.signal_to_noise):
        with pytest.raises(ValueError, match=said):
            call(dip.convert(network()), (X, target))
        call(dip.convert(network()), [(X, target)])
        call(dip.convert(network()), [X, X[:4]])
    images = dip.convert(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match=said_of_images):
        dip.calibrate(images, (torch.randn(6, 3, 8, 8), target))


@pytest.mark.parametrize(
    "call",
    [
        lambda: dip.DIPConfig(("Linear",)),
        lambda: dip.param_groups(network(), 1e-3, 1e-2),  # weight_decay, or variance_lr
        lambda: dip.DIPInput(8, -1, 0.1),
        lambda: dip.DIPLinear(8, 4, True, None, None, 0.1),
    ],
)
def test_what_can_be_taken_for_another_argument_is_given_by_name(call):
    with pytest.raises(TypeError, match="positional argument"):
        call()


def test_a_size_an_eps_and_a_module_that_are_none_are_named():
    with pytest.raises(TypeError, match=r"^shape: expected an integer >= 0, got 2\.0"):
        dip.functional.noise((2.0, 3), SEED)
    with pytest.raises(TypeError, match=r"^eps: expected a finite number >= 0, got None"):
        producers.norm(ROWS, None, None, SIGMA, SEED, kind="rms", eps=None)
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got int"):
        dip.shard_variances(3)


def test_completion_shows_what_is_for_users_and_nothing_else():
    assert set(dir(dip)) == {*dip.__all__, "__version__"}


def test_every_layer_shows_how_many_draws_it_averages():
    for make in (
        lambda **k: dip.DIPLinear(4, 2, **k),
        lambda **k: dip.DIPConv1d(4, 2, 3, **k),
        lambda **k: dip.DIPInput(4, **k),
        lambda **k: dip.DIPLayerNorm(4, **k),
        lambda **k: dip.DIPActivation(4, "gelu", **k),
        lambda **k: dip.DIPGatedActivation(4, **k),
        lambda **k: dip.DIPMultiheadAttention(4, 2, **k).in_proj,
    ):
        assert "num_samples" not in repr(make()), make()
        assert "init_variance=0.01, num_samples=2\n" in repr(make(num_samples=2)), make()
