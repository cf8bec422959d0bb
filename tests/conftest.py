"""What every test gets: seeded generators, and an order that can be shuffled.

DIPKERNELS_TEST_SEED=N seeds torch, NumPy and random before each test, 0 by default.
DIPKERNELS_TEST_ORDER=N shuffles the files and the tests within each file.
"""

import gc
import os
import random
import tempfile

import pytest
import torch
from capability_support import OFFERED
from ranks_support import Ranks
from seeding import SEED, seeded  # noqa: F401

from dipkernels import library
from dipkernels.library import CAPABILITIES, cpu_capability

# The longest: with several workers nothing is to wait for them at the end.
FIRST = (
    "test_worlds.py",
    "test_wheel.py",
    "test_triton_compiles.py",
    "test_ptx_cuda.py",
)
ORDER = os.environ.get("DIPKERNELS_TEST_ORDER")
# Imports make a million objects that stay. The cycle collector would walk them again and again.
gc.disable()


# torch.compile keeps what it compiled, and its key leaves out ATEN_CPU_CAPABILITY, by which the
# code differs.
_CACHE = f"dipkernels-tests-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), _CACHE))
# It believes what the processor says of its instruction sets, and compiles no program to try each.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test fetches a model


def pytest_configure(config):
    if config.getoption("benchmark_only", False):  # or all tests are skipped, and none fails
        raise pytest.UsageError(
            "--benchmark-only: expected the folder benchmarks, got tests, which hold no benchmark: "
            "python -m pytest benchmarks --benchmark-only"
        )


def pytest_report_header():
    return f"DIPKERNELS_TEST_SEED={SEED} DIPKERNELS_TEST_ORDER={'as written' if ORDER is None else ORDER}"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)
    if ORDER is None:
        return
    shuffler = random.Random(int(ORDER))
    files = list(dict.fromkeys(item.path for item in items))
    shuffler.shuffle(files)
    place = {path: i for i, path in enumerate(files)}
    draws = {item.nodeid: shuffler.random() for item in items}
    items.sort(key=lambda item: (place[item.path], draws[item.nodeid]))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    """An instruction set of the CPU kernels, in use."""
    if request.param not in OFFERED:
        pytest.skip(f"not offered here: {request.param}")
    before = cpu_capability()
    cpu_capability(request.param)
    yield request.param
    cpu_capability(before)


@pytest.fixture
def fresh_library(monkeypatch):
    """monkeypatch, for what changes where the compiled library is found."""
    loaded = library.load().loaded
    library.load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.load.cache_clear()
    assert library.load().loaded == loaded


@pytest.fixture
def threads():
    """A test may change how many there are."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """Layers of a small run lose more to waiting threads than they gain when something else runs
    beside the tests."""
    torch.set_num_threads(1)


@pytest.fixture
def fresh_dynamo():
    """torch.compile forgets what it compiled for other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def one_rank():
    """This process as a group of its own."""
    distributed = _distributed()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
    gc.collect()  # else the group may die in a process that a later test forks, and crash it


def _distributed():
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    return torch.distributed


@pytest.fixture(scope="module")
def pools():
    """Two processes and four, for the tests of a file."""
    _distributed()
    found = {world: Ranks(world) for world in (2, 4)}
    yield found
    for pool in found.values():
        pool.stop()


@pytest.fixture
def ranks(pools):
    return pools[2]


@pytest.fixture
def four_ranks(pools):
    return pools[4]
