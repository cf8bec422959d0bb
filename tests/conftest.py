import pytest
from capability_support import OFFERED

from dipkernels.backends import CAPABILITIES, cpu_capability


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    """An instruction set of the CPU kernels, in use."""
    if request.param not in OFFERED:
        pytest.skip(f"not offered here: {request.param}")
    before = cpu_capability()
    cpu_capability(request.param)
    yield request.param
    cpu_capability(before)
