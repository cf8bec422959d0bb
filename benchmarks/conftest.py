"""Devices, cases, groups and what every stored row carries.

    python -m pytest benchmarks --benchmark-only -k perturb --benchmark-json=out/bench.json

OPS is the throughput: calls in a second, of the shape in the table's title.
Every benchmark takes `device` and `case` from its module's CASES (a dictionary with "cpu", "cuda"
and "quick"), checks its result, and hands its call to `timed`. The same code runs on the CPU and,
where there is one, on the GPU. These are absolute times of this machine now; benchmarks/overhead.py
gives the ratios, interleaved.
"""

from __future__ import annotations

import machine
import peers
import pytest
import torch

_missing: dict[str, str] = {}


def pytest_addoption(parser):
    group = parser.getgroup("dipkernels benchmarks")
    group.addoption(
        "--quick", action="store_true", help="tiny shapes, one round: does every benchmark run?"
    )
    group.addoption("--threads", type=int, default=2, help="torch's CPU threads (2)")


def pytest_configure(config):
    if config.getoption("--threads") < 1:
        raise pytest.UsageError(
            f"--threads: expected at least 1, got {config.getoption('--threads')}"
        )
    torch.set_num_threads(config.getoption("--threads"))
    # Compilation and the first touch of memory belong to no figure, and the collector to no
    # variant.
    config.option.benchmark_warmup = True
    config.option.benchmark_disable_gc = True
    if config.option.benchmark_columns is None:
        config.option.benchmark_columns = ["median", "iqr", "ops", "rounds"]
    if config.option.benchmark_group_by == "group":
        config.option.benchmark_sort = "mean"  # the order of OPS, calls in a second
    if config.getoption("--quick"):
        peers.compile_backend = "eager"
        config.option.benchmark_warmup_iterations = 1
        config.option.benchmark_min_rounds = 1
        config.option.benchmark_max_time = 1e-4
        config.option.benchmark_calibration_precision = 1


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    quick = metafunc.config.getoption("--quick")
    pairs = [
        pytest.param(torch.device(device), case, id=f"{device}-{case}")
        for device in _devices()
        for case in metafunc.module.CASES["quick" if quick else device]
    ]
    metafunc.parametrize(("device", "case"), pairs)


def pytest_collection_modifyitems(config, items):
    # the first and the last number of samples or trajectories are enough
    if config.getoption("--quick"):
        middle = {"samples": (4, 16), "m": (2, 4)}
        items[:] = [
            item
            for item in items
            if not any(
                getattr(item, "callspec", None) and item.callspec.params.get(k) in v
                for k, v in middle.items()
            )
        ]


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    peers.forget_compiled()


@pytest.fixture(scope="session")
def found() -> dict[str, dict]:
    return {device: machine.describe(device) for device in _devices()}


@pytest.fixture
def build():
    """peers.build, or a skip that the summary repeats."""

    def build(name: str, model: torch.nn.Module) -> torch.nn.Module:
        module = peers.build(name, model)
        if isinstance(module, peers.Missing):
            _missing[module.name] = module.reason
            pytest.skip(f"missing peer: {module.name}: {module.reason}")
        return module

    return build


@pytest.fixture
def timed(benchmark, request, device, case, found):
    """timed(call, name): time it in its group, on whatever device, with where it was measured in
    extra_info."""

    def timed(call, name: str, group: str, **extra) -> None:
        benchmark.group = f"{group}, {device.type}, {case}"
        benchmark.extra_info.update(found[device.type], variant=name, case=str(case), **extra)
        if device.type == "cuda":
            benchmark(lambda: (call(), torch.cuda.synchronize())[0])
        else:
            benchmark(call)

    return timed


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["missing_peers"] = dict(_missing)


def pytest_terminal_summary(terminalreporter):
    for name, reason in _missing.items():
        terminalreporter.write_line(f"missing peer: {name}: {reason}")
