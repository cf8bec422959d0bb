"""CIFAR-100 on ViT-Tiny, Small or Base, trained clean, with Gaussian noise or with FGSM: the
paper's vision setting.

    python examples/recipe_cifar100.py --data cifar-100-binary --out out/c100 --size tiny \\
        --pretrained DIR --method dip --m 4 --training FGSM --epochs 10
    torchrun --nproc-per-node 8 examples/recipe_cifar100.py ...  the same on eight GPUs
    python examples/recipe_cifar100.py ... --resume              goes on from OUT/last.pt

--data: the folder with train.bin and test.bin of CIFAR-100's binary version (records of 3074 bytes:
coarse label, fine label, red, green and blue plane). --pretrained: a local folder of a transformers
ViT checkpoint; without it the weights are random. Nothing is downloaded. Writes metrics.jsonl,
last.pt and results.json: accuracy clean, under Gaussian noise and under FGSM, by the deterministic
forward (Algorithm 3) and, with --k, by k passes (Algorithm 2).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from recipe_training import (
    AMOUNT,
    Trainer,
    Worker,
    apply_method,
    check_arguments,
    checked,
    make_parser,
    refusing,
    workers,
    write_results,
)
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

import dipkernels as dip

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}  # width, blocks, heads
RECORD = 2 + 3 * 32 * 32
CLASSES = 100
ARCHIVE = "cifar-100-binary.tar.gz"
DATA = f"folder with train.bin and test.bin of CIFAR-100's binary version, {ARCHIVE} unpacked"


def load(path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] uint8 and fine labels [N] of one file of CIFAR-100's binary version."""
    if not path.is_file():
        raise FileNotFoundError(
            f"--data: expected {path.name} of CIFAR-100's binary version in {path.parent}, "
            f"{_what_is_there(path.parent)}"
        )
    raw = np.fromfile(path, dtype=np.uint8)
    if len(raw) == 0 or len(raw) % RECORD:
        raise ValueError(
            f"--data: expected records of {RECORD} bytes in {path}, got {len(raw)} bytes"
        )
    records = torch.from_numpy(raw).view(-1, RECORD)
    labels = records[:, 1].long()
    if labels.max() >= CLASSES:
        raise ValueError(
            f"--data: expected fine labels below {CLASSES} in {path}, got {labels.max()}"
        )
    return records[:, 2:].reshape(-1, 3, 32, 32), labels


def _what_is_there(folder: Path) -> str:
    """What lies in its place, and the way out."""
    if (folder / "train").is_file() and (folder / "meta").is_file():
        return (
            f"got the python version (train, test, meta); unpack {ARCHIVE}, the binary version, "
            "and give its folder"
        )
    inside = [inner.name for inner in sorted(folder.iterdir()) if (inner / "train.bin").is_file()]
    if inside:
        return f"found it one folder further in: {folder / inside[0]}"
    if (folder / ARCHIVE).is_file():
        return f"found {ARCHIVE}: unpack it"
    return f"found none; unpack {ARCHIVE} and give its folder"


class Classifier(nn.Module):
    """Pixels 0 .. 1 [B, 3, 32, 32] -> logits: resized to what the ViT wants, scaled to its -1 ..
    1."""

    def __init__(self, vit: ViTForImageClassification) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixels: Tensor) -> Tensor:
        size = self.vit.config.image_size
        if size != pixels.shape[-1]:
            pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
        return self.vit(pixel_values=2 * pixels - 1).logits


def build(args: argparse.Namespace) -> Classifier:
    if args.pretrained:
        if not args.pretrained.is_dir():
            raise FileNotFoundError(f"--pretrained: expected a local folder, got {args.pretrained}")
        try:
            vit = ViTForImageClassification.from_pretrained(
                args.pretrained,
                num_labels=CLASSES,
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
        except Exception as error:
            raise ValueError(
                f"--pretrained: expected a ViT checkpoint in {args.pretrained}, got {error!r}"
            ) from error
        return Classifier(vit)
    width, blocks, heads = SIZES[args.size]
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=args.blocks or blocks,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=args.image_size,
        patch_size=args.patch_size,
        num_labels=CLASSES,
    )
    return Classifier(ViTForImageClassification(config))


def augmented(pixels: Tensor) -> Tensor:
    """A random crop after padding by 4, and a flip for half of the images."""
    padded = F.pad(pixels, (4, 4, 4, 4), mode="reflect")
    rows, columns = (torch.randint(0, 9, (len(pixels),), device=pixels.device) for _ in range(2))
    along = torch.arange(32, device=pixels.device)
    columns = columns[:, None] + along
    flip = torch.rand(len(pixels), device=pixels.device) < 0.5
    columns[flip] = columns[flip].flip(1)
    picked = padded.gather(
        2, (rows[:, None] + along)[:, None, :, None].expand(-1, 3, -1, padded.shape[-1])
    )
    return picked.gather(3, columns[:, None, None, :].expand(-1, 3, 32, -1))


def fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, eps: float) -> Tensor:
    """clip(x + eps * sign(dL/dx), 0, 1) on the deterministic forward; leaves no gradients on the
    parameters."""
    was_training = model.training
    model.eval()
    x = pixels.detach().requires_grad_(True)
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x).float(), labels), x)
    model.train(was_training)
    return (pixels + eps * grad.sign()).clamp(0, 1)


def evaluate(
    model: nn.Module, worker: Worker, trainer: Trainer, data: tuple[Tensor, Tensor], args
) -> dict:
    """Accuracy in % over all workers; every worker takes every size-th batch."""
    images, labels = data
    kinds = ("clean", "Gaussian", "FGSM", *((f"clean, k = {args.k}",) if args.k else ()))
    right = dict.fromkeys(kinds, 0.0)
    model.eval()
    chunks = list(torch.arange(len(images)).split(args.batch))[worker.rank :: worker.size]
    for number, idx in enumerate(
        tqdm(chunks, desc="test", disable=not worker.is_first, dynamic_ncols=True)
    ):
        torch.manual_seed(number * worker.size + worker.rank)
        x, y = images[idx].to(worker.device).float() / 255, labels[idx].to(worker.device)
        with trainer.autocast():
            shown = {
                "clean": x,
                "Gaussian": x + args.noise * torch.randn_like(x),
                "FGSM": fgsm(model, x, y, args.eps),
            }
            with torch.no_grad():
                for name, pixels in shown.items():
                    right[name] += (model(pixels).argmax(-1) == y).sum().item()
                if args.k:
                    probs = dip.predict(model, x, k=args.k)
                    right[kinds[-1]] += (probs.argmax(-1) == y).sum().item()
    totals = worker.total(*right.values())
    return {name: round(100 * total / len(images), 3) for name, total in zip(right, totals)}


def train(parser: argparse.ArgumentParser, args: argparse.Namespace, worker: Worker) -> None:
    """Fine-tune the ViT, and test it.

    A function, so that the model is gone before the process group is; else a worker may hang.
    """
    with refusing(parser):
        images, labels = load(args.data / "train.bin")
        test = load(args.data / "test.bin")
        torch.manual_seed(args.seed)
        model = build(args)
    batch = images[: args.batch].float() / 255
    entry = model.vit.vit.embeddings.patch_embeddings
    apply_method(model, entry, args, batch)
    model.to(worker.device)

    def batch_of(indices: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (t[indices].to(worker.device) for t in (images, labels))
        x = augmented(x.float() / 255)
        if args.training == "Gaussian":
            x = x + args.noise * torch.randn_like(x)
        elif args.training == "FGSM":
            x = fgsm(model, x, y, args.eps)
        return x, y

    def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        out = dip.trajectories(model, x, m=args.m)
        return dip.objective(out.float(), y, F.cross_entropy, lambda_s=args.lambda_s)

    settings = {"recipe": "cifar100", "training": args.training}
    trainer = Trainer(model, worker, args, len(images), settings)
    if trainer.run(batch_of, loss_of):
        write_results(worker, args, {"accuracy": evaluate(model, worker, trainer, test, args)})


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__, DATA)
    add, kinds = parser.add_argument, ("clean", "Gaussian", "FGSM")
    size = checked(int, "1 to 4096", lambda n: 1 <= n <= 4096)
    passes = checked(int, "at least 0", lambda n: n >= 0)
    how = "on the images as they are, with --noise, or attacked by --eps (clean)"
    folder = "local folder of a transformers ViT checkpoint, instead"
    add("--size", choices=SIZES, default="tiny", help="ViT-Tiny, Small or Base, random weights")
    add("--pretrained", type=Path, help=folder)
    add("--image-size", type=size, default=224, help="what 32 x 32 pixels are enlarged to (224)")
    add("--patch-size", type=size, default=16, help="pixels of a patch's side (16)")
    add("--blocks", type=size, help="number of blocks, if not the size's own 12")
    add("--training", choices=kinds, default="clean", help=how)
    add("--noise", type=AMOUNT, default=0.5, help="sigma of the Gaussian perturbation (0.5)")
    add("--eps", type=AMOUNT, default=8 / 255, help="strength of FGSM (8/255)")
    add("--k", type=passes, default=0, help="also test the mean of k noisy passes (0: do not)")
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    if args.image_size % args.patch_size:
        parser.error(
            f"--patch-size: expected a divisor of --image-size {args.image_size}, got "
            f"{args.patch_size}"
        )
    if args.k and args.method not in ("fixed", "dip"):
        parser.error(f"--k: expected with --method fixed or dip, got --method {args.method}")

    with workers(args.device) as worker:
        train(parser, args, worker)


if __name__ == "__main__":
    main()
