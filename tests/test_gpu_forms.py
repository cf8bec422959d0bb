"""benchmarks/gpucheck/switches.py: what it sets, it takes back; CUDA's part is stood in for."""

import re
from types import SimpleNamespace

from gpucheck import switches
from source_support import ROOT

from dipkernels import library


def test_forms_reach_the_kernels_and_are_taken_back(monkeypatch):
    state = [1]
    functions = SimpleNamespace(
        dip_set_cuda_forms=lambda bits: state.__setitem__(0, bits), dip_cuda_forms=lambda: state[0]
    )
    compiled = library.Library("none", cpu_capabilities=("portable",), cuda_archs=("90",))
    monkeypatch.setattr(library, "load", lambda: compiled)
    monkeypatch.setattr(library, "c_functions", lambda path: functions)
    found = {}
    for name, context in (switches.walk() | switches.column_sum()).items():
        with context():
            found[name] = state[0]
    assert found == {
        "from the start": 0,
        "P from the end": 1,
        "from the end": 3,
        "two launches": 1,
        "last block": 5,
    }
    assert state == [1]


def test_every_form_is_compared_with_the_default():
    """docs/gpu.md: each against today's form, which a run takes from the first of the settings."""
    source = (ROOT / "csrc" / "perturb_op.cpp").read_text()
    (default,) = re.findall(r"kDefaultForms = (\d+);", source)
    for settings in (switches.walk(), switches.column_sum()):
        today = next(iter(settings.values()))
        assert today.args == (int(default),)
