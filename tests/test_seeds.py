"""seeds: the noise's state nests, is restored, and reaches compiled code and the backward pass."""

import asyncio
import contextlib
import copy
import functools
import os
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from warning_support import no_warning

from dipkernels import worlds
from dipkernels.models.convert import convert
from dipkernels.nn.conv import DIPConv2d
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import number_layers
from dipkernels.noise import contexts, seeds
from dipkernels.noise.contexts import fixed_noise, noise_off, sampling_on


def state():
    return contexts.KEY, contexts.row0(), contexts.MODE


@pytest.fixture(autouse=True)
def _state_is_left_clean():
    yield
    assert state() == (None, 0, None)


def test_fixed_noise_replays_and_differs_by_key_and_layer():
    a, b = number_layers(nn.ModuleList([DIPLinear(16, 16), DIPLinear(16, 16)]))
    b.load_state_dict(a.state_dict())
    x = torch.randn(4, 16)
    with fixed_noise(1):
        first, again, other_layer = a(x), a(x), b(x)
    with fixed_noise(2):
        other_key = a(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, other_layer)
    assert not torch.equal(first, other_key)


@pytest.mark.parametrize("producer", [False, True])
def test_a_deep_copy_replays_its_originals_noise(producer):
    """An average of a model's parameters is compared with the model under one noise, without a
    warning; another key gives it another."""
    first = nn.LayerNorm(8) if producer else nn.Linear(8, 8)
    model, x = nn.Sequential(first, nn.GELU(), nn.Linear(8, 3)), torch.randn(5, 8)
    convert(model, place="producer" if producer else "input", batches=[x] if producer else None)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for copied in (copy.deepcopy(model), average):
        with warnings.catch_warnings(), fixed_noise(3):
            warnings.simplefilter("error")
            assert torch.equal(copied(x), model(x))
        with fixed_noise(4):
            other = copied(x)
        with fixed_noise(3):
            assert not torch.equal(other, model(x))
    average.update_parameters(model)  # the first one copies
    with torch.no_grad():
        model[2].bias.add_(1)
    average.update_parameters(model)
    with fixed_noise(3):  # one noise: what is left is the difference of the parameters
        torch.testing.assert_close(model(x) - average(x), torch.full((5, 3), 0.9))


@pytest.mark.parametrize("time", [1, 2])
def test_a_test_starts_from_the_same_streams_whatever_ran_before_it(time):
    assert [DIPLinear(2, 2).number for _ in range(2)] == [2**15, 2**15 + 1]


def test_fixed_noise_draws_nothing_from_the_generator():
    layer, x = DIPLinear(8, 8), torch.randn(2, 8)
    before = torch.get_rng_state()
    with fixed_noise(1):
        layer(x)
    assert torch.equal(before, torch.get_rng_state())
    layer(x)
    assert not torch.equal(before, torch.get_rng_state())


def test_manual_seed_replays_a_draw():
    layer, x = DIPLinear(8, 8), torch.randn(2, 8)
    torch.manual_seed(3)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(3)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "key", [0, -1, 2**63, 2**64 - 1, 2**64 + 5, torch.tensor(7), torch.tensor([-7])]
)
def test_key_is_taken_mod_2_64(key):
    with fixed_noise(key):
        value = contexts.KEY
    assert value.dtype is torch.int64
    assert value.shape == (2,)
    assert value[0].item() % 2**64 == int(key) % 2**64
    assert value[1].item() == 0


@pytest.mark.parametrize("key", [-1, torch.tensor(-1)])
def test_keys_and_numbered_passes_come_without_a_copy_from_the_host(key):
    """Which would wait for all that runs on a GPU, and which no CUDA graph can capture."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Names(), fixed_noise(key), contexts.numbered_pass(3):
        assert contexts.KEY.tolist() == [contexts.signed(3 * contexts.GOLDEN - 1), 0]
    assert "mul" in names and not {"lift_fresh", "_to_copy", "cat"} & set(names)


def test_a_cuda_graph_captured_under_a_key_keeps_it_and_says_so(monkeypatch):
    """A replay reads the key's memory again: after the context, and behind model.to(...), which
    gives a layer another stream. tests/gpu/test_gpu_engines.py captures on a GPU."""
    monkeypatch.setattr(worlds, "capturing", lambda device: True)
    monkeypatch.setattr(contexts, "_captured", {})
    layers, x = (DIPLinear(8, 8), DIPLinear(8, 8)), torch.randn(2, 8)
    said = "CUDA graph .* each replay draws the same noise"
    with pytest.warns(UserWarning, match=said) as found, fixed_noise(7):
        read = [contexts.KEY, *(layer._stream for layer in layers)]
        for layer in layers:
            layer(x)
    assert len(found) == 1
    assert {id(t) for t in contexts._captured.values()} == {id(t) for t in read}
    with pytest.warns(UserWarning, match=said), fixed_noise(7):
        read.append(contexts.KEY)
        with contexts.numbered_pass(1):  # which reads the key, and makes another
            read.append(contexts.KEY)
            layers[0](x)
    with no_warning():
        layers[0](x)  # a replay draws its seed anew
        monkeypatch.setattr(worlds, "has_values", lambda x: False)
        with fixed_noise(torch.tensor(7)):  # as on a GPU, where it may be filled anew
            read.append(contexts.KEY)
            layers[0](x)
    assert {id(t) for t in contexts._captured.values()} == {id(t) for t in read}


def test_a_layer_whose_stream_lies_on_another_device_draws_the_same_noise():
    """As a replica of nn.DataParallel, which has its original's."""
    model, x = number_layers(nn.Sequential(DIPLinear(8, 8), DIPLinear(8, 8))), torch.randn(2, 8)
    with fixed_noise(7):
        expected = model(x)
        for layer in model:
            layer.__dict__["_stream"] = layer._stream.to("meta")
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("used", [False, True])
def test_a_key_starts_no_gpu_that_the_process_does_not_use(monkeypatch, used):
    """A forked process could not: CUDA raises there, where a model on the CPU wants none of it."""
    devices, gpu = [], torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    made = contexts._with_zero
    monkeypatch.setattr(
        contexts,
        "_with_zero",
        lambda n, device: devices.append(device) or made(n, torch.device("cpu")),
    )
    for key in (7, torch.tensor(7)):
        with fixed_noise(key):
            assert contexts.KEY.tolist() == [7, 0] and contexts.TAG == (7, 0)
    assert devices == [gpu if used else torch.device("cpu")] * 2


@pytest.mark.parametrize("key", [torch.tensor(1.0), torch.tensor([1, 2])])
def test_a_tensor_that_is_no_key_is_named(key):
    with pytest.raises(TypeError, match=r"^key: "):
        fixed_noise(key)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (DIPLinear(12, 5), (6, 12)),
        (DIPLinear(12, 5), (6, 3, 12)),  # three rows for each entry
        (DIPLinear(12, 5, activation="relu", estimator="mean", num_samples=2), (6, 3, 12)),
        (DIPConv2d(12, 5, 3), (6, 12, 4, 7)),  # 28 rows for each entry
    ],
)
def test_row0_gives_a_shard_the_noise_of_its_place_in_the_batch(layer, shape):
    x = torch.randn(shape)
    with fixed_noise(5):
        whole = layer(x)
    for entries in (0, 2):
        with fixed_noise(5, row0=4, entries=entries):
            part = layer(x[4:])
        torch.testing.assert_close(part, whole[4:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(x)[4:], part)


@pytest.mark.parametrize(
    "shape, one_after_another",
    [
        (lambda n: (n, 3, 4), True),
        (lambda n: (n * 3, 4), True),  # tokens
        (lambda n: (n * 3, 2, 4), True),  # windows
        (lambda n: (3, n, 4), False),  # the sequence first
    ],
)
def test_entries_gives_workers_rows_of_their_own_wherever_a_layer_reads_examples(
    shape, one_after_another
):
    layer, drawn = DIPInput(4), []
    for first, n in ((0, 4), (4, 2), (6, 1)):
        with fixed_noise(5, row0=first, entries=n):
            drawn.append(layer(torch.zeros(shape(n))).flatten())
    with fixed_noise(5):
        whole = layer(torch.zeros(shape(7))).flatten()
    assert len(torch.cat(drawn).unique()) == len(whole)
    assert torch.equal(torch.cat(drawn), whole) or not one_after_another


def test_first_row_of_an_unbatched_image_counts_its_pixels():
    with fixed_noise(1, row0=2):
        assert seeds.first_row(torch.zeros(3, 4, 5), dim=-3) == 2 * 20
        assert seeds.first_row(torch.zeros(7)) == 2


def test_contexts_nest_and_restore_on_exceptions():
    with fixed_noise(1, row0=3):
        outer = state()
        with pytest.raises(ZeroDivisionError), noise_off(), fixed_noise(2):
            assert contexts.MODE == "off"
            assert contexts.row0() == 0
            raise ZeroDivisionError
        assert state() == outer
        with sampling_on(), noise_off():
            assert contexts.MODE == "off"
        assert contexts.MODE is None


def test_contexts_work_as_decorators_and_when_entered_again():
    layer, x = DIPLinear(8, 8), torch.randn(2, 8)

    @fixed_noise(4)
    def run(depth=0):
        return layer(x) if depth == 0 else run(depth - 1)

    assert torch.equal(run(), run(2))
    twice = fixed_noise(5)
    with twice, fixed_noise(6):
        between = state()
        with twice:
            pass
        assert state() == between
    sampling = sampling_on()
    with sampling, sampling:
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_numbered_passes_differ_and_replay():
    layer, x = DIPLinear(8, 8), torch.randn(2, 8)
    with fixed_noise(4, row0=2):
        outs = []
        for number in (0, 1, 1):
            with contexts.numbered_pass(number, 3):
                assert contexts.row0() == 6
                outs.append(layer(x))
        with contexts.numbered_pass(1):
            assert contexts.KEY[0].item() % 2**64 == 4 + 0x9E3779B97F4A7C15
    assert torch.equal(outs[1], outs[2])
    assert not torch.equal(outs[0], outs[1])
    with contexts.numbered_pass(1):
        assert contexts.KEY is None


def test_contexts_of_two_threads_that_overlap_raise_and_nothing_stays_on():
    first, second = fixed_noise(1), sampling_on()
    first.__enter__()  # one thread's
    second.__enter__()  # another's
    for context in (first, second):
        with pytest.raises(RuntimeError, match=r"another thread, task or open generator .*lock"):
            context.__exit__(None, None, None)
    assert state() == (None, 0, None)
    first, second = sampling_on(), sampling_on()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # here nothing shows, but the second has lost its noise
    with pytest.raises(RuntimeError, match="another thread, task or open generator"):
        second.__exit__(None, None, None)
    assert state() == (None, 0, None)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_fast_path_that_the_user_turned_off_stays_off():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        first, second = fixed_noise(1), sampling_on()
        first.__enter__()
        second.__enter__()
        for context in (first, second):
            with pytest.raises(RuntimeError, match="another thread, task or open generator"):
                context.__exit__(None, None, None)
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_tasks_that_overlap_in_a_context_are_told():
    layer, x = DIPLinear(8, 8).eval(), torch.randn(2, 8)

    async def noisy():
        with sampling_on():
            await asyncio.sleep(0)
            return layer(x)

    async def both():
        return await asyncio.gather(noisy(), noisy(), return_exceptions=True)

    for _ in range(2):
        assert any(isinstance(got, RuntimeError) for got in asyncio.run(both()))
        assert contexts.MODE is None and torch.equal(layer(x), layer(x))
        assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("context", [fixed_noise(1), noise_off(), sampling_on()])
def test_what_runs_after_the_context_is_not_decorated(context):
    def generator():
        yield

    async def coroutine():
        pass

    async def stream():
        yield

    for function in (generator, coroutine, stream):
        with pytest.raises(TypeError, match=f"^{type(context).__name__}: .*{function.__name__}"):
            context(function)
        with pytest.raises(TypeError, match=f"^{type(context).__name__}: .*{function.__name__}"):
            context(functools.partial(function))
        wrapped = context(lambda function=function: function())  # as a decorator of others makes it
        with pytest.raises(
            TypeError, match=f"^{type(context).__name__}: expected a plain function"
        ):
            wrapped()
    for make in (contextlib.contextmanager(generator), contextlib.asynccontextmanager(stream)):
        with pytest.raises(TypeError, match=f"^{type(context).__name__}: .*{make.__name__}"):
            context(make)()


# ---- of the tests themselves ---------------------------------------------------------------------


def test_every_test_starts_from_the_seed_of_its_variable_and_the_order_may_be_shuffled(
    request, monkeypatch
):
    seed = int(os.environ.get("DIPKERNELS_TEST_SEED", "0"))
    assert torch.initial_seed() == seed
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))
    assert random.random() == random.Random(seed).random()
    assert np.random.rand() == np.random.RandomState(seed % 2**32).rand()

    tests = [
        SimpleNamespace(path=Path(f"test_{file}.py"), nodeid=f"{file}::{i}")
        for file in "abcd"
        for i in range(9)
    ]
    plugin = request.config.pluginmanager.get_plugin(str(Path(__file__).parent / "conftest.py"))
    orders = []
    for order in (None, "7", "7", "8"):
        monkeypatch.setattr(plugin, "ORDER", order)
        plugin.pytest_collection_modifyitems(items := [*tests])
        orders.append([test.nodeid for test in items])
        files = [test.path for test in items]
        assert all(files[i] == files[i + 1] for i in range(35) if i % 9 < 8)  # a file stays whole
    assert orders[0] == [test.nodeid for test in tests] != orders[1] == orders[2] != orders[3]
    assert [name for name in orders[1] if name[0] == "a"] != orders[0][:9]
