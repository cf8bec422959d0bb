"""What users write, for mypy --strict (`make typecheck`): every public call has types, so that
users may be strict too. Never run."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dipkernels as dip


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    dip.convert(model, init_variance=0.01, exclude=["head"])
    dip.calibrate(model, [x for x, _ in batches], ratio=0.5, per="layer")
    optimizer = torch.optim.AdamW(
        dip.param_groups(model, lr=1e-3, weight_decay=0.05, variance_lr=1e-2)
    )
    for x, y in batches:
        out = dip.trajectories(model, x, m=4)
        loss: Tensor = dip.objective(out, y, F.cross_entropy, model)
        loss = loss + dip.kl_penalty(model, 0.1) + dip.penalty(model, 1e-4, 1e-6)
        loss.backward()
        optimizer.step()
    with dip.fixed_noise(key=7, row0=0) as fixed, dip.noise_off():
        print(fixed, dip.summary(model), dip.env_report())
    probabilities: Tensor = dip.predict(model.eval(), batches[0][0], k=16, average="probs")
    print(probabilities)
    found = dip.certify(model, batches[0][0], k=100)
    print(found.radius, found.accuracy(batches[0][1], 0.1))
    report = dip.check(model, batches[0][0], strict=False)
    if not report:
        print(report.faults, dip.config_of(model))
    for x, _ in (line := dip.progress(batches, model, every=5)):
        line.update(loss=model(x).sum())
    dip.save(model, "folder")
    dip.load_variances(model, dip.variances(model))
    return dip.to_plain(model)


class Net(nn.Module):
    """A model keeps its class."""

    def __init__(self) -> None:
        super().__init__()
        self.head = dip.number_layers(dip.DIPLinear(8, 4))


def net() -> Net:
    model = dip.convert(Net())
    model = dip.apply(model, dip.DIPConfig(init_variance=0.1))
    print(model.head.out_features + 1)
    dip.no_such_name()  # type: ignore[attr-defined]
    return dip.load(model, "folder")


def layers() -> list[nn.Module]:
    linear = dip.DIPLinear(
        8,
        4,
        bias=False,
        init_variance=0.1,
        num_samples=2,
        keep="x",
        device="cpu",
        dtype=torch.float32,
    )
    variance: Tensor = linear.log_variance
    print(variance)
    return [
        linear,
        dip.DIPConv2d(3, 8, 3, padding=1),
        dip.DIPInput(8, dim=-1),
        dip.number_layers(nn.Sequential(linear)),
    ]


def functions(x: Tensor, weight: Tensor, sigma: Tensor, seed: Tensor) -> Tensor:
    u: Tensor = dip.functional.perturb(x, sigma, seed, num_samples=4)
    y: Tensor = dip.functional.dip_linear(x, weight, None, sigma, seed, keep="x")
    with dip.backend("reference"):
        z: Tensor = dip.functional.noise((2, 8), seed, row0=1)
    return u.sum() + y.sum() + z.sum()


class Norm(dip.DIPLayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def typed(x: Tensor) -> Tensor:
    dip.DIPConv2d(3, 8, "3")  # type: ignore[arg-type]
    y: Tensor = dip.DIPGatedActivation(8).forward(x, x)
    dip.DIPActivation(8, "relu").forward(3)  # type: ignore[arg-type]
    found = dip.tune(lambda ratio, kl, epochs: {"clean": x.mean(), "robust": x.mean()}, budget=60)
    return y * found.ratio
