"""Free arguments and untrusted text: Python exceptions, never a crash, and errors that name what
was wrong.  docs/reliability.md.

The calls run in a process of their own, so that a crash is a failure with the case's number and not
the end of the tests.
"""

import os

import pytest
from program_support import PYTHON, ran

OPS = """
import random, sys, torch
from dipkernels.ops import expectation, gate, linear, norm, perturb, registry
from dipkernels.ops.activations import ACTIVATIONS
from dipkernels.ops.draw import Draw
torch.set_num_threads(2)
first, number = int(sys.argv[1]), int(sys.argv[2])
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8]
INTS = [0, 1, 2, 3, 7, 8, -1, -2, 5, 40, 2**31 - 1, 2**32, 2**62, 2**63 - 1, -(2**63), 65535, 65536]
HUGE = {"shape": [2**40, 2**62, 2**63 - 1, -1]}

def tensor(dice, name):
    if name == "seed" and dice.random() < 0.8:
        t = torch.tensor([dice.getrandbits(63), dice.randint(-5, 5)])
        return t if dice.random() < 0.9 else torch.stack((t, t), 1)[:, 0]
    ndim = 1 if name in ("sigma", "v", "bias", "dv") and dice.random() < 0.9 else 2 if name == "weight" else dice.randint(0, 4)
    shape = [dice.choice(SIDES) if dice.random() < 0.8 else dice.choice([0, 1, 2, 5, 9, 17]) for _ in range(ndim)]
    dtype = dice.choice(DTYPES[:4]) if dice.random() < 0.9 else dice.choice(DTYPES)
    dtype = torch.float32 if name in ("sigma", "v") and dice.random() < 0.8 else dtype
    t = torch.zeros(shape, dtype=dtype)
    if dtype.is_floating_point:
        t.copy_(torch.rand(shape)).mul_(dice.choice([1, 1, -1, float("inf"), float("nan")]))
    kind = dice.randint(0, 9)
    if kind == 0 and t.dim():
        t = t.transpose(0, -1)
    elif kind == 1 and t.dim():
        t = t[..., ::2]
    elif kind == 2 and t.numel() and t.dim():
        t = t[:1].expand(t.shape)
    elif kind == 3 and dice.random() < 0.3:
        t = t.to("meta")
    elif kind == 4 and dice.random() < 0.3:
        t = t.to_sparse() if t.dim() else t
    return t

def argument(dice, arg):
    kind, name = str(arg.type), arg.name
    if dice.random() < 0.02:
        return dice.choice([None, "text", 1.5, [1], object(), torch.ones(2), True])
    if kind == "Tensor" or kind == "Optional[Tensor]":
        return None if kind[0] == "O" and dice.random() < 0.3 else tensor(dice, name)
    if kind == "List[int]":
        big = dice.random() < 0.1
        return [dice.choice(HUGE["shape"] if big and dice.random() < 0.5 else SIDES) for _ in range(dice.randint(0, 4))]
    if kind == "int" and name == "num_samples":
        return dice.choice([1, 1, 1, 2, 3, 0, -1, 65537, 2**40])
    if kind == "int":
        return dice.choice([0, 0, -1, 1]) if name == "dim" and dice.random() < 0.8 else dice.choice(INTS)
    if kind == "float":
        return dice.choice([1.0, 0.5, -1.0, float("nan"), float("inf"), 1e300])
    if kind == "bool":
        return dice.random() < 0.5
    if kind == "str":
        return dice.choice([*ACTIVATIONS, "identity", "", "softmax", "relu\\0", "\\N{SNOWMAN}" * 50])
    if kind == "Optional[int]":
        return dice.choice([None, None, torch.float32, torch.bfloat16, torch.int32, 77])
    raise AssertionError(f"{name}: a type the fuzzer does not know: {kind}")

def checked(op, names, values):
    "The call of Python's function, which takes the fields of a draw as one value"
    modules = (perturb, linear, expectation, norm, gate)
    function = next((getattr(module, op) for module in modules if hasattr(module, op)), None)
    if function is None:
        return lambda: registry.kernel(op, "cpu")(*values)
    if "seed" not in names:
        return lambda: function(*values)
    fields = {name: value for name, value in zip(names, values) if name in Draw._fields}
    rest = [value for name, value in zip(names, values) if name not in fields]
    rest.insert(names.index("shape" if op == "noise" else "seed") + 1, Draw(**fields))
    return lambda: function(*rest)

ran = refused = 0
reasons = set()
for number in range(first, first + number):
    dice = random.Random(number)
    SIDES = [dice.choice([0, 1, 2, 3, 5, 8, 9, 16, 33])] * 3 + [dice.choice([1, 4, 7])]
    op = dice.choice(sorted(registry.SCHEMAS))
    overload = getattr(torch.ops.dipkernels, op).default
    arguments = [argument(dice, arg) for arg in overload._schema.arguments]
    print(number, op, end=" ", flush=True)
    by_checks = dice.random() < 0.5
    try:
        names = [arg.name for arg in overload._schema.arguments]
        out = checked(op, names, arguments)() if by_checks else overload(*arguments)
        for t in out if isinstance(out, tuple) else (out,):
            t.sum() if t.device.type == "cpu" else None
        ran += 1
    except Exception as error:
        assert str(error), "an error without a word"
        reasons.add(type(error).__name__)
        refused += 1
    print("ok")
print(f"ran {ran} refused {refused} {sorted(reasons)}")
"""


@pytest.mark.parametrize(
    ("first", "number"), [(0, 2000), pytest.param(10_000, 40_000, marks=pytest.mark.slow)]
)
def test_operations_take_any_arguments_without_a_crash(first, number):
    done = ran(PYTHON, "-c", OPS, str(first), str(number))
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, f"after {last}: status {done.returncode}\n{done.stderr[-3000:]}"
    went, refused = (int(n) for n in last[0].split()[1:4:2])
    assert went + refused == number and went > number // 20 and refused > number // 4, last


# Each value in a fork that imports the package anew; torch is imported once.
ENVIRONMENT = """
import os, random, sys, warnings
import torch
dice = random.Random(0)
VALUES = [b"", b"auto", b"cpu", b"portable", b"avx2", b"reference", b"CPU", b" cpu", b"cpu ", b"triton", b"cuda", b"exact", b"0", b"1", b"-1",
          b"\\xff\\xfe", b"a" * 5000, b"%s%n", b"../../etc", "\\N{SNOWMAN}".encode(), b"None", b"auto\\n", b"portable,avx2"]
VALUES += [bytes(dice.randint(1, 255) for _ in range(dice.choice([1, 3, 40, 4000]))) for _ in range(int(sys.argv[1]))]
shares = {"DIPKERNELS_BACKEND": VALUES[::2], "DIPKERNELS_CPU_CAPABILITY": VALUES[1::2]}
if sys.argv[2] == "all":
    shares = dict.fromkeys(shares, VALUES)
shares["DIPKERNELS_AUTOTUNE"] = VALUES[15:18]  # read on a GPU
for name, values in shares.items():
    for value in values:
        child = os.fork()
        if child == 0:
            os.environb[name.encode()] = value
            status = 0
            try:
                warnings.simplefilter("ignore")
                import dipkernels as dip
                z = dip.functional.noise((3, 8), torch.tensor([1, 2]))
                assert z.isfinite().all()
            except (ValueError, RuntimeError) as error:
                told = name in str(error) or "backend" in str(error)  # a backend that is missing here is named by name
                status = 1 if told else 2
            except BaseException as error:
                print(name, value, repr(error)[:300], file=sys.stderr, flush=True)
                status = 3
            os._exit(status)
        print(name, value[:20], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KNOWN = {
    "DIPKERNELS_BACKEND": {"", "auto", "cpu", "reference"},
    "DIPKERNELS_CPU_CAPABILITY": {"", "auto", "portable", "avx2"},
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("number", "share"),
    [(5, "half"), pytest.param(200, "all", marks=pytest.mark.slow)],
    ids=["few", "many"],
)
def test_environment_variables_take_any_bytes(number, share):
    """A known value runs, any other is refused with the variable's name; nothing crashes."""
    command = [PYTHON, "-c", ENVIRONMENT, str(number), share]
    done = ran(*command, without="DIPKERNELS", errors="replace")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) == (2 if share == "all" else 1) * (23 + number) + 3
    for what, status in lines:
        name, value = what.split(" ", 1)
        value = eval(value).decode(errors="replace")
        if name not in KNOWN:  # read where there is a GPU
            assert status == "0", what
        elif value in KNOWN[name]:
            assert status in ("0", "1"), what  # 1: a machine without AVX2, or no compiled library
        else:
            assert status == "1", f"{what}: {status}, {done.stderr[-500:]}"
