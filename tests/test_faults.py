"""What goes wrong around the package leaves a clear error and nothing lost: memory, exceptions,
Ctrl-C, disks, checkpoints.

docs/reliability.md. A failed allocation inside a kernel: test_guard_pages.py.
"""

import signal
import sys
from pathlib import Path

import pytest
import recipe_support
import torch
from torch import nn

import dipkernels as dip
from dipkernels import functional
from dipkernels.noise import contexts

resource = pytest.importorskip("resource")
SEED = torch.tensor([0x0123456789ABCDEF, 3])
FOLDERS = ("dipkernels/models/", "dipkernels/nn/")


@pytest.fixture(autouse=True)
def interruptible():
    """A shell's background jobs are started with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_out_of_memory_is_an_error_and_the_next_call_works():
    """u does not fit: RuntimeError, whichever operation; afterwards all is as before."""
    x = torch.ones(1, 8).expand(2**25, 8)  # 1 GiB of results from 32 bytes
    sigma = torch.ones(8, requires_grad=True)
    want = functional.perturb(x[:10], sigma, SEED).detach()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))
    try:
        for call in (
            lambda: functional.perturb(x, sigma, SEED),
            lambda: functional.noise((2**25, 8), SEED),
            lambda: functional.dip_linear(x, torch.ones(4, 8), None, sigma, SEED, keep="x"),
        ):
            with pytest.raises(RuntimeError, match=r"out of memory|allocate memory"):
                call()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert torch.equal(functional.perturb(x[:10], sigma, SEED), want)


# ---- exceptions ----------------------------------------------------------------------------------


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("on purpose")


def test_an_exception_in_the_middle_of_backward_leaves_the_model_sound():
    torch.manual_seed(0)
    parts = [torch.nn.Linear(12, 12) for _ in range(2)]
    model = dip.convert(torch.nn.Sequential(*parts))
    x = torch.randn(5, 12)

    def step():
        model.zero_grad()
        with dip.fixed_noise(4):
            model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = step()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="on purpose"), dip.fixed_noise(4):
        model[1](Fails.apply(model[0](x))).square().sum().backward()
    assert model[1].weight.grad is not None and model[0].weight.grad is None, "it failed elsewhere"
    assert all(torch.equal(a, b) for a, b in zip(step(), want, strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_a_context_restores_what_was_before(error):
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with dip.fixed_noise(1):
        outer = contexts.KEY
        for context in (
            dip.fixed_noise(2),
            dip.noise_off(),
            contexts.sampling_on(),
            contexts.numbered_pass(3),
        ):
            with pytest.raises(error), context:
                raise error
            assert contexts.KEY is outer and contexts.MODE is None and contexts.row0() == 0
    assert contexts.KEY is None and torch.backends.mha.get_fastpath_enabled() == fast_path


def test_a_row0_out_of_range_in_predict_leaves_no_noise_on():
    model = dip.convert(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ValueError, match="row0: expected"), dip.fixed_noise(1, row0=2**61):
        dip.predict(model, torch.ones(2, 4), k=4, chunk=4)
    assert contexts.MODE is None and torch.backends.mha.get_fastpath_enabled() == fast_path


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2)
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(x)
        x = self.q(x) + self.k(x)
        x = self.attention(x, x, x)[0]
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def state_of(model):
    """Each module's class, attributes, and the names in each of its dictionaries."""
    return [
        (type(m), list(vars(m)), [list(v) for v in vars(m).values() if isinstance(v, dict)])
        for m in model.modules()
    ]


@pytest.mark.parametrize(
    "options", [{"share": [("q", "k")]}, {"place": "producer", "batches": [torch.randn(3, 8)]}]
)
@pytest.mark.parametrize("work", ["convert", "to_plain"])
def test_ctrl_c_in_convert_and_to_plain_changes_nothing_or_all(work, options):
    def made():
        torch.manual_seed(0)
        model = Block()
        return model if work == "convert" else dip.convert(model, **options)

    def run(model, stop=None):
        """The number of lines of dipkernels.models and dipkernels.nn that it ran; at one of them
        Ctrl-C."""
        count = 0

        def trace(frame, event, _):
            nonlocal count
            if not any(name in frame.f_code.co_filename for name in FOLDERS):
                return None
            count += event == "line"
            if count == stop and event == "line":
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            dip.convert(model, **options) if work == "convert" else dip.to_plain(model)
        finally:
            sys.settrace(None)
        return count

    run(made())  # what the first call alone does is done
    model = made()
    before, total = state_of(model), run(model)
    after, seen = state_of(model), []
    for stop in range(total, 0, -max(1, total // 60)):
        model = made()
        with pytest.raises(KeyboardInterrupt):
            run(model, stop)
        seen.append(state_of(model))
        assert seen[-1] in (before, after), stop
    assert before in seen
    model = made()
    handle = model.q.register_forward_hook(lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        run(model, total - 20)
    handle.remove()
    assert not model.q._forward_hooks


def test_ctrl_c_in_apply_and_load_leaves_a_plain_model(tmp_path, monkeypatch):
    """Otherwise a trainer would take the config for a calibrated model's."""

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(8, 4)
    dip.save(dip.apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), dip.DIPConfig(), [x]), tmp_path)
    monkeypatch.setattr("dipkernels.config.calibrate", interrupted)
    monkeypatch.setattr("dipkernels.config.load_variances", interrupted)
    for work in (
        lambda: dip.apply(model, dip.DIPConfig(), [x]),
        lambda: dip.load(model, tmp_path),
    ):
        with pytest.raises(KeyboardInterrupt):
            work()
        assert type(model[0]) is torch.nn.Linear and dip.config_of(model) is None
    monkeypatch.undo()
    dip.load(model, tmp_path)


# ---- the examples' checkpoints: Ctrl-C, a full disk, what cannot be read -------------------------


def trainer(out, resume=False):
    torch.manual_seed(0)
    parts = torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)
    flags = "--save-every 2 --log-every 2 --lr 0.01 --seed 0" + " --resume" * resume
    return recipe_support.trainer(out, dip.convert(torch.nn.Sequential(*parts)), flags)


def train(t, interrupt_at=None):
    def interrupt():
        if t.step == interrupt_at:
            signal.raise_signal(signal.SIGINT)

    return recipe_support.train(t, 64, interrupt)


def files(out):
    return sorted(path.name for path in out.iterdir())


def test_ctrl_c_while_training_leaves_a_checkpoint_that_goes_on_to_the_same_end(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    train(trainer(whole))
    with pytest.raises(KeyboardInterrupt):
        train(trainer(parts), interrupt_at=7)
    assert files(parts) == ["last.pt", "metrics.jsonl"]
    assert torch.load(parts / "last.pt", weights_only=True)["step"] == 6
    assert train(trainer(parts, resume=True))
    a, b = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_ctrl_c_while_saving_leaves_the_last_checkpoint_and_no_temporary_file(
    tmp_path, monkeypatch
):
    t = trainer(tmp_path)
    t.save(tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()

    def interrupted(content, path):
        Path(path).write_bytes(b"half of it")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        t.save(tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before and files(tmp_path) == ["last.pt"]


def test_a_full_disk_leaves_the_last_checkpoint_and_no_temporary_file(tmp_path):
    t = trainer(tmp_path)
    t.save(tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    assert len(before) > 20000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match=r"last\.pt: could not be written, a full disk"):
            t.save(tmp_path / "last.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "last.pt").read_bytes() == before and files(tmp_path) == ["last.pt"]
    t.save(tmp_path / "last.pt")


# ---- nothing silent: a step without noise --------------------------------------------------------


def test_a_step_without_noise_gives_every_variance_a_gradient_of_zeros():
    """None would stop DistributedDataParallel at the next step, and keep an optimiser's old
    momentum going."""
    first = dip.DIPLinear(6, 6), dip.DIPInput(6), dip.DIPLayerNorm(6), dip.DIPRMSNorm(6)
    model = torch.nn.Sequential(*first, dip.DIPActivation(6, "gelu"), dip.DIPLinear(6, 2))
    gate = dip.DIPGatedActivation(6)
    with dip.noise_off():
        (model(torch.randn(3, 6)).sum() + gate(*torch.randn(2, 3, 6)).sum()).backward()
    for layer in (*model, gate):
        assert torch.equal(layer.log_variance.grad, torch.zeros(6))
        assert getattr(layer, "weight", None) is None or layer.weight.grad.abs().sum() > 0
