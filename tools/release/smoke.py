"""Does the installed package work?  Run it in an environment with the wheel and torch, outside
the source tree:

    cd /tmp && python smoke.py [--expect cpu|cuda|none] [--import-share 0.08]

--expect: what the compiled library must carry: CPU kernels, CPU and CUDA kernels, or nothing (the
pure Python wheel). --import-share: the limit for the processor time of `import dipkernels` over
that of `import torch` before it, the least of five new processes. Reads nothing but the package.
"""

import argparse
import subprocess
import sys
import time
import warnings
from pathlib import Path

# docs/maths.md, section 3: key 0x0123456789abcdef, stream 0, sample 0, row 5, columns 0-7.
KEY = 0x0123456789ABCDEF
KNOWN = [-0.2667177, -0.1194537, 0.3566937, 0.9528818, -0.6610492, 0.9043018, -1.0313795, 0.2357624]
TIME_IMPORT = """
import time
start = time.process_time()
import torch
before = time.process_time()
import dipkernels
print(before - start, time.process_time() - before)
"""


def check(name, holds, shown=""):
    print(f"{'ok  ' if holds else 'FAIL'} {name} {shown}".rstrip())
    check.failed |= not holds


check.failed = False


def check_installed(dip, expect):
    from dipkernels import backends, library

    folder = Path(dip.__file__).parent
    check("installed, not a source tree", not (folder.parent / "setup.py").exists(), str(folder))
    found = library.load()
    check(
        "the library loads, or was not asked for",
        found.loaded == (expect != "none"),
        found.error or found.path,
    )
    check(
        "CPU kernels",
        bool(found.cpu_capabilities) == (expect != "none"),
        " ".join(found.cpu_capabilities),
    )
    check(
        f"CUDA kernels, {'expected' if expect == 'cuda' else 'none expected'} (--expect {expect})",
        bool(found.cuda_archs) == (expect == "cuda"),
        f"{' '.join(found.cuda_archs)} by {found.cuda_toolkit}",
    )
    backend = backends.choose("perturb", "cpu").backend
    check("what runs on the CPU", backend == ("reference" if expect == "none" else "cpu"), backend)


def check_values(torch, dip):
    seed = torch.tensor([KEY, 0])
    z = dip.functional.noise((1, 8), seed, row0=5)[0]
    check("the noise contract's known answer", (z - torch.tensor(KNOWN)).abs().max().item() < 4e-6)
    x, sigma = torch.randn(33, 20), torch.rand(20)
    u = dip.functional.perturb(x, sigma, seed)
    want = dip.reference.perturb(x.double(), sigma, seed, -1, 0, 0, 0, 1.0, False, None)
    check("perturb is the reference's", (u - want).abs().max().item() < 1e-5)


def check_training(torch, dip, device):
    nn = torch.nn
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).to(
        device
    )
    x, y = torch.randn(16, 3, 8, 8, device=device), torch.randint(10, (16,), device=device)
    plain = model.eval()(x)
    dip.convert(model)
    check(f"{device}: eval is the plain network, bit for bit", torch.equal(plain, model.eval()(x)))
    model.train()
    optimizer = torch.optim.Adam(dip.param_groups(model, lr=1e-2))
    losses = []
    for step in range(20):
        with dip.fixed_noise(step % 2):
            out = dip.trajectories(model, x, m=2)
            loss = dip.objective(out, y, nn.functional.cross_entropy, model, alpha=1e-4, beta=1e-6)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    check(
        f"{device}: twenty steps learn",
        losses[-1] < 0.5 * losses[0],
        f"{losses[0]:.3f} -> {losses[-1]:.3f}",
    )
    with dip.fixed_noise(1):
        a = model(x)
    with dip.fixed_noise(1):
        check(f"{device}: noise replays", torch.equal(a, model(x)))
    check(f"{device}: predict", dip.predict(model, x, k=4).shape == (16, 10))


def check_triton():
    try:
        import triton  # noqa: F401
    except ImportError:
        print("     Triton is not installed: its kernels were not imported")
        return
    from dipkernels.triton_kernels import linear, noise, perturb

    check("the Triton kernels import", all((linear, noise, perturb)))


def check_import_time(limit):
    """In new processes, the least of five: what else the machine does only adds. The first one may
    write bytecode."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", TIME_IMPORT], check=True, capture_output=True, text=True
        )
        for _ in range(6)
    ]
    theirs, own = min(
        (tuple(map(float, run.stdout.split())) for run in runs[1:]), key=lambda t: t[1] / t[0]
    )
    shown = f"{own / theirs:.3f} ({1e3 * own:.0f} of {1e3 * theirs:.0f} ms of processor time)"
    check(f"import takes under {limit:g} of torch's", own < limit * theirs, shown)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--expect", choices=("cpu", "cuda", "none"), default="cpu")
    parser.add_argument("--import-share", type=float)
    arguments = parser.parse_args()
    sys.path[:] = [p for p in sys.path if p not in ("", str(Path(__file__).parent))]
    import torch

    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if arguments.expect == "none" else "error")
        import dipkernels as dip
    print(
        f"     dipkernels {dip.__version__}, torch {torch.__version__}, Python "
        f"{sys.version.split()[0]}"
    )
    print(f"     first import after torch: {1e3 * (time.perf_counter() - start):.0f} ms")
    check("import touches no GPU", not torch.cuda.is_initialized())
    check_installed(dip, arguments.expect)
    check_values(torch, dip)
    check_training(torch, dip, "cpu")
    if torch.cuda.is_available():
        check_training(torch, dip, "cuda")
    check_triton()
    check("the report prints", "library" in str(dip.env_report()))
    if arguments.import_share:
        check_import_time(arguments.import_share)
    sys.exit(1 if check.failed else 0)


if __name__ == "__main__":
    main()
