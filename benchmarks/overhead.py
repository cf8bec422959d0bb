"""What a DIP layer costs over nn.Linear, beside what one would otherwise use:

    python benchmarks/overhead.py

Every case checks its results against dipkernels.reference, then times all variants in turn, round
by round; the figure is the median of the ratios within a round, its spread their quartiles. About
three minutes on two quiet cores.

    --quick                  tiny shapes: does it run?
    --shapes 4096x1024x1024  other layers, M x K x N; --dtypes float32 bfloat16
    --against run.json       what moved beyond the spread since that run
    --from record.json       the tables of a stored run, or of a record of summary.py
    --docs                   write the tables and plots of docs/measured.md and README.md
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import figures
import machine
import peers
import report
import timing
import torch
from torch import Tensor, nn
from tqdm import tqdm

import dipkernels as dip
from dipkernels.ops.draw import Draw
from dipkernels.ops.perturb import perturb_bwd

SHAPES = [(4096, 1024, 1024), (512, 4096, 4096), (65536, 64, 64)]
CUDA_SHAPES = [(8192, 4096, 4096), (8192, 4096, 1024), (4096, 1024, 1024), (65536, 64, 64)]
QUICK_SHAPES = [(48, 64, 32)]
SMALL = (32, 128, 128)
LAYERS = ("linear", "dip", "eager", "eager, compiled", "dropout", "flipout")
WHATS = ("forward", "forward + backward")
SAMPLES = 64
# What this project set out to reach on two cores with AVX-512: (forward, forward + backward) over
# nn.Linear.
TARGETS = {
    ("float32", (4096, 1024, 1024)): (1.04, 1.04),
    ("float32", (512, 4096, 4096)): (1.02, 1.02),
    ("float32", (65536, 64, 64)): (1.40, 1.25),
    ("bfloat16", (4096, 1024, 1024)): (1.12, 1.10),
    ("bfloat16", (512, 4096, 4096)): (1.05, 1.05),
    ("bfloat16", (65536, 64, 64)): (2.1, 1.6),
}
PERTURB_TARGETS = {"float32": 12, "bfloat16": 16}  # x + sigma * torch.randn_like(x) over perturb
SMALL_TARGET_US = 25.0  # over nn.Linear, forward + backward
SAMPLES_TARGET = 1.02


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def text_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# ---- the cases: each checks, then times, and returns rows ----------------------------------------


class Run:
    """The device, the limits of a case, and the rows so far."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.has_targets = device.type == "cpu" and torch.get_num_threads() == 2 and not quick
        self.budget_s = 0.02 if quick else 5.0  # of timing for each of a case's parts
        self.rounds = (2, 2) if quick else (9, 60)
        self.rows: list[dict] = []
        self.missing: dict[str, str] = {}

    def interleave(
        self, calls: dict[str, Callable[[], object]], base: str, **options
    ) -> dict[str, dict]:
        settings = {
            "budget_s": self.budget_s,
            "rounds": self.rounds,
            "at_least_s": 1e-4 if self.quick else 2e-3,
        }
        return timing.interleave(calls, base, self.device, **(settings | options))

    def add(self, timed: dict[str, dict], **labels) -> None:
        missing = self.missing if labels["section"] in ("linear", "small") else {}
        found = timed | {name: {"missing": reason} for name, reason in missing.items()}
        self.rows += [{**labels, "variant": name, **values} for name, values in found.items()]


def _modules(
    run: Run, plain: nn.Linear, names: tuple[str, ...], x: Tensor, dy: Tensor
) -> dict[str, nn.Module]:
    """Every variant that exists here, each checked."""
    modules = {}
    for name in names:
        module = peers.build(name, plain)
        if isinstance(module, peers.Missing):
            run.missing[name] = module.reason
            continue
        try:
            peers.check_linear(name, module, plain, x, dy)
        except AssertionError:
            raise
        except Exception as error:  # torch.compile without a compiler, for one: listed as missing
            run.missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        modules[name] = module
    return modules


def linear_case(run: Run, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    plain, x, dy = peers.inputs_of(shape, dtype, run.device)
    run.missing.clear()
    modules = _modules(run, plain, LAYERS, x, dy)
    labels = {"section": "linear", "dtype": name_of(dtype), "shape": text_of(shape)}
    for index, (what, make) in enumerate(timing.passes(x, dy).items()):
        timed = run.interleave({name: make(module) for name, module in modules.items()}, "linear")
        for name, values in timed.items():
            if index and "seconds" in values:
                module = modules[name]
                values["saved_bytes"] = timing.saved_bytes(
                    lambda m=module: m(x), list(module.parameters())
                )
                values["peak_bytes"] = timing.peak_bytes(make(module), run.device)
        if run.has_targets and (name_of(dtype), shape) in TARGETS:
            timed["dip"]["target"] = TARGETS[name_of(dtype), shape][index]
        run.add(timed, **labels, what=what)
    peers.forget_compiled()


def perturb_case(run: Run, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """P and Q alone, beside the one-liner, its compiled form and a copy, which must move the same
    bytes."""
    x = torch.randn(shape, device=run.device).to(dtype)
    sigma = torch.full(shape[-1:], peers.SIGMA, device=run.device)
    seed = torch.tensor([peers.KEY, 1], device=run.device)
    peers.check_perturb(x, sigma, seed)

    def eager() -> Tensor:
        return x + sigma.to(dtype) * torch.randn_like(x)

    calls = {
        "dip": lambda: dip.functional.perturb(x, sigma, seed),
        "dip, gradient of sigma": lambda: perturb_bwd(x, sigma, seed, Draw()),
        "copy": x.clone,
        "randn_like alone": lambda: torch.randn_like(x),
        "eager": eager,
        "eager, compiled": torch.compile(eager, backend=peers.compile_backend, dynamic=False),
    }
    with torch.no_grad():
        timed = run.interleave(calls, "dip", budget_s=run.budget_s / 2, seldom=3)
    if run.has_targets and name_of(dtype) in PERTURB_TARGETS:
        timed["eager"]["target"] = PERTURB_TARGETS[name_of(dtype)]
    run.add(timed, section="perturb", dtype=name_of(dtype), shape=text_of(shape))
    peers.forget_compiled()


def samples_case(run: Run, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """S samples averaged inside an affine layer, over S = 1."""
    plain, x, dy = peers.inputs_of(shape, dtype, run.device)
    modules = {}
    for samples in (1, SAMPLES):
        layer = dip.DIPLinear(
            shape[1], shape[2], device=run.device, dtype=dtype, num_samples=samples
        )
        layer.load_state_dict(plain.state_dict())
        peers.check_dip_linear(layer, x, dy)
        modules[f"S = {samples}"] = layer
    calls = {name: timing.training_step(module, x, dy) for name, module in modules.items()}
    timed = run.interleave(calls, "S = 1", always=tuple(modules), budget_s=run.budget_s / 2)
    for name, module in modules.items():
        timed[name]["saved_bytes"] = timing.saved_bytes(
            lambda m=module: m(x), list(module.parameters())
        )
    if run.has_targets:
        timed[f"S = {SAMPLES}"]["target"] = SAMPLES_TARGET
    run.add(timed, section="samples", dtype=name_of(dtype), shape=text_of(shape), what=WHATS[1])


def small_case(run: Run, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """A layer whose time is Python and the dispatcher; "floor": nn.Linear behind an empty
    autograd.Function."""
    plain, x, dy = peers.inputs_of(shape, dtype, run.device)
    run.missing.clear()
    modules = _modules(run, plain, (*LAYERS, "floor"), x, dy)
    for what, make in timing.passes(x, dy).items():
        calls = {name: make(module) for name, module in modules.items()}
        timed = run.interleave(
            calls, "linear", always=("dip", "floor", "eager"), budget_s=run.budget_s / 2
        )
        run.add(timed, section="small", dtype=name_of(dtype), shape=text_of(shape), what=what)
    peers.forget_compiled()


# ---- tables --------------------------------------------------------------------------------------


def _select(rows: list[dict], **labels) -> dict[str, dict]:
    return {row["variant"]: row for row in rows if all(row.get(k) == v for k, v in labels.items())}


def _cases(rows: list[dict], section: str, *keys: str) -> list[dict]:
    found = [{key: row.get(key) for key in keys} for row in rows if row["section"] == section]
    return [case for index, case in enumerate(found) if case not in found[:index]]


def _verdict(row: dict) -> str:
    if "target" not in row:
        return ""
    if row["ratio"] <= row["target"]:
        return f"{row['target']:g}, reached"
    reached_by_spread = row["quartiles"][0] <= row["target"]
    return f"{row['target']:g}, missed by {row['ratio'] - row['target']:.3f}" + (
        " (within the spread)" if reached_by_spread else ""
    )


def _linear_table(rows: list[dict], rates: dict) -> str:
    lines = []
    for case in _cases(rows, "linear", "dtype", "shape", "what"):
        found = _select(rows, section="linear", **case)
        base, ours = found["linear"], found["dip"]
        limit = rates.get("matmul_flop_per_s", {}).get(case["dtype"])
        share = ""
        if limit and "seconds" in ours:
            flops = 2 * math.prod(shape_of(case["shape"])) * (3 if case["what"] == WHATS[1] else 1)
            share = f"{flops / ours['seconds'] / 1e12:.3g} of {limit / 1e12:.3g}"
        lines.append(
            [
                f"{case['dtype']} {case['shape']}",
                case["what"],
                report.duration(base["seconds"]),
                report.ratio(ours, spread=True),
                _verdict(ours),
                share,
                *(report.ratio(found.get(name)) for name in LAYERS[2:]),
            ]
        )
    heads = [
        "M x K x N",
        "",
        "nn.Linear",
        "**DIP**",
        "target",
        "TFLOP/s, DIP of matmul",
        *LAYERS[2:],
    ]
    return report.table(heads, lines)


def _memory_table(rows: list[dict]) -> str:
    lines = []
    for case in _cases(rows, "linear", "dtype", "shape"):
        found = _select(rows, section="linear", **case, what=WHATS[1])
        base = found["linear"]
        cells = []
        for key in ("saved_bytes", "peak_bytes"):
            cells.append(report.size(base[key]))
            for name in ("dip", "eager", "eager, compiled", "flipout"):
                row = found.get(name, {})
                cells.append(
                    f"{row[key] / base[key]:.3f}" if key in row else report.ratio(row or None)
                )
        lines.append([f"{case['dtype']} {case['shape']}", *cells])
    heads = ["M x K x N", "saved: nn.Linear", "**DIP**", "eager", "compiled", "flipout"]
    return report.table(
        [*heads, "peak: nn.Linear", "**DIP**", "eager", "compiled", "flipout"], lines
    )


def _perturb_table(rows: list[dict], rates: dict) -> str:
    lines = []
    for case in _cases(rows, "perturb", "dtype", "shape"):
        found = _select(rows, section="perturb", **case)
        ours, eager = found["dip"], found["eager"]
        target = eager.get("target")
        m, k = map(int, case["shape"].split("x"))
        moved = 2 * m * k * getattr(torch, case["dtype"]).itemsize / ours["seconds"]
        verdict = (
            ""
            if target is None
            else f"{target}, " + ("reached" if eager["ratio"] >= target else "missed")
        )
        lines.append(
            [
                f"{case['dtype']} {case['shape']}",
                report.duration(ours["seconds"]),
                f"{moved / 1e9:.1f} of {rates['copy_bytes_per_s'] / 1e9:.1f}",
                report.duration(found["dip, gradient of sigma"]["seconds"]),
                report.ratio(eager, spread=True),
                verdict,
                *(
                    report.ratio(found.get(name))
                    for name in ("eager, compiled", "randn_like alone", "copy")
                ),
            ]
        )
    heads = [
        "M x K",
        "perturb",
        "GB/s of copy",
        "gradient of sigma",
        "**eager over perturb**",
        "target",
    ]
    return report.table(
        [*heads, "compiled over perturb", "randn_like over perturb", "copy over perturb"], lines
    )


def _samples_table(rows: list[dict]) -> str:
    lines = []
    for case in _cases(rows, "samples", "dtype", "shape"):
        found = _select(rows, section="samples", **case)
        ours = found[f"S = {SAMPLES}"]
        saved = ours["saved_bytes"] / found["S = 1"]["saved_bytes"]
        where = f"{case['dtype']} {case['shape']}"
        lines.append([where, report.ratio(ours, spread=True), _verdict(ours), f"{saved:.3f}"])
    return report.table(["M x K x N", f"S = {SAMPLES} over S = 1", "target", "bytes kept"], lines)


def _small_table(rows: list[dict]) -> str:
    def over(row: dict | None) -> str:
        if row is None or "over_base_s" not in row:
            return report.ratio(row)
        low, high = (1e6 * value for value in row["over_base_quartiles_s"])
        return f"{1e6 * row['over_base_s']:.1f} [{low:.1f}, {high:.1f}]"

    lines = []
    for case in _cases(rows, "small", "dtype", "shape", "what"):
        found = _select(rows, section="small", **case)
        base = f"{1e6 * found['linear']['seconds']:.1f}"
        names = ("dip", "floor", "eager", "eager, compiled", "dropout", "flipout")
        lines.append(
            [
                f"{case['dtype']} {case['shape']}",
                case["what"],
                base,
                *(over(found.get(name)) for name in names),
            ]
        )
    heads = [
        "M x K x N",
        "",
        "nn.Linear, us",
        "**DIP** over it",
        "floor",
        "eager",
        "compiled",
        "dropout",
        "flipout",
    ]
    return report.table(heads, lines)


def _missing(rows: list[dict]) -> str:
    reasons = {row["variant"]: row["missing"] for row in rows if "missing" in row}
    reasons |= {row["variant"]: row["error"] for row in rows if "error" in row}
    return "\n".join(f"Missing: {name}: {reason}" for name, reason in reasons.items())


def text(record: dict) -> str:
    """Everything that was measured, as Markdown."""
    rows, rates = record["rows"], record["rates"]
    matmul = ", ".join(
        f"{rate / 1e12:.3g} TFLOP/s in {dtype}"
        for dtype, rate in rates["matmul_flop_per_s"].items()
    )
    parts = [
        f"{machine.sentence(record['machine'])}. The machine's own copy: "
        f"{rates['copy_bytes_per_s'] / 1e9:.1f} GB/s"
        f" read and written; its matrix product: {matmul}."
        f" `python benchmarks/overhead.py`, {record['seconds']:.0f} s.",
        "Time over nn.Linear: median of the ratios within a round, and for DIP its quartiles.",
        _linear_table(rows, rates),
        "Bytes kept for backward, and the most that tensors take during forward + backward, over "
        "nn.Linear's:",
        _memory_table(rows),
        "u = x + sigma z alone, beside `x + sigma * torch.randn_like(x)`:",
        _perturb_table(rows, rates),
        f"{SAMPLES} samples averaged inside the layer, forward + backward:",
        _samples_table(rows),
        f"A small layer, microseconds over nn.Linear (target: {SMALL_TARGET_US:g} for forward + "
        "backward); floor:"
        " nn.Linear behind an autograd.Function that copies its input and returns a stored "
        "gradient:",
        _small_table(rows),
        _missing(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def short_text(record: dict) -> str:
    """The README's table."""
    rows = record["rows"]
    lines = []
    for case in _cases(rows, "linear", "dtype", "shape"):
        both = [_select(rows, section="linear", **case, what=what) for what in WHATS]
        saved = both[1]["dip"]["saved_bytes"] / both[1]["linear"]["saved_bytes"]
        eager_saved = both[1]["eager"]["saved_bytes"] / both[1]["linear"]["saved_bytes"]
        cells = [" / ".join(report.ratio(found.get(name)) for found in both) for name in LAYERS[1:]]
        lines.append(
            [f"{case['dtype']} {case['shape']}", *cells, f"{saved:.2f}", f"{eager_saved:.2f}"]
        )
    heads = ["M x K x N", "**DIP**", *LAYERS[2:], "bytes kept: **DIP**", "eager"]
    return f"{report.table(heads, lines)}\n\n{machine.sentence(record['machine'])}."


def plot(record: dict, path: Path) -> None:
    """Time over the plain layer, which is the line at 1: one SVG, forward above forward +
    backward."""
    rows = record["rows"]
    cases = _cases(rows, "linear", "dtype", "shape")
    names = [f"{case['dtype']} {case['shape']}" for case in cases]
    with figures.style():
        figure, axes = figures.panels(
            len(WHATS), 1, 5.2, 0.3 * len(WHATS) * len(cases) + 2.4, sharex=True
        )
        for axis, what in zip(axes[:, 0], WHATS, strict=True):
            for name, color, marker in zip(LAYERS[1:], figures.ORDER, "Dos^v", strict=True):
                found = [
                    _select(rows, section="linear", **case, what=what).get(name, {})
                    for case in cases
                ]
                points = [(row["ratio"], -i) for i, row in enumerate(found) if "ratio" in row]
                if points:
                    label = {"dip": "DIP"}.get(name, name)
                    size, order = (9, 2) if name == "dip" else (6, 3)
                    axis.plot(
                        *zip(*points, strict=True),
                        marker,
                        color=color,
                        ms=size,
                        zorder=order,
                        label=label,
                    )
            axis.axvline(1, color=figures.FOREGROUND, linewidth=1, zorder=1)
            axis.set(
                title=f"{what}: time over nn.Linear's", xscale="log", ylim=(0.5 - len(cases), 0.5)
            )
            axis.set_yticks([-i for i in range(len(cases))], names)
            axis.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
            axis.minorticks_off()
            axis.tick_params(labelbottom=True)
            axis.set_ylabel("M x K x N")
        figures.legend(figure, axes[0, 0], columns=3)
        figures.save(figure, path)


# ---- command line --------------------------------------------------------------------------------


def shape_of(argument: str) -> tuple[int, int, int]:
    try:
        m, k, n = (int(part) for part in argument.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected MxKxN, such as 4096x1024x1024, got {argument!r}"
        ) from None
    if min(m, k, n) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes of at least 1, got {argument!r}")
    return m, k, n


def measure(args: argparse.Namespace) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    run = Run(device, args.quick)
    default = QUICK_SHAPES if args.quick else CUDA_SHAPES if device.type == "cuda" else SHAPES
    shapes = args.shapes or default
    dtypes = [getattr(torch, name) for name in args.dtypes]
    record = {"machine": machine.describe(device)}
    work: list[tuple[str, Callable[[], None]]] = []
    for dtype, shape in itertools.product(dtypes, shapes):
        work.append(
            (f"{name_of(dtype)} {text_of(shape)}", lambda d=dtype, s=shape: linear_case(run, d, s))
        )
    for dtype, shape in itertools.product(dtypes, dict.fromkeys(shape[:2] for shape in shapes)):
        work.append(
            (
                f"perturb {name_of(dtype)} {text_of(shape)}",
                lambda d=dtype, s=shape: perturb_case(run, d, s),
            )
        )
    work.append((f"S = {SAMPLES}", lambda: samples_case(run, dtypes[0], shapes[0])))
    for dtype in dtypes:
        work.append((f"small {name_of(dtype)}", lambda d=dtype: small_case(run, d, SMALL)))
    with tqdm(total=len(work) + 1, unit="case", dynamic_ncols=True) as bar:
        bar.set_description("copy and matrix product")
        side = 128 if args.quick else 8192 if device.type == "cuda" else 2048
        moved = 1 << 20 if args.quick else 1 << 30 if device.type == "cuda" else 1 << 28
        record["rates"] = {
            "copy_bytes_per_s": timing.copy_rate(device, moved),
            "matmul_flop_per_s": {
                name_of(dtype): timing.matmul_rate(device, dtype, side) for dtype in dtypes
            },
        }
        bar.update()
        for name, case in work:
            bar.set_description(name)
            case()
            bar.update()
    record |= {"seconds": time.perf_counter() - started, "quick": args.quick, "rows": run.rows}
    return record


def main(arguments: list[str] | None = None) -> dict:
    parser = report.command_line(__doc__, "overhead", "<device>")
    parser.add_argument("--shapes", nargs="+", type=shape_of, help="layers, each MxKxN")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=["float32", "bfloat16"])
    parser.add_argument(
        "--from", dest="source", type=report.stored_run, help="report a run instead of measuring"
    )
    parser.add_argument("--against", type=report.stored_run, help="a stored run to compare with")
    args = parser.parse_args(arguments)
    report.refuse_part(parser, args, "shapes", "dtypes")
    peers.compile_backend = "eager" if args.quick else "inductor"
    earlier = report.load(args.against, "overhead") if args.against else None

    record = report.load(args.source, "overhead") if args.source else measure(args)
    print(text(record))
    if not args.source:
        path = report.store("overhead", record, args.out)
        plot(record, path.with_suffix(".svg"))
        print(f"\nwrote {path} and {path.with_suffix('.svg').name} beside it")
    if args.docs:
        page = report.page_of(record["machine"])
        report.fill(page, f"overhead-{record['machine']['device']}", text(record))
        if record["machine"]["device"] == "cpu":
            plot(record, page.with_name(page.stem.replace("measured", "overhead") + ".svg"))
            if page == report.MEASURED and report.has_place(machine.ROOT / "README.md", "overhead"):
                report.fill(machine.ROOT / "README.md", "overhead", short_text(record))
    if earlier is not None:
        print("\n" + "\n".join(report.moved(record, earlier)))
    return record


if __name__ == "__main__":
    machine.restart_in_place()
    main()
