"""Digits, corruptions, attacks and the three networks of studies/vision.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

# images that training and validation may see; the other 897 are the test images, the same for all
# seeds
NUM_DEV = 900
NUM_TRAIN = 500

# ---- data ----------------------------------------------------------------------------------------


@cache
def digits() -> tuple[Tensor, Tensor]:
    """x [1797, 1, 8, 8] with pixels in 0 .. 1, y [1797]; in one fixed random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(20250604))
    x = torch.tensor(data.data / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    return x[order], torch.tensor(data.target)[order]


def split(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """train: 500 of the first 900 images, drawn anew by each seed; val: their other 400; test: the
    last 897."""
    x, y = digits()
    order = torch.randperm(NUM_DEV, generator=torch.Generator().manual_seed(seed))
    train, val = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return {
        "train": (x[train], y[train]),
        "val": (x[val], y[val]),
        "test": (x[NUM_DEV:], y[NUM_DEV:]),
    }


# ---- corruptions: x [B, 1, 8, 8] -> the same, each with a strength -------------------------------


def noise(x: Tensor, strength: float) -> Tensor:
    """x + strength * z."""
    return x + strength * torch.randn_like(x)


def blur(x: Tensor, strength: float) -> Tensor:
    """A Gaussian of this standard deviation in pixels, 5 x 5, borders reflected."""
    offsets = torch.arange(-2.0, 3.0)
    weights = torch.exp(-offsets.square() / (2 * strength**2))
    kernel = torch.outer(weights, weights) / weights.sum().square()
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel[None, None])


def contrast(x: Tensor, strength: float) -> Tensor:
    """Each image drawn towards its mean: mean + (1 - strength) (x - mean)."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (1 - strength) * (x - mean)


def translation(x: Tensor, strength: float) -> Tensor:
    """Each image moved by this many pixels up, right, down or left (its index modulo 4), zeros
    moved in."""
    step = int(strength)
    padded, size = F.pad(x, (step,) * 4), x.shape[-1]
    starts = ((2 * step, step), (step, 0), (0, step), (step, 2 * step))
    moved = [
        padded[i : i + 1, :, r : r + size, c : c + size]
        for i in range(len(x))
        for r, c in (starts[i % 4],)
    ]
    return torch.cat(moved) if moved else x


CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "noise": (noise, (0.15, 0.3, 0.5)),
    "blur": (blur, (0.5, 0.7, 1.0)),
    "contrast": (contrast, (0.4, 0.6, 0.8)),
    "translation": (translation, (1, 2)),
}

# ---- attacks on the deterministic forward --------------------------------------------------------


def attacked(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: float,
    start: Tensor,
    steps: int,
    step: float,
    image: bool = True,
) -> Tensor:
    """x' = clip(x' + step * sign(dloss/dx'), x - eps, x + eps); pixels stay in 0 .. 1."""

    def allowed(moved: Tensor) -> Tensor:
        moved = torch.minimum(torch.maximum(moved, x - eps), x + eps)
        return moved.clamp(0, 1) if image else moved

    adversarial = allowed(start)
    for _ in range(steps):
        adversarial.requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(adversarial), adversarial)
        adversarial = allowed(adversarial.detach() + step * grad.sign())
    return adversarial


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    return attacked(lambda moved: F.cross_entropy(model(moved), y), x, eps, x, 1, eps)


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    start = x + torch.empty_like(x).uniform_(-eps, eps)
    return attacked(lambda moved: F.cross_entropy(model(moved), y), x, eps, start, steps, eps / 4)


FGSM_STRENGTHS = (0.05, 0.1, 0.15)
PGD_STRENGTHS = (0.05, 0.1, 0.15)

# ---- networks ------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + BN(conv(relu(BN(conv(x)))))); shortcut_norm: BN in the shortcut too, as in
    ResNet-18."""

    def __init__(self, channels: int, width: int, stride: int, shortcut_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            conv = nn.Conv2d(channels, width, 1, stride, bias=not shortcut_norm)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width)) if shortcut_norm else conv

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(out)))


def resnet(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        ResidualBlock(width, width, 1),
        ResidualBlock(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); every projection is an nn.Linear."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, dim // self.heads)
        # [B, heads, tokens, dim / heads]
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """4 patches of 4 x 4 pixels, two blocks, mean over the tokens, a linear head."""

    def __init__(self, dim: int = 48, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(16, dim)
        self.position = nn.Parameter(0.02 * torch.randn(4, dim))
        self.blocks = nn.Sequential(*(ViTBlock(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 4, stride=4).transpose(1, 2)  # [B, 4, 16]
        return self.head(self.norm(self.blocks(self.embed(patches) + self.position)).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MLP": mlp, "ResNet": resnet, "ViT": ViT}
# Which layers a noise method reaches: (the layer's name, names of all layers in order) -> whether.
PLACEMENTS: dict[str, Callable[[str, list[str]], bool]] = {
    "every layer": lambda name, names: True,
    "first layer": lambda name, names: name == names[0],
    "blocks": lambda name, names: name not in (names[0], names[-1]),
    "attention": lambda name, names: name.endswith(("qkv", "proj")),
    "block MLPs": lambda name, names: name.endswith(("up", "down")),
    "head": lambda name, names: name == names[-1],
}


def layers_to_noise(model: nn.Module, placement: str = "every layer") -> list[str]:
    """The names of the linear and convolutional layers that the placement reaches."""
    names = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    return [name for name in names if PLACEMENTS[placement](name, names)]
