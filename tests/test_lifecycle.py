"""Threads, forks, workers, changing thread counts, shutdown, memory: the same numbers, no hang,
nothing kept.  docs/reliability.md."""

import copy
import gc
import os
import sys
import threading
import weakref
from pathlib import Path

import fresh_support
import pytest
import torch
from lifecycle_support import Noised, network, one_step
from program_support import PYTHON, ran
from torch import nn

import dipkernels as dip
from dipkernels import functional

pytestmark = pytest.mark.usefixtures("threads")
SEED = torch.tensor([0x0123456789ABCDEF, 3])


def in_threads(number, work):
    """[work(i)] computed by `number` threads that start together."""
    results, errors, start = [None] * number, [], threading.Barrier(number)

    def run(i):
        try:
            start.wait(timeout=300)
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=600)
    assert not errors and not any(t.is_alive() for t in threads), errors
    return results


# ---- threads -------------------------------------------------------------------------------------


def test_forward_and_backward_from_python_threads_are_those_of_one():
    """Functions of tensors hold no state: six threads on one set of parameters get the gradients
    that each gets alone."""
    x, weight = torch.randn(300, 70, dtype=torch.float64), torch.randn(20, 70, dtype=torch.float64)
    sigma = torch.rand(70)

    def work(i):
        torch.set_num_threads(1 + i % 3)
        leaves = [t.clone().requires_grad_() for t in (x, weight, sigma)]
        for _ in range(10):
            y = functional.dip_linear(
                leaves[0], leaves[1], None, leaves[2], torch.tensor([i, 2]), keep="ux"[i % 2]
            )
            grads = torch.autograd.grad(y.square().sum(), leaves)
        return [y.detach(), *grads]

    alone = [work(i) for i in range(6)]
    torch.testing.assert_close(in_threads(6, work), alone)


def test_one_model_serves_several_threads_under_a_fixed_key():
    """fixed_noise is of the process, not of a thread: all threads inside get its noise."""
    model, x = network(), torch.randn(50, 33)
    with dip.fixed_noise(11):
        want = model(x).detach()
        assert all(torch.equal(y, want) for y in in_threads(4, lambda i: model(x).detach()))
    assert not torch.equal(model(x), want)


def test_a_drawn_pass_in_each_thread_has_noise_of_its_own():
    model, x = network(), torch.randn(50, 33)
    results = in_threads(4, lambda i: [model(x).detach() for _ in range(5)])
    flat = [y for part in results for y in part]
    assert all(not torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])


def test_threads_train_copies_each_with_its_optimiser():
    """An optimiser's first step looks at every variance alive, while other threads make more."""
    model, x = network(), torch.randn(4, 33)

    def work(i):
        for _ in range(15):
            own = copy.deepcopy(model)
            optimizer = torch.optim.AdamW(dip.param_groups(own, 1e-3, variance_lr=1e-3))
            optimizer.param_groups[0]["weight_decay"] = 0.1
            one_step(own, x)
            optimizer.step()

    crowd = [dip.Variance(1) for _ in range(300)]  # the longer the look, the surer the fault
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(8, work)
    finally:
        sys.setswitchinterval(interval)
    assert len(crowd) == 300


def test_thread_count_may_change_between_forward_and_backward():
    x, sigma = torch.randn(2000, 40), torch.rand(40)
    results = []
    for forward, backward in ((1, 1), (2, 1), (1, 3), (3, 2)):
        leaf = sigma.clone().requires_grad_()
        torch.set_num_threads(forward)
        u = functional.perturb(x, leaf, SEED)
        torch.set_num_threads(backward)
        u.backward(x)
        results.append((u.detach(), leaf.grad))
    assert all(torch.equal(a, b) for got in results for a, b in zip(got, results[0], strict=True))


# ---- processes -----------------------------------------------------------------------------------

FORKS = """
import os, sys, torch
sys.path.insert(0, "tests")
import dipkernels as dip
from dipkernels import functional
from lifecycle_support import network, one_step

def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0

def noise(threads):
    torch.set_num_threads(threads)
    return functional.perturb(torch.zeros(3000, 40), torch.ones(40), torch.tensor([5, 1]))

kept = []
in_child(lambda: noise(2))                      # after import, before any use: with threads
want = noise(2)                                 # the parent's threads start here
def same():
    assert torch.equal(noise(1), want)          # after use: torch's rule, one thread
    model = network()
    torch.manual_seed(1)
    kept.append(one_step(model, torch.ones(4, 33)))
in_child(same)
assert torch.equal(noise(2), want)              # and the parent goes on
print("done")
"""

OMP = """
import hashlib, os, torch
from dipkernels import functional

def digest():
    x, sigma = torch.linspace(-1, 1, 200_000).view(5000, 40), torch.linspace(0.1, 1, 40).requires_grad_()
    u = functional.perturb(x, sigma, torch.tensor([5, 1]))
    u.backward(x)
    return hashlib.sha256(u.detach().numpy().tobytes() + sigma.grad.numpy().tobytes()).hexdigest()

print(torch.get_num_threads(), digest())
for value in ("1", "5", "nonsense"):            # read at start by OpenMP, and never again
    os.environ["OMP_NUM_THREADS"] = value
    print(torch.get_num_threads(), digest())
for threads in (4, 1, 2):                       # what does change the number
    torch.set_num_threads(threads)
    print(torch.get_num_threads(), digest())
"""

SHUTDOWN = """
import sys, threading, torch
sys.path.insert(0, "tests")
import dipkernels as dip
from lifecycle_support import network, one_step
model, x = network(), torch.randn(64, 33)
stop = threading.Event()
def until_told():
    while not stop.is_set():
        model(x)
worker = threading.Thread(target=until_told)    # no daemon: those abort under plain torch too
worker.start()
torch.set_num_threads(2)
one_step(model, x)
threading.Timer(0.5, stop.set).start()          # the main thread is gone by then
context = dip.fixed_noise(3)
context.__enter__()                             # never left
print("end")
"""


def run(script, **environment):
    return ran(PYTHON, "-c", script, env=environment)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kernels_survive_a_fork():
    done = run(FORKS, OMP_NUM_THREADS="2")
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]


def test_omp_num_threads_at_the_start_and_at_run_time_changes_no_bit():
    done = run(OMP, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr[-3000:]
    threads, found = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert threads == ("2", "2", "2", "2", "4", "1", "2") and len(set(found)) == 1


def test_interpreter_shuts_down_while_a_thread_runs():
    """A thread inside kernels when the main one ends, and a context that was never left: exit
    status 0 and not a word."""
    done = run(SHUTDOWN)
    assert (done.returncode, done.stdout, done.stderr[-3000:]) == (0, "end\n", "")


def check_loader(context):
    torch.manual_seed(3)
    loader = torch.utils.data.DataLoader(
        Noised(), batch_size=4, num_workers=2, multiprocessing_context=context
    )
    fixed, drawn, workers = (
        torch.cat(parts) if torch.is_tensor(parts[0]) else parts
        for parts in zip(*loader, strict=True)
    )
    assert torch.equal(fixed.flatten(0, 1), functional.noise((48, 16), torch.tensor([7, 1])))
    assert len({tuple(row.tolist()) for row in drawn.flatten(0, 1)}) == 48, (
        "two examples share their noise"
    )
    assert set(workers.tolist()) == {0, 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_dataloader_workers_draw_apart():
    functional.noise((3000, 40), SEED)  # the parent has used its threads
    check_loader("fork")


@pytest.mark.slow
def test_spawned_dataloader_workers_draw_apart():
    check_loader("spawn")


# ---- memory --------------------------------------------------------------------------------------


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_stays_flat_over_many_steps(tmp_path):
    """In a process of its own, whose memory nothing else moves."""
    code = f"import runpy, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    code += f"runpy.run_path({__file__!r}, run_name='__main__')"
    status, output = fresh_support.run(code, tmp_path / "output")
    assert status == 0, output


def test_a_model_dies_with_its_last_reference():
    """No cycle keeps a model's tensors until the garbage collector comes by."""
    x = torch.randn(8, 6)
    uses = {
        "plan": lambda model: dip.producer_plan(model, [x]),
        "producer": lambda model: dip.convert(model, place="producer", batches=[x]),
        "before": lambda model: dip.convert(model, before=["1"], batches=[x]),
        "calibrate": lambda model: dip.calibrate(dip.convert(model), [x]),
        "check": lambda model: dip.check(dip.convert(model), x),
        "predict": lambda model: dip.predict(dip.convert(model), x, k=2),
    }
    kept = []
    for again in range(2):  # what torch imports at the first use holds the frames that asked for it
        gc.collect()
        gc.disable()
        try:
            for name, use in uses.items():
                model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
                use(model)
                seen = weakref.ref(model)
                del model
                kept += [name] * (again and seen() is not None)
        finally:
            gc.enable()
    assert not kept


def memory_stays_flat_over_many_steps():
    """No object stays, and no memory to speak of; `make soak` takes longer and looks closer."""
    torch.set_num_threads(1)
    model, x = network(), torch.randn(16, 33)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def steps(number):
        for i in range(number):
            with dip.fixed_noise(i):
                one_step(model, x)
            one_step(model, x)
            optimizer.step()
            functional.perturb(x, torch.ones(33), SEED)

    steps(100)
    gc.collect()
    grown = []
    for _ in range(3):  # a leak grows each time; what an allocator takes from the system comes once
        before, objects = resident(), len(gc.get_objects())
        steps(400)
        gc.collect()
        assert len(gc.get_objects()) - objects < 200
        grown.append(resident() - before)
        if grown[-1] < 3.5e6:  # a leaked gradient of 1320 weights would be 4.2 MB
            return
    raise AssertionError(f"bytes more after each 400 steps: {grown}")


# ---- noise is never shared by accident -----------------------------------------------------------


def correlation(a, b):
    a, b = a.flatten().double(), b.flatten().double()
    return abs(float((a * b).mean())) * a.numel() ** 0.5  # in standard deviations


def test_layers_steps_ranks_samples_and_trajectories_never_share_noise():
    """Streams that differ in one number are uncorrelated, also under a shift of rows or columns."""
    shape = (64, 256)

    def z(key=1, stream=0, **where):
        return functional.noise(shape, torch.tensor([key, stream]), **where)

    base = z()
    others = {
        "layer": z(stream=1),
        "far layer": z(stream=2**15),
        "step": z(key=2),
        "high bit of the key": z(key=1 - 2**63),
        "sample": z(sample=1),
        "last sample": z(sample=2**16 - 1),
        "rank or trajectory": z(row0=64),
        "rows beyond 32 bits": z(row0=2**32),
        "columns of the next shard": z(col0=256),
        "layer and sample swapped": z(stream=1, sample=1),
    }
    assert all(correlation(base, other) < 5 for other in others.values())
    names = list(others)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert correlation(others[a], others[b]) < 5.5, (a, b)
        for shift in (1, 2, 8):
            assert correlation(base[shift:], others[a][:-shift]) < 5.5
            assert correlation(base[:, shift:], others[a][:, :-shift]) < 5.5


def test_drawn_seeds_never_repeat_within_the_birthday_bound():
    """80 bits of a drawn seed matter: n passes of layers share one with probability below n^2 /
    2^81, 2e-16 here."""
    torch.manual_seed(0)
    stream, x = torch.tensor([0, 0]), torch.ones(1)
    n = 20_000
    drawn = {
        (int(key), int(number) & 0xFFFF)
        for key, number in (dip.noise.seeds.draw(stream, x).tolist() for _ in range(n))
    }
    assert len(drawn) == n and n**2 / 2**81 < 2e-16
    keys = torch.tensor([key for key, _ in drawn])
    for bit in range(64):  # every bit of the key is in use
        share = ((keys >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / n**0.5, bit


if __name__ == "__main__":
    memory_stays_flat_over_many_steps()
