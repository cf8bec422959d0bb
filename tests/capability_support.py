"""The instruction sets of the CPU kernels that this machine offers and the library carries."""

from dipkernels.backends import CAPABILITIES, cpu_capability, library


def _offered():
    before = cpu_capability()
    names = []
    for name in CAPABILITIES:
        try:
            names.append(cpu_capability(name))
        except RuntimeError:
            continue
    cpu_capability(before)
    return names


OFFERED = _offered() if "portable" in library().cpu_capabilities else []
